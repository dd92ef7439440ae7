//! Kafka in and out, exactly once.

mod cursor;
mod inbound;
pub mod mapping;
mod outbound;
mod record;
mod status;
mod upstream;

pub use status::{BridgeStatus, PartitionStatus, ShardStatus, State};
pub use upstream::{Outcome, Publish, PublishError, ShardPage, Upstream};
