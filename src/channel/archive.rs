//! Where the index entries of older records are kept when memory holds enough: behind a trait, since this room does
//! no I/O. Whatever lies there can be made again from the log.

mod memory;

pub use memory::MemoryArchive;

use std::fmt;
use std::io;

/// A channel, as archives name it: the first 16 bytes of a digest of app and name.
pub type ChannelId = [u8; 16];

/// A place in the shard's log: entry and position in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub index: u64,
    pub position: u16,
}

/// The index entry of one record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archived {
    /// Where it was stored first: its serial for ever.
    pub first: Place,
    /// Where its payload lies now.
    pub now: Place,
    pub stamp_ms: u64,
    pub retention_s: u32,
    /// Bytes of its publish.
    pub bytes: u32,
    /// Messages in it.
    pub count: u16,
    pub ephemeral: bool,
    /// It holds presence events, not messages.
    pub presence: bool,
    /// Digest of its idempotency key.
    pub key: [u8; 16],
}

/// Index entries of retained records that memory no longer holds.
///
/// It may hold more than the shard relies on (entries put after the checkpoint that the shard was restored from, and
/// entries not yet removed); the shard knows what counts by serial. It never holds less than what was put before the
/// mark that it reports.
pub trait Archive: fmt::Debug + Send + Sync + 'static {
    /// Adds entries, or replaces those with the same `first`. Each call counts one towards the mark.
    fn put(&self, channel_entries: &[(ChannelId, Archived)]) -> io::Result<()>;

    /// `first` of the channel's newest entry with this key.
    fn find(&self, channel: ChannelId, key: &[u8; 16]) -> io::Result<Option<Place>>;

    /// The entry that was first stored at this place.
    fn get(&self, channel: ChannelId, first: Place) -> io::Result<Option<Archived>>;

    /// Up to `limit` entries with `from <= first <= to`, oldest first, or newest first.
    fn range(
        &self,
        channel: ChannelId,
        from: Place,
        to: Place,
        newest_first: bool,
        limit: usize,
    ) -> io::Result<Vec<Archived>>;

    /// Entries of the channel up to `through` are not needed by the state of now. They are removed only after the next
    /// `seal` and `settle`: an older checkpoint may still need them.
    fn forget(&self, channel: ChannelId, through: Place);

    /// Calls of `put` since the archive was made or cleared, durable or not.
    fn mark(&self) -> u64;

    /// Makes everything put so far durable, with a real sync. After a crash `mark` is at least what it was now.
    fn seal(&self) -> io::Result<()>;

    /// A checkpoint made before the last `seal` is durable: what was forgotten before that `seal` may go.
    fn settle(&self) -> io::Result<()>;

    /// Removes everything of the shard, durably, and starts the mark again at 0.
    fn clear(&self) -> io::Result<()>;
}
