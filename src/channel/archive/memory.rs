//! An archive in memory: what tests hold the shard and other archives against, and what a node without disk uses.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, MutexGuard};

use crate::channel::archive::{Archive, Archived, ChannelId, Place};

/// An [`Archive`] that ends with the process: `seal` makes nothing durable.
#[derive(Debug, Default)]
pub struct MemoryArchive(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    entries: BTreeMap<(ChannelId, Place), Archived>,
    mark: u64,
    /// Not needed by the state of now; not yet sealed.
    forgotten: Vec<(ChannelId, Place)>,
    /// Forgotten before the last seal.
    sealed: Vec<(ChannelId, Place)>,
}

impl MemoryArchive {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|err| err.into_inner())
    }

    /// Entries held, needed or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Archive for MemoryArchive {
    fn put(&self, channel_entries: &[(ChannelId, Archived)]) -> io::Result<()> {
        let mut inner = self.lock();
        for (channel, archived) in channel_entries {
            let at = (*channel, archived.first);
            inner.entries.insert(at, archived.clone());
        }
        inner.mark += 1;
        Ok(())
    }

    fn find(&self, channel: ChannelId, key: &[u8; 16]) -> io::Result<Option<Place>> {
        let inner = self.lock();
        let all = (channel, Place::MIN)..=(channel, Place::MAX);
        let mut newest_first = inner.entries.range(all).rev();
        let found = newest_first.find(|(_, archived)| archived.key == *key);
        Ok(found.map(|((_, first), _)| *first))
    }

    fn get(&self, channel: ChannelId, first: Place) -> io::Result<Option<Archived>> {
        Ok(self.lock().entries.get(&(channel, first)).cloned())
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
        let inner = self.lock();
        let found = inner.entries.range((channel, from)..=(channel, to));
        let found = found.map(|(_, archived)| archived.clone());
        Ok(match newest_first {
            true => found.rev().take(limit).collect(),
            false => found.take(limit).collect(),
        })
    }

    fn forget(&self, channel: ChannelId, through: Place) {
        self.lock().forgotten.push((channel, through));
    }

    fn mark(&self) -> u64 {
        self.lock().mark
    }

    fn seal(&self) -> io::Result<()> {
        let mut inner = self.lock();
        let forgotten = std::mem::take(&mut inner.forgotten);
        inner.sealed.extend(forgotten);
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        let mut inner = self.lock();
        for (channel, through) in std::mem::take(&mut inner.sealed) {
            let gone = (channel, Place::MIN)..=(channel, through);
            let gone: Vec<_> = inner.entries.range(gone).map(|(at, _)| *at).collect();
            for at in gone {
                inner.entries.remove(&at);
            }
        }
        Ok(())
    }

    fn clear(&self) -> io::Result<()> {
        *self.lock() = Inner::default();
        Ok(())
    }
}
