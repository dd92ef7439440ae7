//! One shard's archive: a tree of rows with their tally.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use sled::{Batch, IVec, Tree};

use super::locked;
use super::rows::{self, TALLY, Tally, digest_key, entry_key, parse_entry, parse_place};
use super::store::{self, Store};
use crate::channel::{Archive, Archived, ChannelId, Place};
use crate::types::GroupId;

/// Entries written in one batch: sled lets nobody read, in any shard, while it writes one.
const BATCH_ENTRIES: usize = 512;

/// Invariant: what the tree's tally says is what the tree holds, after every batch.
#[derive(Debug)]
pub(super) struct Shard {
    store: Arc<Store>,
    name: Vec<u8>,
    /// `None` when it could not be opened. Held for reading by whoever uses it: [`Archive::clear`] replaces it.
    tree: RwLock<Option<Tree>>,
    writer: Mutex<Writer>,
    /// Of the writer's tally, for those who only ask.
    mark: AtomicU64,
    /// Batches written and clearings since the start, and how many of them are known to be durable.
    changes: AtomicU64,
    sealed: AtomicU64,
    forgotten: Mutex<Forgotten>,
}

#[derive(Debug, Default)]
struct Writer {
    tally: Tally,
}

/// Through where each channel's entries are not needed.
#[derive(Debug, Default)]
struct Forgotten {
    since_seal: BTreeMap<ChannelId, Place>,
    /// Waits for a checkpoint to be durable.
    sealed: BTreeMap<ChannelId, Place>,
}

impl Shard {
    pub(super) fn open(store: Arc<Store>, group: GroupId) -> Self {
        let name = store::shard_tree(group.0);
        let opened = store.run(|db| {
            let tree = db.open_tree(&name)?;
            let tally = store::tally(&tree)?;
            Ok((tree, tally))
        });
        let (tree, tally) = match opened {
            Ok((tree, Some(tally))) => (Some(tree), tally),
            Ok((_, None)) => {
                store.give_up(invalid("tally"));
                (None, Tally::default())
            }
            // The store has said why.
            Err(_) => (None, Tally::default()),
        };
        Self {
            store,
            name,
            tree: RwLock::new(tree),
            writer: Mutex::new(Writer { tally }),
            mark: AtomicU64::new(tally.mark),
            // What was found may be in the page cache only.
            changes: AtomicU64::new(1),
            sealed: AtomicU64::new(0),
            forgotten: Mutex::default(),
        }
    }

    fn with_tree<T>(&self, f: impl FnOnce(&Tree) -> sled::Result<T>) -> io::Result<T> {
        let tree = self.tree.read().unwrap_or_else(PoisonError::into_inner);
        let tree = tree.as_ref();
        self.store.run(|_| {
            f(tree.ok_or_else(|| sled::Error::CollectionNotFound(self.name.as_slice().into()))?)
        })
    }

    /// Writes one batch. `f` collects its rows; `last` makes it count towards the mark.
    fn write(
        &self,
        writer: &mut Writer,
        last: bool,
        f: impl FnOnce(&mut Rows<'_>) -> sled::Result<()>,
    ) -> io::Result<()> {
        let tally = self.with_tree(|tree| {
            let mut rows = Rows {
                tree,
                tally: writer.tally,
                changed: BTreeMap::new(),
            };
            f(&mut rows)?;
            let Rows {
                mut tally, changed, ..
            } = rows;
            tally.mark += u64::from(last);
            let mut batch = Batch::default();
            for (key, value) in changed {
                match value {
                    Some(value) => batch.insert(key, value),
                    None => batch.remove(key),
                }
            }
            batch.insert(TALLY, &tally.to_bytes());
            tree.apply_batch(batch)?;
            Ok(tally)
        })?;
        writer.tally = tally;
        self.changes.fetch_add(1, Ordering::AcqRel);
        self.mark.store(tally.mark, Ordering::Release);
        Ok(())
    }

    /// Removes the channel's entries through that place, a batch at a time.
    fn remove(&self, channel: ChannelId, through: Place) -> io::Result<()> {
        let range = entry_key(channel, Place::default())..=entry_key(channel, through);
        loop {
            let mut writer = locked(&self.writer);
            let found: Vec<(IVec, IVec)> =
                self.with_tree(|tree| tree.range(range.clone()).take(BATCH_ENTRIES).collect())?;
            if found.is_empty() {
                return Ok(());
            }
            let entries = found.iter().map(|(key, value)| parse_entry(key, value));
            let entries: Option<Vec<Archived>> = entries.collect();
            let entries = entries.ok_or_else(|| self.store.give_up(invalid("entry")))?;
            self.write(&mut writer, false, |rows| {
                for entry in entries {
                    rows.remove_entry(channel, &entry)?;
                }
                Ok(())
            })?;
        }
    }
}

/// The tree as it will be after a batch.
struct Rows<'a> {
    tree: &'a Tree,
    tally: Tally,
    changed: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
}

