//! Sums over all retained records of a shard, kept as records come and go.

use std::collections::VecDeque;

use crate::channel::archive::{Archived, Place};
use crate::types::Kinds;

/// How many retained records have their payload in each entry of the log.
///
/// Invariant: `counts` is empty or its first element is not 0.
#[derive(Clone, Debug, Default)]
pub(super) struct Live {
    /// Log index of the first element.
    pub(super) from: u64,
    pub(super) counts: VecDeque<u32>,
}

impl Live {
    pub(super) fn add(&mut self, index: u64, records: u32) {
        if self.counts.is_empty() {
            self.from = index;
        }
        while index < self.from {
            self.counts.push_front(0);
            self.from -= 1;
        }
        let at = usize::try_from(index - self.from).expect("a u64 fits a usize here");
        if at >= self.counts.len() {
            self.counts.resize(at + 1, 0);
        }
        self.counts[at] += records;
    }

    pub(super) fn remove(&mut self, index: u64) {
        let at = index.checked_sub(self.from);
        let at = at.and_then(|at| usize::try_from(at).ok());
        let count = at.and_then(|at| self.counts.get_mut(at));
        let count = count.expect("what is removed was added");
        *count = count.checked_sub(1).expect("what is removed was added");
        self.trim();
    }

    fn trim(&mut self) {
        while self.counts.pop_front_if(|count| *count == 0).is_some() {
            self.from += 1;
        }
        if self.counts.capacity() > 4 * self.counts.len() + 1024 {
            self.counts.shrink_to(2 * self.counts.len());
        }
    }

    /// Entries with retained payloads, and how many.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u32)> {
        let counts = (self.from..).zip(self.counts.iter().copied());
        counts.filter(|(_, count)| *count > 0)
    }

    /// The first entry that holds a retained payload.
    pub(super) fn first(&self) -> Option<u64> {
        (!self.counts.is_empty()).then_some(self.from)
    }
}

/// How many records are of which kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Ephemeral ones, also of those that hold presence events.
    pub(super) ephemeral: u64,
    /// Those that hold presence events.
    pub(super) presence: u64,
    pub(super) ephemeral_presence: u64,
}

impl Counts {
    pub(super) fn add(&mut self, record: &Archived) {
        self.ephemeral += u64::from(record.ephemeral);
        self.presence += u64::from(record.presence);
        self.ephemeral_presence += u64::from(record.ephemeral && record.presence);
    }

    pub(super) fn remove(&mut self, record: &Archived) {
        self.ephemeral -= u64::from(record.ephemeral);
        self.presence -= u64::from(record.presence);
        self.ephemeral_presence -= u64::from(record.ephemeral && record.presence);
    }

    /// Of `len` records, those of these kinds that are part of history.
    pub(super) const fn lasting(&self, len: u64, kinds: Kinds) -> u64 {
        let presence = self.presence - self.ephemeral_presence;
        match kinds {
            Kinds::Presence => presence,
            Kinds::Both => len - self.ephemeral,
            Kinds::Messages => len - self.ephemeral - presence,
        }
    }
}

/// What a shard knows of its records as a whole.
///
/// Invariant: each field is what the retained records of both tiers add up to.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    pub(super) live: Live,
    /// Bytes of their publishes.
    pub(super) bytes: u64,
    /// Wrapping sum of their hashes.
    pub(super) digest: u64,
    pub(super) in_memory: usize,
    pub(super) archived: usize,
}

impl Ledger {
    /// Counts a record of the channel with hash `channel`; not its tier.
    pub(super) fn add(&mut self, channel: u64, record: &Archived) {
        self.live.add(record.now.index, 1);
        self.bytes = self.bytes.saturating_add(u64::from(record.bytes));
        self.digest = self.digest.wrapping_add(record_hash(channel, record));
    }

    pub(super) fn remove(&mut self, channel: u64, record: &Archived) {
        self.live.remove(record.now.index);
        self.bytes = self.bytes.saturating_sub(u64::from(record.bytes));
        self.digest = self.digest.wrapping_sub(record_hash(channel, record));
    }
}

/// Mixes words into a hash that is the same on every machine and build: replicas compare it.
///
/// The multiply and shift of `MurmurHash3`'s finisher, a word at a time. It finds accidents, not forgers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mixer(u64);

impl Mixer {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    pub(super) const fn word(self, word: u64) -> Self {
        let hash = (self.0 ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        let hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        Self(hash ^ (hash >> 29))
    }

    pub(super) fn place(self, place: Place) -> Self {
        self.word(place.index).word(u64::from(place.position))
    }

    /// A place or none; none differs from every place.
    pub(super) fn maybe(self, place: Option<Place>) -> Self {
        match place {
            Some(place) => self.word(1).place(place),
            None => self.word(0),
        }
    }

    pub(super) const fn finish(self) -> u64 {
        self.0
    }
}

pub(super) fn record_hash(channel: u64, record: &Archived) -> u64 {
    let [a, b] = [&record.key[..8], &record.key[8..]].map(|half| {
        let half = half.try_into().expect("a half of 16 bytes has 8");
        u64::from_le_bytes(half)
    });
    let flags = u64::from(record.ephemeral) << 32 | u64::from(record.presence);
    let sizes = u64::from(record.count) << 33 | flags;
    Mixer::new(channel)
        .place(record.first)
        .place(record.now)
        .word(record.stamp_ms)
        .word(u64::from(record.retention_s) << 32 | u64::from(record.bytes))
        .word(sizes)
        .word(a)
        .word(b)
        .finish()
}
