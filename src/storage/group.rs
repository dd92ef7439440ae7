//! One group's state in memory: where each entry lies, and the payloads of recent ones.
//!
//! 16 bytes per entry, plus the payload while it is recent. Changes here are visible at once; the writer follows.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Mutex;

use bytes::Bytes;

use crate::storage::{Entry, LogId};

#[derive(Debug)]
pub(super) struct Group {
    pub(super) number: u32,
    pub(super) state: Mutex<State>,
}

/// Entries `first .. first + slots.len()` exist; `recent` belongs to the last of them, `leaders` covers all.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
    /// Index of the first slot; meaningful while there is one.
    first: u64,
    slots: VecDeque<Slot>,
    /// The first entry of each stretch that one leader wrote in one term. One may start before `first`.
    leaders: VecDeque<LogId>,
    recent: VecDeque<Recent>,
    /// Counts entries ever appended, so that a place or eviction of an entry truncated since finds nothing.
    stamp: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) segment: u32,
    pub(super) offset: u32,
    pub(super) length: u32,
    pub(super) kind: u8,
}

#[derive(Debug)]
struct Recent {
    stamp: u64,
    payload: Bytes,
}

/// An entry that a reader asked for: whole, or where to read its payload.
#[derive(Debug)]
pub(super) enum Found {
    Here(Entry),
    There(LogId, Slot),
}

impl State {
    /// A group as found on the disk; the entries have no holes.
    pub(super) fn recovered(
        vote: Option<Bytes>,
        committed: Option<LogId>,
        purged: Option<LogId>,
        entries: impl Iterator<Item = (LogId, Slot)>,
    ) -> Self {
        let mut state = Self {
            vote,
            committed,
            purged,
            ..Self::default()
        };
        for (id, slot) in entries {
            state.push(id, slot);
        }
        state
    }

    pub(super) fn first(&self) -> Option<u64> {
        (!self.slots.is_empty()).then_some(self.first)
    }

