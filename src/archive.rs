//! Index entries of older retained records, outside memory: [`channel::Archive`] on sled.
//!
//! **Why sled is sound here.** What lies here can be made again from the log, so losing it costs time and never a
//! record. Yet a shard that believes a mark relies on what the mark says is there, so that much must hold:
//! * *Durable means durable.* sled's own flush ends in `sync_file_range`, which does not reach the device. `seal`
//!   flushes and then syncs every file of the folder (`db`, `conf`, `snap.*`, `blobs/*`) and both directories.
//! * *A mark never says more than is there.* A shard has one tree: entries, keys and one tally. sled's batches are
//!   atomic within a tree, so each batch changes the tally with what it tallies: the count of calls (in the last
//!   batch of a call only), the number of rows and the sum of their hashes. sled recovers its log up to the first
//!   tear, whole batches only, so after a crash tally and rows are of one moment. (Two trees would need the order of
//!   their writes as the proof, and could not be checked.)
//! * *It is checked.* That recovery is right assumes that nothing sled has written was lost while something later
//!   was kept. A power cut can break that: sled overwrites freed segments after flushes that were none. So after
//!   anything but a clean close, opening reads all rows and compares them with the tally. After a clean close a
//!   `CLEAN` file names each file's length and checksum, and comparing them is enough and quicker. (Lengths were not:
//!   with a flipped bit sled opened without an error and held 386 of 2700 entries.)
//!
//! **What happens when it is not.** Any error or panic inside sled is returned as an [`io::Error`] and ends the
//! archive: `mark` says 0, everything else fails, and a `BROKEN` file makes the next open set the folder aside, as it
//! does for whatever cannot be opened or does not tally. One folder is kept for those who want to know why. A flush
//! that never ends (sled waits for ever when one of its threads died) counts as broken after two minutes.
//!
//! What is absent: any promise. Nothing here is consulted to decide whether something was stored.

mod folder;
mod rows;
mod shard;
mod store;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::channel;
use crate::types::GroupId;
use shard::Shard;
use store::Store;

/// How much memory the archives of a node may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Bytes of pages that sled keeps in memory, all shards together.
    pub cache_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cache_bytes: 64 << 20,
        }
    }
}

/// The archives of a node's shards: one sled database in one folder. It closes when this and all shards are dropped.
#[derive(Debug)]
pub struct Archives {
    store: Arc<Store>,
    /// One writer per shard, whoever asks.
    shards: Mutex<BTreeMap<GroupId, Arc<Shard>>>,
}

impl Archives {
    /// Opens the folder, or creates it. What cannot be opened or proved whole is set aside as `<dir>.broken-<n>`,
    /// with a warning, and the archives are empty. May read everything, but only after an unclean end.
    ///
    /// # Errors
    /// Only when the file system refuses (no permission, no space, read-only), or another process has it open.
    pub fn open(dir: PathBuf, options: Options) -> io::Result<Self> {
        let store = Store::open(dir, &options)?;
        Ok(Self {
            store: Arc::new(store),
            shards: Mutex::default(),
        })
    }

    /// The archive of one shard; the same one however often it is asked for. When it cannot be opened every call of
    /// it fails.
    #[must_use]
    pub fn shard(&self, group: GroupId) -> Arc<dyn channel::Archive> {
        let mut shards = locked(&self.shards);
        let shard = shards
            .entry(group)
            .or_insert_with(|| Arc::new(Shard::open(Arc::clone(&self.store), group)));
        Arc::clone(shard) as Arc<dyn channel::Archive>
    }
}

/// A panic elsewhere must not turn into one here: everything under these locks is valid between statements.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
