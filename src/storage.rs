//! The node's log: every Raft group's entries, votes and marks in one sequence of segment files, so that all groups
//! share each device flush.
//!
//! Invariants:
//! * A callback that got `Ok` will find its record after any crash. A later record is never durable without every
//!   earlier one: there is one file sequence and one writer.
//! * After a failed write or sync nothing is acknowledged again until the log has been opened anew.
//! * Bytes that fail their checksum are never returned, and never skipped when something acknowledged may have
//!   stood there. In the newest segment, where votes may be lost with them, [`Log::open`] refuses. In older ones only
//!   entries can be lost: those become *holes*, which still exist and have their ids, but cannot be read until they
//!   are repaired with what a peer has.
//! * Memory grows with the number of segments and with what is recent, not with the number of entries.
//!
//! Payloads, votes and entry kinds are opaque here; what they mean is the business of whoever writes them.

pub mod bench;
mod cache;
mod disk;
mod error;
mod frame;
mod group;
mod group_log;
mod identity;
mod index;
mod layout;
mod leaders;
mod log;
mod memory;
mod outgoing;
mod read;
mod recover;
mod scan;
mod scrub;
mod seal;
mod segment;
mod snapshot;
mod spares;
mod track;
mod varint;
mod writer;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

pub use disk::{DirLock, Disk, DiskFile, RealDisk};
pub use error::{Damaged, Error};
pub use group_log::GroupLog;
pub use log::{Log, OnDamage, Stats};
pub use memory::{Faults, MemoryDisk, Op, PowerCut};
pub use scrub::Scrubbed;
pub use snapshot::SnapshotFile;

/// Where the log lives and how much it may hold on to.
#[derive(Clone, Debug)]
pub struct Options {
    /// A directory of the log's own; created when absent. Names it on errors when the log is on another [`Disk`].
    pub dir: PathBuf,
    /// Size at which a segment file is full, 4 KiB to 2 GiB; also what is written ahead with zeros on first use.
    pub segment_bytes: u64,
    /// Payload bytes of recent entries kept in memory, all groups together. Entries not yet written come on top.
    pub tail_bytes: usize,
    /// Freed segment files kept for reuse, beyond which they are deleted.
    pub spare_segments: usize,
    /// Memory for indexes of sealed segments, which are read when entries there are.
    pub index_bytes: usize,
    /// How fast sealed segments are read over and over to find damage before somebody needs them; 0 for not at all.
    pub scrub_bytes_per_second: u64,
}

impl Options {
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            segment_bytes: 64 << 20,
            tail_bytes: 64 << 20,
            spare_segments: 2,
            index_bytes: 32 << 20,
            scrub_bytes_per_second: 4 << 20,
        }
    }
}

/// Whose log it is meant to be. A directory of another owner is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub cluster_id: String,
    pub node: u64,
}

/// A place in a group's Raft log and the leader who put an entry there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogId {
    pub term: u64,
    /// The leader of that term.
    pub node: u64,
    pub index: u64,
}

/// One Raft log entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub id: LogId,
    /// Opaque to the log, kept with the entry (blank, normal, membership, ...).
    pub kind: u8,
    /// At most 1 GiB. A slice of a larger buffer keeps all of that buffer in memory while it is recent.
    pub payload: Bytes,
}

/// Told once whether a record is durable; called on the log's writer thread (or on the caller's, when refused at
/// once), in the order in which records were handed in. Must be quick, and must neither panic nor close the log.
pub type Done = Box<dyn FnOnce(io::Result<()>) + Send>;

/// A panic elsewhere must not turn into one here: everything under these locks is valid between statements.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