impl Rows<'_> {
    fn row(&self, key: &[u8]) -> sled::Result<Option<Vec<u8>>> {
        match self.changed.get(key) {
            Some(value) => Ok(value.clone()),
            None => Ok(self.tree.get(key)?.map(|value| value.to_vec())),
        }
    }

    fn set(&mut self, key: Vec<u8>, old: Option<&[u8]>, new: Option<Vec<u8>>) {
        if let Some(old) = old {
            self.tally.remove(&key, old);
        }
        if let Some(new) = &new {
            self.tally.add(&key, new);
        }
        self.changed.insert(key, new);
    }

    fn add_entry(&mut self, channel: ChannelId, entry: &Archived) -> sled::Result<()> {
        let key = entry_key(channel, entry.first);
        let old = self.row(&key)?;
        if let Some(old) = old.as_deref().and_then(|old| parse_entry(&key, old))
            && old.key != entry.key
        {
            self.remove_digest(channel, &old)?;
        }
        self.set(key, old.as_deref(), Some(rows::entry(entry)));

        let key = digest_key(channel, &entry.key);
        let old = self.row(&key)?;
        let newest = old.as_deref().and_then(parse_place);
        if newest.is_none_or(|newest| newest < entry.first) {
            self.set(key, old.as_deref(), Some(rows::place(entry.first).to_vec()));
        }
        Ok(())
    }

    fn remove_entry(&mut self, channel: ChannelId, entry: &Archived) -> sled::Result<()> {
        let key = entry_key(channel, entry.first);
        let old = self.row(&key)?;
        self.set(key, old.as_deref(), None);
        self.remove_digest(channel, entry)
    }

    /// Removes the key's row if it points at this entry.
    fn remove_digest(&mut self, channel: ChannelId, entry: &Archived) -> sled::Result<()> {
        let key = digest_key(channel, &entry.key);
        let old = self.row(&key)?;
        if old.as_deref().and_then(parse_place) == Some(entry.first) {
            self.set(key, old.as_deref(), None);
        }
        Ok(())
    }
}

impl Archive for Shard {
    fn put(&self, channel_entries: &[(ChannelId, Archived)]) -> io::Result<()> {
        let mut writer = locked(&self.writer);
        // An empty call counts as well.
        let batches = channel_entries.len().div_ceil(BATCH_ENTRIES).max(1);
        for n in 0..batches {
            let end = channel_entries.len().min((n + 1) * BATCH_ENTRIES);
            let entries = &channel_entries[n * BATCH_ENTRIES..end];
            self.write(&mut writer, n + 1 == batches, |rows| {
                for (channel, entry) in entries {
                    rows.add_entry(*channel, entry)?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn find(&self, channel: ChannelId, key: &[u8; 16]) -> io::Result<Option<Place>> {
        let found = self.with_tree(|tree| tree.get(digest_key(channel, key)))?;
        let Some(value) = found else { return Ok(None) };
        let place = parse_place(&value).ok_or_else(|| self.store.give_up(invalid("place")))?;
        Ok(Some(place))
    }

    fn get(&self, channel: ChannelId, first: Place) -> io::Result<Option<Archived>> {
        let key = entry_key(channel, first);
        let found = self.with_tree(|tree| tree.get(&key))?;
        let Some(value) = found else { return Ok(None) };
        let entry = parse_entry(&key, &value);
        Ok(Some(
            entry.ok_or_else(|| self.store.give_up(invalid("entry")))?,
        ))
    }

    fn range(
        &self,
        channel: ChannelId,
        from: Place,
        to: Place,
        newest_first: bool,
        limit: usize,
    ) -> io::Result<Vec<Archived>> {
        if from > to {
            return Ok(Vec::new());
        }
        let range = entry_key(channel, from)..=entry_key(channel, to);
        let found: Vec<(IVec, IVec)> = self.with_tree(|tree| {
            let rows = tree.range(range);
            if newest_first {
                rows.rev().take(limit).collect()
            } else {
                rows.take(limit).collect()
            }
        })?;
        let entries = found.iter().map(|(key, value)| parse_entry(key, value));
        let entries: Option<Vec<Archived>> = entries.collect();
        entries.ok_or_else(|| self.store.give_up(invalid("entry")))
    }

    fn forget(&self, channel: ChannelId, through: Place) {
        let mut forgotten = locked(&self.forgotten);
        raise(&mut forgotten.since_seal, channel, through);
    }

    fn mark(&self) -> u64 {
        // What is broken claims nothing.
        if self.store.is_broken() {
            return 0;
        }
        self.mark.load(Ordering::Acquire)
    }

    fn seal(&self) -> io::Result<()> {
        // Taken before: what is forgotten meanwhile belongs to the next seal.
        let due = std::mem::take(&mut locked(&self.forgotten).since_seal);
        // Most shards put nothing here for long: their checkpoints cost no sync.
        let changes = self.changes.load(Ordering::Acquire);
        if changes != self.sealed.load(Ordering::Acquire) {
            self.store.seal()?;
            self.sealed.fetch_max(changes, Ordering::AcqRel);
        }
        let mut forgotten = locked(&self.forgotten);
        for (channel, through) in due {
            raise(&mut forgotten.sealed, channel, through);
        }
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        let due = std::mem::take(&mut locked(&self.forgotten).sealed);
        for (channel, through) in due {
            self.remove(channel, through)?;
        }
        Ok(())
    }

    fn clear(&self) -> io::Result<()> {
        let mut writer = locked(&self.writer);
        *locked(&self.forgotten) = Forgotten::default();
        if writer.tally == Tally::default() && !self.store.is_broken() {
            return Ok(());
        }
        self.changes.fetch_add(1, Ordering::AcqRel);
        {
            let mut tree = self.tree.write().unwrap_or_else(PoisonError::into_inner);
            *tree = None;
            *tree = Some(self.store.run(|db| {
                db.drop_tree(&self.name)?;
                db.open_tree(&self.name)
            })?);
            writer.tally = Tally::default();
            self.mark.store(0, Ordering::Release);
        }
        self.store.seal()
    }
}

fn raise(places: &mut BTreeMap<ChannelId, Place>, channel: ChannelId, through: Place) {
    let place = places.entry(channel).or_insert(through);
    *place = through.max(*place);
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("not a valid {what}"))
}
