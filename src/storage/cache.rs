//! Indexes of sealed segments that were read lately, up to a number of bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::storage::index::Index;

/// A segment's number, which is never used again, and where in it the index lies.
pub(super) type Key = (u32, u32);

/// Gives up what was not used for longest.
#[derive(Debug)]
pub(super) struct Cache {
    limit: usize,
    bytes: usize,
    /// Counts uses.
    clock: u64,
    kept: HashMap<Key, (u64, Arc<Index>)>,
    by_use: BTreeMap<u64, Key>,
}

impl Cache {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            bytes: 0,
            clock: 0,
            kept: HashMap::new(),
            by_use: BTreeMap::new(),
        }
    }

    pub(super) fn find(&mut self, key: Key) -> Option<Arc<Index>> {
        let (used, index) = self.kept.get_mut(&key)?;
        self.by_use.remove(used);
        self.clock += 1;
        *used = self.clock;
        self.by_use.insert(self.clock, key);
        Some(index.clone())
    }

    /// Keeps an index unless it alone is larger than the limit.
    pub(super) fn keep(&mut self, key: Key, index: Arc<Index>) {
        if index.memory() > self.limit || self.kept.contains_key(&key) {
            return;
        }
        self.clock += 1;
        self.bytes += index.memory();
        self.by_use.insert(self.clock, key);
        self.kept.insert(key, (self.clock, index));
        while self.bytes > self.limit
            && let Some((_, oldest)) = self.by_use.pop_first()
            && let Some((_, index)) = self.kept.remove(&oldest)
        {
            self.bytes -= index.memory();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::index::Slot;

    #[test]
    fn what_was_not_used_for_longest_goes() {
        let slot = Slot {
            offset: 0,
            length: 0,
            kind: 0,
        };
        let index = |size| {
            Arc::new(Index {
                first: 1,
                slots: vec![slot; size],
            })
        };
        let mut cache = Cache::new(3 * index(10).memory());
        for number in 1..=3 {
            cache.keep((number, 0), index(10));
        }
        assert!(cache.find((1, 0)).is_some());
        cache.keep((4, 0), index(10));
        cache.keep((5, 0), index(100));
        let kept: Vec<_> = (1..=5)
            .filter(|number| cache.find((*number, 0)).is_some())
            .collect();
        assert_eq!(kept, [1, 3, 4]);
        assert_eq!(cache.bytes, cache.limit);
        assert_eq!(cache.by_use.len(), 3);
    }
}
