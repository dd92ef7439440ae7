//! The replicated state machine of a shard: which records each channel holds, which publishes were seen before,
//! how far each Kafka source is. It holds places in the log, never payloads: the log is the data.
//!
//! The same entries give the same state on every replica: time comes from the entries' stamps, maps are ordered.

mod archive;
mod checkpoint;
mod index;
mod shard;
mod tests;

pub use archive::{Archive, Archived, ChannelId, Place};
pub use checkpoint::InvalidCheckpoint;
pub use index::{Behind, RecordRef};
pub use shard::{Applied, Error, Event, Outcome, Shard};

use std::time::Duration;

/// Shortest time a publish is recognised again by its idempotency key, and a record is retained.
pub const RETENTION_MIN: Duration = Duration::from_secs(120);

/// How long an empty channel's position is remembered, so that a client that comes back is told the truth.
pub const FORGET_AFTER: Duration = Duration::from_secs(24 * 3600);
