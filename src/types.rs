//! The vocabulary every other room speaks: names that parse, serials that order, and the one table of errors.
//!
//! Constructors parse: a value of one of these types is always valid, so nothing downstream checks again.

mod error;
mod ids;
mod leadership;
mod name;
mod occupancy;
mod range;
mod serial;

pub use error::{ErrorCode, ErrorInfo, Retry};
pub use ids::{AppId, GroupId, NodeId, ParseIdError, ShardId};
pub use leadership::Leadership;
pub use name::{ChannelKey, ChannelName, InvalidChannelName};
pub use occupancy::{Counts, Metrics, OccupancyChange};
pub use range::{Kinds, Range};
pub use serial::{InvalidSerial, MessageSerial, Serial};
