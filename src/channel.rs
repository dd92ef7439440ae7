//! The replicated state machine of a shard: which records each channel holds, which publishes were seen before, who is
//! present, how far each Kafka source is. It holds places in the log, never payloads: the log is the data. Only members'
//! last events are here themselves, since members outlive their records.
//!
//! The same entries give the same state on every replica: time comes from the entries' stamps, maps are ordered.
//!
//! A replica comes back from its own checkpoint (`encode`, with the index entries of its records), or from another
//! replica's *outline*: everything but the records, which the log above the horizon brings back (`rebuild`).

mod archive;
mod checkpoint;
mod held;
mod index;
mod invariants;
mod ledger;
mod presence;
mod publish;
mod read;
mod rebuild;
mod records;
mod retention;
mod shard;
mod tests;

pub use archive::{Archive, Archived, ChannelId, MemoryArchive, Place};
pub use checkpoint::InvalidCheckpoint;
pub use presence::{Attendant, Attended, Member};
pub use read::{Behind, ReadError, RecordRef};
pub use shard::{Applied, Error, Event, Options, Outcome, Shard};

use std::time::Duration;

/// Shortest time a publish is recognised again by its idempotency key, and a record is retained.
pub const RETENTION_MIN: Duration = Duration::from_secs(120);

/// How long an empty channel's position is remembered, so that a client that comes back is told the truth.
pub const FORGET_AFTER: Duration = Duration::from_secs(24 * 3600);
