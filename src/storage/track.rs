//! What the files written so far say about one group: what the writer repeats at each segment's head, and which
//! segments the group's entries lie in. Runs behind the group's state in memory by what still waits to be written.
//! Reading the newest segment at start leads to the same values as writing it did.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::storage::LogId;
use crate::storage::frame::{Frame, Kind};
use crate::storage::index::{Index, Slot};
use crate::storage::leaders::{self, Leaders};

#[derive(Debug, Default)]
pub(super) struct Track {
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
    /// First index and last id of the entries that exist.
    pub(super) span: Option<(u64, LogId)>,
    /// Of all entries that exist, even if they cannot be read: tells a stale entry from the one that counts.
    pub(super) leaders: Leaders,
    /// Stretches of existing entries in sealed segments, in no order. They may overlap where entries were repaired.
    pub(super) sealed: Vec<Stretch>,
    pub(super) sheet: Sheet,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    pub(super) segment: u32,
    pub(super) first: u64,
    pub(super) last: u64,
}

/// What exists in the active segment: the last entries of the group, and replacements for any others.
#[derive(Debug, Default)]
pub(super) struct Sheet {
    /// Index of the first slot; meaningful while there is one.
    pub(super) first: u64,
    pub(super) slots: VecDeque<Slot>,
    pub(super) repaired: BTreeMap<u64, Slot>,
}

impl Track {
    /// An entry was written to the active segment. Its index follows the last one.
    pub(super) fn append(&mut self, id: LogId, slot: Slot) {
        let first = self.span.map_or(id.index, |(first, _)| first);
        if self.span.is_none() {
            self.leaders.clear();
        }
        self.span = Some((first, id));
        self.leaders.push(id);
        if self.sheet.slots.is_empty() {
            self.sheet.first = id.index;
        }
        self.sheet.slots.push_back(slot);
    }

    /// A replacement was written to the active segment. Ignored when the entry no longer exists.
    pub(super) fn repair(&mut self, id: LogId, slot: Slot) {
        let exists = self
            .span
            .is_some_and(|(first, last)| (first..=last.index).contains(&id.index));
        if exists && self.leaders.id(id.index) == Some(id) {
            self.sheet.repaired.insert(id.index, slot);
        }
    }

    /// Only entries up to `keep` remain.
    pub(super) fn truncate(&mut self, keep: Option<LogId>) {
        let end = keep.map_or(0, |id| id.index.saturating_add(1));
        self.span = match (self.span, keep) {
            (Some((first, _)), Some(keep)) if first <= keep.index => Some((first, keep)),
            _ => None,
        };
        self.leaders.truncate(end);
        self.sealed.retain_mut(|stretch| {
            stretch.last = stretch.last.min(end.saturating_sub(1));
            stretch.first < end
        });
        let left = end.saturating_sub(self.sheet.first);
        self.sheet
            .slots
            .truncate(usize::try_from(left).unwrap_or(usize::MAX));
        self.sheet.repaired.split_off(&end);
    }

    /// Entries up to `upto` are gone.
    pub(super) fn purge(&mut self, upto: LogId) {
        let first = upto.index.saturating_add(1);
        self.purged = Some(upto);
        self.span = match self.span {
            Some((before, last)) if last.index > upto.index => Some((before.max(first), last)),
            _ => None,
        };
        self.leaders.purge(first);
        self.sealed.retain_mut(|stretch| {
            stretch.first = stretch.first.max(first);
            stretch.last >= first
        });
        let gone = usize::try_from(first.saturating_sub(self.sheet.first))
            .unwrap_or(usize::MAX)
            .min(self.sheet.slots.len());
        self.sheet.slots.drain(..gone);
        self.sheet.first += gone as u64;
        self.sheet.repaired = self.sheet.repaired.split_off(&first);
    }

    /// Sealed segments that hold entries which still exist.
    pub(super) fn segments(&self) -> impl Iterator<Item = u32> {
        self.sealed.iter().map(|stretch| stretch.segment)
    }

    /// Whether entries exist that no known segment holds.
    pub(super) fn has_holes(&self) -> bool {
        let Some((mut next, last)) = self.span else {
            return false;
        };
        let Sheet {
            first,
            slots,
            repaired,
        } = &self.sheet;
        let sealed = self.sealed.iter().map(|part| part.first..part.last + 1);
        let active = *first..first + slots.len() as u64;
        let repaired = repaired.keys().map(|index| *index..index + 1);
        let mut held: Vec<_> = sealed.chain([active]).chain(repaired).collect();
        held.retain(|held| !held.is_empty());
        held.sort_unstable_by_key(|held| held.start);
        for held in held {
            if held.start > next {
                return true;
            }
            next = next.max(held.end);
        }
        next <= last.index
    }

    /// The frames that repeat this state at a segment's head.
    pub(super) fn for_each_frame(&self, group: u32, mut put: impl FnMut(Frame<'_>)) {
        if let Some(vote) = &self.vote {
            put(Frame {
                group,
                payload: vote,
                ..Frame::bare(Kind::Vote)
            });
        }
        if self.committed.is_some() {
            put(Frame::mark(Kind::Committed, group, self.committed));
        }
        if self.purged.is_some() {
            put(Frame::mark(Kind::Purge, group, self.purged));
        }
        let mut payload = Vec::new();
        if let Some((first, last)) = self.span {
            payload.extend_from_slice(&first.to_le_bytes());
            leaders::put(&mut payload, &self.leaders.of(first, last.index));
        }
        put(Frame {
            payload: &payload,
            ..Frame::mark(Kind::Span, group, self.span.map(|(_, last)| last))
        });
    }

    /// Takes over what a frame written by [`Track::for_each_frame`] says about the group's entries.
    pub(super) fn set_span(&mut self, frame: &Frame<'_>) -> Result<(), &'static str> {
        self.span = None;
        self.leaders.clear();
        let Some(last) = frame.marked() else {
            return Ok(());
        };
        let Some((first, mut rest)) = frame.payload.split_first_chunk() else {
            return Err("the span of a group has no first index");
        };
        let starts = leaders::take(&mut rest).filter(|_| rest.is_empty());
        let starts = starts.ok_or("the span of a group has no leaders")?;
        self.span = Some((u64::from_le_bytes(*first), last));
        self.leaders = starts.into_iter().collect();
        Ok(())
    }
}

impl Sheet {
    /// Indexes of what exists here, and whether it is repaired.
    pub(super) fn indexes(&self) -> Vec<(bool, Index)> {
        let mut indexes = Vec::new();
        if !self.slots.is_empty() {
            let slots = self.slots.iter().copied().collect();
            let first = self.first;
            indexes.push((false, Index { first, slots }));
        }
        let repaired = consecutive(self.repaired.iter().map(|(index, slot)| (*index, *slot)));
        indexes.extend(repaired.into_iter().map(|index| (true, index)));
        indexes
    }
}

/// One index for each stretch of consecutive entries. They come in order.
pub(super) fn consecutive(slots: impl Iterator<Item = (u64, Slot)>) -> Vec<Index> {
    let mut indexes: Vec<Index> = Vec::new();
    for (first, slot) in slots {
        match indexes.last_mut() {
            Some(index) if index.first + index.slots.len() as u64 == first => {
                index.slots.push(slot);
            }
            _ => indexes.push(Index {
                first,
                slots: vec![slot],
            }),
        }
    }
    indexes
}