    /// One past the last index.
    fn end(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    /// The newest entry, or the purge mark when there is none.
    pub(super) fn last(&self) -> Option<LogId> {
        match self.slots.is_empty() {
            true => self.purged,
            false => self.id(self.end() - 1),
        }
    }

    /// The id of an entry that exists.
    pub(super) fn id(&self, index: u64) -> Option<LogId> {
        let exists = !self.slots.is_empty() && (self.first..self.end()).contains(&index);
        if !exists {
            return None;
        }
        let run = self.leaders.partition_point(|start| start.index <= index);
        let start = self.leaders.get(run.checked_sub(1)?)?;
        Some(LogId { index, ..*start })
    }

    /// The first existing entry of each leader, in order, and nothing else.
    pub(super) fn leader_starts(&self) -> Vec<LogId> {
        let clip = |id: &LogId| LogId {
            index: id.index.max(self.first),
            ..*id
        };
        self.leaders.iter().map(clip).collect()
    }

    /// Adds entries whose place is not known yet and returns the stamp of the first.
    /// `InvalidInput` when they would leave a hole or overwrite; nothing is added then.
    pub(super) fn append(&mut self, entries: &[Entry]) -> io::Result<u64> {
        let mut next = self.last().map(|id| id.index + 1);
        for entry in entries {
            let index = entry.id.index;
            let expected = next.unwrap_or(index);
            if index != expected {
                return Err(invalid(format!(
                    "entry {index} cannot follow: the next index is {expected}"
                )));
            }
            next = Some(
                index
                    .checked_add(1)
                    .ok_or_else(|| invalid("index is too large"))?,
            );
        }
        let stamp = self.stamp;
        for entry in entries {
            let unplaced = Slot {
                segment: u32::MAX,
                offset: 0,
                length: u32::try_from(entry.payload.len()).map_err(invalid)?,
                kind: entry.kind,
            };
            self.push(entry.id, unplaced);
            self.recent.push_back(Recent {
                stamp: self.stamp,
                payload: entry.payload.clone(),
            });
            self.stamp += 1;
        }
        Ok(stamp)
    }

    fn push(&mut self, id: LogId, slot: Slot) {
        if self.slots.is_empty() {
            self.first = id.index;
            self.leaders.clear();
        }
        let same = |run: &LogId| (run.term, run.node) == (id.term, id.node);
        if !self.leaders.back().is_some_and(same) {
            self.leaders.push_back(id);
        }
        self.slots.push_back(slot);
    }

    /// The entries with these consecutive stamps were written at these places. Those truncated since are left out.
    pub(super) fn place(&mut self, stamp: u64, places: &[(u32, u32)]) {
        let oldest = self.slots.len() - self.recent.len();
        let from = self.recent.partition_point(|recent| recent.stamp < stamp);
        let recent = self.recent.iter().skip(from);
        for (recent, slot) in recent.zip(self.slots.iter_mut().skip(oldest + from)) {
            let at = usize::try_from(recent.stamp - stamp).ok();
            let Some((segment, offset)) = at.and_then(|at| places.get(at)) else {
                break;
            };
            (slot.segment, slot.offset) = (*segment, *offset);
        }
    }

    /// Forgets the payload of the entry with this stamp, if it is still in memory. Evictions come in stamp order.
    pub(super) fn evict(&mut self, stamp: u64) {
        if self
            .recent
            .front()
            .is_some_and(|recent| recent.stamp == stamp)
        {
            self.recent.pop_front();
        }
    }

    /// Removes entries behind `keep`, or all. Returns the last one left (or the purge mark), and whether anything
    /// was removed. `InvalidInput` when `keep` lies before what was purged.
    pub(super) fn truncate(&mut self, keep: Option<u64>) -> io::Result<(Option<LogId>, bool)> {
        let purged = self.purged.map(|id| id.index);
        if keep.is_some() && keep < purged {
            return Err(invalid(format!(
                "cannot truncate to {keep:?}: purged up to {purged:?}"
            )));
        }
        let end = keep.map_or(0, |index| index.saturating_add(1));
        let removed = !self.slots.is_empty() && end < self.end();
        if removed {
            let left =
                usize::try_from(end.saturating_sub(self.first)).expect("fewer than are in memory");
            let old = self.slots.len() - self.recent.len();
            self.recent.truncate(left.saturating_sub(old));
            self.slots.truncate(left);
            self.leaders
                .truncate(self.leaders.partition_point(|start| start.index < end));
        }
        Ok((self.last(), removed))
    }

    /// Removes entries up to `upto`; `false` when that was purged before.
    pub(super) fn purge(&mut self, upto: LogId) -> bool {
        if self.purged.is_some_and(|id| id.index >= upto.index) {
            return false;
        }
        self.purged = Some(upto);
        let gone = (upto.index + 1).saturating_sub(self.first);
        let gone = usize::try_from(gone)
            .unwrap_or(usize::MAX)
            .min(self.slots.len());
        let kept = self.slots.len() - gone;
        self.slots.drain(..gone);
        self.recent.drain(..self.recent.len().saturating_sub(kept));
        self.first += gone as u64;
        let dead = self
            .leaders
            .partition_point(|start| start.index <= self.first);
        self.leaders.drain(..dead.saturating_sub(1));
        if self.slots.is_empty() {
            self.leaders.clear();
        }
        true
    }

    /// What exists of `range`, from its first existing index on, stopping before `max_bytes` of payload would be
    /// passed, but not before the first entry.
    pub(super) fn find(&self, range: Range<u64>, max_bytes: usize) -> Vec<Found> {
        let mut found = Vec::new();
        let mut bytes = 0;
        let old = self.slots.len() - self.recent.len();
        for index in range.start.max(self.first)..range.end.min(self.end()) {
            let Some(id) = self.id(index) else { break };
            let at = usize::try_from(index - self.first).expect("fewer than are in memory");
            let slot = self.slots[at];
            bytes += slot.length as usize;
            if bytes > max_bytes && !found.is_empty() {
                break;
            }
            found.push(
                match at.checked_sub(old).and_then(|at| self.recent.get(at)) {
                    Some(recent) => Found::Here(Entry {
                        id,
                        kind: slot.kind,
                        payload: recent.payload.clone(),
                    }),
                    None => Found::There(id, slot),
                },
            );
        }
        found
    }
}

pub(super) fn invalid(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}
