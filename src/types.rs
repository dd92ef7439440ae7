//! The vocabulary every other room speaks: names that parse, serials that order, and the one table of errors.
//!
//! Constructors parse: a value of one of these types is always valid, so nothing downstream checks again.

mod error;
mod ids;
mod name;
mod serial;

pub use error::{ErrorCode, ErrorInfo, Retry};
pub use ids::{AppId, GroupId, NodeId, ParseIdError, ShardId};
pub use name::{ChannelKey, ChannelName, InvalidChannelName};
pub use serial::{InvalidSerial, MessageSerial, Serial};
