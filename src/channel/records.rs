//! The records of one channel that memory holds, found by place and by key, at less than 64 bytes each.

use std::collections::VecDeque;

use hashbrown::HashTable;

use crate::channel::archive::Place;
use crate::channel::held::{Held, KeyDigest};

/// Up to so many records a key is looked for one by one.
const SCANNED_MAX: usize = 8;

/// Records, oldest first, and where each key is.
///
/// Invariant: firsts ascend strictly. The table, where there is one, holds each record's ordinal (`popped` plus its
/// place in the queue, wrapping) exactly once. There is none for few records, nor after an insertion in the middle,
/// which shifts ordinals, until [`Records::index`].
///
/// The table is never iterated: its order depends on its history.
#[derive(Debug, Default)]
pub(super) struct Records {
    queue: VecDeque<Held>,
    table: Option<Box<HashTable<u32>>>,
    popped: u32,
}

impl Records {
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn front(&self) -> Option<&Held> {
        self.queue.front()
    }

    pub(super) fn back(&self) -> Option<&Held> {
        self.queue.back()
    }

    /// The records from queue place `start` on.
    pub(super) fn iter_from(&self, start: usize) -> impl DoubleEndedIterator<Item = &Held> {
        self.queue.range(start.min(self.queue.len())..)
    }

    /// The records before queue place `end`.
    pub(super) fn iter_to(&self, end: usize) -> impl DoubleEndedIterator<Item = &Held> {
        self.queue.range(..end.min(self.queue.len()))
    }

    pub(super) fn partition_point(&self, before: impl FnMut(&Held) -> bool) -> usize {
        self.queue.partition_point(before)
    }

    pub(super) fn get(&self, first: Place) -> Option<&Held> {
        let at = self.queue.binary_search_by_key(&first, Held::first).ok()?;
        self.queue.get(at)
    }

    /// The record with this key.
    pub(super) fn find(&self, key: &KeyDigest) -> Option<&Held> {
        let Some(table) = &self.table else {
            return self.queue.iter().find(|held| held.key == *key);
        };
        let same = |ordinal: &u32| at(&self.queue, self.popped, *ordinal).key == *key;
        let ordinal = table.find(hash(key), same)?;
        Some(at(&self.queue, self.popped, *ordinal))
    }

    /// Adds a record newer than all.
    pub(super) fn push(&mut self, held: Held) {
        self.make_room();
        self.queue.push_back(held);
        let ordinal = self.ordinal(self.queue.len() - 1);
        let (queue, popped) = (&self.queue, self.popped);
        match &mut self.table {
            Some(table) => {
                let rehash = |ordinal: &u32| hash(&at(queue, popped, *ordinal).key);
                table.insert_unique(hash(&held.key), ordinal, rehash);
            }
            None if self.queue.len() == SCANNED_MAX + 1 => self.index(),
            None => {}
        }
    }

    /// Adds a record at its place among the others, and does without the table then.
    pub(super) fn insert(&mut self, held: Held) {
        if self.back().is_none_or(|back| back.first() < held.first()) {
            return self.push(held);
        }
        self.make_room();
        let place = self.partition_point(|other| other.first() < held.first());
        self.queue.insert(place, held);
        self.table = None;
    }

    pub(super) fn pop_front(&mut self) -> Option<Held> {
        let held = *self.queue.front()?;
        if let Some(table) = &mut self.table
            && let Ok(entry) = table.find_entry(hash(&held.key), |it| *it == self.popped)
        {
            entry.remove();
        }
        self.queue.pop_front();
        self.popped = self.popped.wrapping_add(1);
        self.give_back();
        Some(held)
    }

    /// Makes the table if there are enough records for one.
    pub(super) fn index(&mut self) {
        if self.table.is_some() || self.queue.len() <= SCANNED_MAX {
            return;
        }
        let mut table = HashTable::with_capacity(self.queue.len());
        let (queue, popped) = (&self.queue, self.popped);
        for place in 0..queue.len() {
            let ordinal = self.ordinal(place);
            let rehash = |ordinal: &u32| hash(&at(queue, popped, *ordinal).key);
            table.insert_unique(hash(&queue[place].key), ordinal, rehash);
        }
        self.table = Some(Box::new(table));
    }

    /// Bytes on the heap.
    #[cfg(test)]
    pub(super) fn heap_bytes(&self) -> usize {
        let table = self.table.as_ref();
        let table = table.map_or(0, |table| {
            table.allocation_size() + size_of::<HashTable<u32>>()
        });
        self.queue.capacity() * size_of::<Held>() + table
    }

    fn ordinal(&self, place: usize) -> u32 {
        let place = u32::try_from(place).expect("a shard holds fewer than 2^32 records in memory");
        self.popped.wrapping_add(place)
    }

    /// Grows by a sixteenth: a queue that doubles would waste up to a record's size for each.
    fn make_room(&mut self) {
        if self.queue.len() == self.queue.capacity() {
            self.queue.reserve_exact((self.queue.len() / 16).max(1));
        }
    }

    fn give_back(&mut self) {
        let len = self.queue.len();
        if self.queue.capacity() > len + len / 8 + 1 {
            self.queue.shrink_to(len + len / 16);
        }
        let (queue, popped) = (&self.queue, self.popped);
        if len <= SCANNED_MAX / 2 {
            self.table = None;
        } else if let Some(table) = &mut self.table
            && table.capacity() / 8 * 3 > len
        {
            let rehash = |ordinal: &u32| hash(&at(queue, popped, *ordinal).key);
            table.shrink_to(len + len / 8, rehash);
        }
    }

    /// # Panics
    /// When the records contradict themselves.
    pub(super) fn check_invariants(&self, indexed: bool) {
        let firsts = self.queue.iter().map(Held::first);
        assert!(firsts.is_sorted_by(|a, b| a < b), "firsts ascend");
        if let Some(table) = &self.table {
            assert_eq!(table.len(), self.queue.len(), "a key a record");
        }
        assert!(!indexed || self.table.is_some() || self.queue.len() <= SCANNED_MAX);
        for held in &self.queue {
            let found = self.find(&held.key).map(Held::first);
            assert_eq!(found, Some(held.first()), "a record is found by its key");
        }
    }
}

fn at(queue: &VecDeque<Held>, popped: u32, ordinal: u32) -> &Held {
    let place = ordinal.wrapping_sub(popped);
    &queue[usize::try_from(place).expect("a u32 fits a usize here")]
}

/// Keys are digests already. Whoever seeks ids that meet in the table gains little: it is bounded by the records that
/// memory holds.
fn hash(key: &KeyDigest) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *key;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}
