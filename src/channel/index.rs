//! One channel's index into the shard's log.

use std::collections::{BTreeMap, VecDeque};

use crate::types::{Range, Serial};

/// First 16 bytes of the SHA-256 of an idempotency key behind a byte that tells its kind.
pub(super) type KeyDigest = [u8; 16];

/// Where one retained record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordRef {
    pub serial: Serial,
    /// Serial of the record before it in the channel, retained or not; a reader that holds it has no gap.
    pub predecessor: Option<Serial>,
    /// Milliseconds since 1970, by the proposer's clock, never less than an earlier record's.
    pub stamp_ms: u64,
    /// Messages in the record.
    pub count: u32,
}

/// The reader's cursor lies before the oldest record that can still be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("records up to {floor} are no longer retained")]
pub struct Behind {
    /// Newest record that is gone.
    pub floor: Serial,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) serial: Serial,
    pub(super) stamp_ms: u64,
    pub(super) expires_ms: u64,
    pub(super) count: u32,
    pub(super) key: KeyDigest,
}

/// The retained records of a channel, oldest first.
///
/// Invariant: serials ascend strictly and are above `floor`; `head` is the newest record ever; `keys` holds
/// exactly the keys of `records`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) records: VecDeque<Held>,
    pub(super) keys: BTreeMap<KeyDigest, Serial>,
    pub(super) head: Option<Serial>,
    pub(super) floor: Option<Serial>,
    pub(super) forget_ms: u64,
}

impl Index {
    pub(super) fn push(&mut self, held: Held) {
        self.head = Some(held.serial);
        self.keys.insert(held.key, held.serial);
        self.records.push_back(held);
    }

    /// Drops the oldest records whose time is over. Retention is a prefix: a record never outlives an older
    /// one, so a channel whose rule was shortened loses its long-lived records first in order.
    pub(super) fn expire(&mut self, now_ms: u64) {
        while let Some(oldest) = self.records.pop_front_if(|held| held.expires_ms <= now_ms) {
            self.floor = Some(oldest.serial);
            self.keys.remove(&oldest.key);
        }
    }

    /// When something here next changes by time alone.
    pub(super) fn next_change_ms(&self) -> u64 {
        self.records
            .front()
            .map_or(self.forget_ms, |held| held.expires_ms)
    }

    /// Up to `limit` records after `cursor`, oldest first.
    pub(super) fn after(&self, cursor: Serial, limit: usize) -> Result<Vec<RecordRef>, Behind> {
        if let Some(floor) = self.floor.filter(|floor| cursor < *floor) {
            return Err(Behind { floor });
        }
        let start = self.records.partition_point(|held| held.serial <= cursor);
        let end = self.records.len().min(start.saturating_add(limit));
        Ok((start..end).map(|at| self.record(at)).collect())
    }

    /// Up to `limit` records within `range`, from the end that it names.
    pub(super) fn range(&self, range: &Range, limit: usize) -> Vec<RecordRef> {
        let below = |serial: Serial| self.records.partition_point(|held| held.serial < serial);
        let start = range.from.map_or(0, below);
        let start = start.max(
            self.records
                .partition_point(|held| held.stamp_ms < range.start_ms),
        );
        let end = range.to.map_or(self.records.len(), |to| {
            self.records.partition_point(|held| held.serial <= to)
        });
        let end = end.min(
            self.records
                .partition_point(|held| held.stamp_ms <= range.end_ms),
        );
        if start >= end {
            return Vec::new();
        }
        match range.newest_first {
            true => (start..end)
                .rev()
                .take(limit)
                .map(|at| self.record(at))
                .collect(),
            false => (start..end).take(limit).map(|at| self.record(at)).collect(),
        }
    }

    fn record(&self, at: usize) -> RecordRef {
        let held = &self.records[at];
        let predecessor = match at {
            0 => self.floor,
            at => Some(self.records[at - 1].serial),
        };
        RecordRef {
            serial: held.serial,
            predecessor,
            stamp_ms: held.stamp_ms,
            count: held.count,
        }
    }

    pub(super) fn check_invariants(&self) {
        let serials = || self.records.iter().map(|held| held.serial);
        assert!(serials().is_sorted_by(|a, b| a < b), "serials ascend");
        assert!(serials().all(|serial| Some(serial) > self.floor && Some(serial) <= self.head));
        assert_eq!(self.keys.len(), self.records.len(), "a key a record");
        for held in &self.records {
            assert_eq!(self.keys.get(&held.key), Some(&held.serial));
        }
    }
}
