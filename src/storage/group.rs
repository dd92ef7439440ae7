//! One group's state in memory: where its entries lie, and the payloads of recent ones.
//!
//! A few numbers per sealed segment, 16 bytes per entry of the active one, plus the payload while it is recent.
//! Changes here are visible at once; the writer follows.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Mutex;

use bytes::Bytes;

use crate::storage::index::Slot;
use crate::storage::layout::{Holes, Layout, Part};
use crate::storage::leaders::Leaders;
use crate::storage::{Entry, LogId};

#[derive(Debug)]
pub(super) struct Group {
    pub(super) number: u32,
    pub(super) state: Mutex<State>,
}

/// Entries `first..end` exist. Those from `active` on have a slot each; those before lie in `sealed`, unless they are
/// in `holes`. `patches` come before both. `recent` belongs to the last entries, `leaders` covers all.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
    first: u64,
    end: u64,
    leaders: Leaders,
    sealed: Layout,
    active: u64,
    slots: VecDeque<Placed>,
    /// Payload bytes of `slots`.
    active_bytes: u64,
    /// Repaired entries whose replacement lies in the active segment.
    patches: BTreeMap<u64, Placed>,
    holes: Holes,
    recent: VecDeque<Recent>,
    /// Counts entries ever appended, so that a place or eviction of an entry truncated since finds nothing.
    stamp: u64,
}

/// A slot and the segment it is in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placed {
    pub(super) segment: u32,
    pub(super) slot: Slot,
}

#[derive(Debug)]
struct Recent {
    stamp: u64,
    kind: u8,
    payload: Bytes,
}

/// What a reader asked for, in order: whole, or where to find it.
#[derive(Debug)]
pub(super) enum Found {
    Here(Entry),
    /// In the active segment; the flag says whether it is a replacement.
    There(LogId, Placed, bool),
    /// The entries of this range lie in a part of a sealed segment; their leaders.
    Sealed(Part, Range<u64>, Leaders),
    /// These entries cannot be read. The last one found.
    Lost(Range<u64>),
}

/// A group as found on the disk. Entries from the end of `sealed` on have slots.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
    pub(super) span: Option<(u64, LogId)>,
    pub(super) leaders: Leaders,
    pub(super) sealed: Layout,
    pub(super) slots: VecDeque<Placed>,
    pub(super) patches: BTreeMap<u64, Placed>,
    pub(super) holes: Holes,
}

impl State {
    pub(super) fn recovered(found: Recovered) -> Self {
        let (first, end) = found
            .span
            .map_or((0, 0), |(first, last)| (first, last.index + 1));
        Self {
            vote: found.vote,
            committed: found.committed,
            purged: found.purged,
            first,
            end,
            leaders: found.leaders,
            sealed: found.sealed,
            active: end - found.slots.len() as u64,
            active_bytes: found.slots.iter().map(Placed::bytes).sum(),
            slots: found.slots,
            patches: found.patches,
            holes: found.holes,
            recent: VecDeque::new(),
            stamp: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.first == self.end
    }

    pub(super) fn first(&self) -> Option<u64> {
        (!self.is_empty()).then_some(self.first)
    }

    /// The newest entry, or the purge mark when there is none.
    pub(super) fn last(&self) -> Option<LogId> {
        match self.is_empty() {
            true => self.purged,
            false => self.id(self.end - 1),
        }
    }

    /// The id of an entry that exists.
    pub(super) fn id(&self, index: u64) -> Option<LogId> {
        let exists = (self.first..self.end).contains(&index);
        exists.then(|| self.leaders.id(index)).flatten()
    }

    /// The first existing entry of each leader, in order, and nothing else.
    pub(super) fn leader_starts(&self) -> Vec<LogId> {
        match self.is_empty() {
            true => Vec::new(),
            false => self.leaders.of(self.first, self.end - 1),
        }
    }

    /// Who wrote the entries `first..=last`.
    pub(super) fn leaders_of(&self, first: u64, last: u64) -> Vec<LogId> {
        self.leaders.of(first, last)
    }

    /// Whether an entry was repaired, in the active segment.
    pub(super) fn is_patched(&self, index: u64) -> bool {
        self.patches.contains_key(&index)
    }

    pub(super) fn holes(&self) -> &Holes {
        &self.holes
    }

    pub(super) fn sealed(&self) -> &Layout {
        &self.sealed
    }

    /// The sealed segment that holds the first entry which can be read.
    pub(super) fn oldest_segment(&self) -> Option<u32> {
        self.sealed.from(self.first).map(|part| part.segment)
    }

    /// Payload bytes of all entries, as far as they are known, or a part for which they must be looked up.
    pub(super) fn bytes(&self) -> Result<u64, Part> {
        let mut sum = self.active_bytes;
        for part in self.sealed.parts() {
            sum += part.bytes.ok_or_else(|| part.clone())?;
        }
        let elsewhere = |index: &u64| *index < self.active && self.sealed.at(*index).is_none();
        let patches = self.patches.iter().filter(|(index, _)| elsewhere(index));
        Ok(sum + patches.map(|(_, placed)| placed.bytes()).sum::<u64>())
    }

    /// Remembers what was looked up for a part, unless it has changed since.
    pub(super) fn set_bytes(&mut self, of: &Part, bytes: u64) {
        let same = |part: &&mut Part| {
            (part.segment, part.first, part.last) == (of.segment, of.first, of.last)
        };
        if let Some(part) = self.sealed.parts_mut().find(same) {
            part.bytes = Some(bytes);
        }
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
            let slot = Slot {
                offset: 0,
                length: u32::try_from(entry.payload.len()).map_err(invalid)?,
                kind: entry.kind,
            };
            self.push(entry.id, slot);
            self.recent.push_back(Recent {
                stamp: self.stamp,
                kind: entry.kind,
                payload: entry.payload.clone(),
            });
            self.stamp += 1;
        }
        Ok(stamp)
    }

    fn push(&mut self, id: LogId, slot: Slot) {
        if self.is_empty() {
            (self.first, self.active) = (id.index, id.index);
            self.leaders.clear();
        }
        self.end = id.index + 1;
        self.leaders.push(id);
        let segment = u32::MAX;
        let unplaced = Placed { segment, slot };
        self.active_bytes += unplaced.bytes();
        self.slots.push_back(unplaced);
    }

    /// The entries with these consecutive stamps were written at these places. Those truncated since are left out.
    pub(super) fn place(&mut self, stamp: u64, places: &[(u32, u32)]) {
        let from = self.recent_at(stamp);
        let recent = self.recent.iter().skip(from);
        // Both end with the last entry, and what was handed in and not written yet is in both.
        let behind = (self.slots.len() + from).saturating_sub(self.recent.len());
        for (recent, placed) in recent.zip(self.slots.iter_mut().skip(behind)) {
            let at = usize::try_from(recent.stamp - stamp).ok();
            let Some((segment, offset)) = at.and_then(|at| places.get(at)) else {
                break;
            };
            (placed.segment, placed.slot.offset) = (*segment, *offset);
        }
    }

    /// Where the first recent entry of this stamp or a later one is.
    fn recent_at(&self, stamp: u64) -> usize {
        // Stamps follow each other but for what was truncated: nearly always the place is known without a search.
        let gap = self.stamp.saturating_sub(stamp);
        let guess = usize::try_from(gap).map_or(0, |gap| self.recent.len().saturating_sub(gap));
        match self.recent.get(guess) {
            Some(recent) if recent.stamp == stamp => guess,
            _ => self.recent.partition_point(|recent| recent.stamp < stamp),
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

    /// A segment was sealed, and these parts of it have indexes now. What was truncated or purged since is left out.
    pub(super) fn seal(&mut self, segment: u32, parts: &[Part]) {
        for part in parts {
            if part.repaired {
                self.seal_patches(segment, part);
                continue;
            }
            let placed = self.slots.iter();
            let count = placed
                .take_while(|placed| placed.segment == segment)
                .count();
            if count > 0 {
                let gone: u64 = self.slots.drain(..count).map(|placed| placed.bytes()).sum();
                self.active_bytes -= gone;
                let first = self.active;
                self.active += count as u64;
                self.sealed.append(part.clipped(first, self.active - 1));
            }
        }
    }

    fn seal_patches(&mut self, segment: u32, part: &Part) {
        let inside = self.patches.range(part.first..=part.last);
        let inside = inside.filter(|(_, placed)| placed.segment == segment);
        let indices: Vec<u64> = inside.map(|(index, _)| *index).collect();
        for run in indices.chunk_by(|before, next| before + 1 == *next) {
            self.sealed
                .overlay(part.clipped(run[0], run[run.len() - 1]));
            for index in run {
                self.patches.remove(index);
            }
        }
    }

    /// Whether these entries may be put where others were lost: `InvalidInput` unless each is one of those.
    pub(super) fn check_repair(&self, entries: &[Entry]) -> io::Result<()> {
        for Entry { id, .. } in entries {
            if self.holes.at(id.index).is_none() {
                return Err(invalid(format!("entry {} is not missing", id.index)));
            }
            if self.id(id.index) != Some(*id) {
                return Err(invalid(format!(
                    "entry {} must be {:?}, not {id:?}",
                    id.index,
                    self.id(id.index)
                )));
            }
        }
        Ok(())
    }

    /// A replacement is durable. Left out when the entry was removed since.
    pub(super) fn patch(&mut self, id: LogId, placed: Placed) {
        if self.id(id.index) == Some(id) && self.holes.at(id.index).is_some() {
            self.patches.insert(id.index, placed);
            self.holes.remove(id.index..id.index + 1);
        }
    }

    /// The entry could not be read from this segment. `true` when that is news.
    pub(super) fn damage(&mut self, id: LogId, segment: u32) -> bool {
        let index = id.index;
        let at = match self.patches.get(&index) {
            Some(placed) => Some(placed.segment),
            None => self.placed(index).map_or_else(
                || self.sealed.at(index).map(|part| part.segment),
                |placed| Some(placed.segment),
            ),
        };
        let news =
            self.id(index) == Some(id) && at == Some(segment) && self.holes.at(index).is_none();
        if news {
            self.patches.remove(&index);
            self.holes.add(index..index + 1);
        }
        news
    }

    /// The index of this part is unreadable; `instead` is what was found without it. Returns new holes.
    pub(super) fn reindex(&mut self, lost: &Part, instead: &[Part]) -> Vec<Range<u64>> {
        let Some(part) = self.sealed.at(lost.first) else {
            return Vec::new();
        };
        if (part.segment, part.repaired) != (lost.segment, lost.repaired) {
            return Vec::new();
        }
        let (first, last) = (part.first, part.last.min(lost.last));
        let mut found = Layout::default();
        for part in instead {
            let (first, last) = (part.first.max(first), part.last.min(last));
            if first <= last {
                found.append(part.clipped(first, last));
            }
        }
        let mut news = Holes::default();
        for index in found.gaps(first..last + 1).into_iter().flatten() {
            if self.holes.at(index).is_none() && !self.patches.contains_key(&index) {
                news.add(index..index + 1);
            }
        }
        news.ranges()
            .iter()
            .for_each(|hole| self.holes.add(hole.clone()));
        self.sealed.cut(lost, first, last);
        for part in found.parts() {
            self.sealed.overlay(part.clone());
        }
        news.ranges().to_vec()
    }

    /// The slot of an entry that is not in a sealed segment.
    fn placed(&self, index: u64) -> Option<Placed> {
        let at = usize::try_from(index.checked_sub(self.active)?).ok()?;
        self.slots.get(at).copied()
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
        let removed = !self.is_empty() && end < self.end;
        if removed {
            let gone = usize::try_from(self.end - end.max(self.first)).unwrap_or(usize::MAX);
            self.end = end.max(self.first);
            self.recent.truncate(self.recent.len().saturating_sub(gone));
            let left = self.slots.len().saturating_sub(gone);
            let dropped: u64 = self.slots.drain(left..).map(|placed| placed.bytes()).sum();
            self.active_bytes -= dropped;
            self.active = self.active.min(self.end);
            self.sealed.truncate(self.end);
            self.leaders.truncate(self.end);
            self.patches.split_off(&self.end);
            self.holes.remove(self.end..u64::MAX);
        }
        Ok((self.last(), removed))
    }

    /// Removes entries up to `upto`; `false` when that was purged before.
    pub(super) fn purge(&mut self, upto: LogId) -> bool {
        if self.purged.is_some_and(|id| id.index >= upto.index) {
            return false;
        }
        self.purged = Some(upto);
        if self.is_empty() {
            return true;
        }
        self.first = self.first.max(upto.index + 1).min(self.end);
        let kept = usize::try_from(self.end - self.first).unwrap_or(usize::MAX);
        self.recent.drain(..self.recent.len().saturating_sub(kept));
        let gone = self.slots.len().saturating_sub(kept);
        let dropped: u64 = self.slots.drain(..gone).map(|placed| placed.bytes()).sum();
        self.active_bytes -= dropped;
        self.active += gone as u64;
        self.sealed.purge(self.first);
        self.leaders.purge(self.first);
        self.patches = self.patches.split_off(&self.first);
        self.holes.remove(0..self.first);
        true
    }

    /// What exists of `range`, from its first existing index on, up to about `max_bytes` of payload as far as they
    /// are known here, and up to the first entry that cannot be read.
    pub(super) fn find(&self, range: Range<u64>, max_bytes: usize) -> Vec<Found> {
        let end = range.end.min(self.end);
        let recent = self.end - self.recent.len() as u64;
        let (mut found, mut bytes) = (Vec::new(), 0);
        let mut at = range.start.max(self.first);
        while at < end && (found.is_empty() || bytes <= max_bytes as u64) {
            let Some(id) = self.id(at) else { break };
            let mut next = at + 1;
            if at >= recent {
                let kept = usize::try_from(at - recent).unwrap_or(usize::MAX);
                let Recent { kind, payload, .. } = &self.recent[kept];
                bytes += payload.len() as u64;
                let (kind, payload) = (*kind, payload.clone());
                found.push(Found::Here(Entry { id, kind, payload }));
            } else if let Some(placed) = self.patches.get(&at) {
                bytes += placed.bytes();
                found.push(Found::There(id, *placed, true));
            } else if let Some(hole) = self.holes.at(at) {
                found.push(Found::Lost(hole.clone()));
                break;
            } else if let Some(placed) = self.placed(at) {
                bytes += placed.bytes();
                found.push(Found::There(id, placed, false));
            } else if let Some(part) = self.sealed.at(at) {
                let patch = self.patches.range(at..).next().map(|(index, _)| *index);
                let ends = [
                    Some(part.last + 1),
                    patch,
                    self.holes.next(at),
                    Some(recent),
                ];
                next = ends.into_iter().flatten().fold(end, u64::min);
                if (at, next) == (part.first, part.last + 1) {
                    bytes += part.bytes.unwrap_or(0);
                }
                let leaders = self.leaders.of(at, next - 1).into_iter().collect();
                found.push(Found::Sealed(part.clone(), at..next, leaders));
            } else {
                // Not reached: what lies nowhere is in a hole.
                found.push(Found::Lost(at..at + 1));
                break;
            }
            at = next;
        }
        found
    }
}

impl Placed {
    fn bytes(&self) -> u64 {
        u64::from(self.slot.length)
    }
}

pub(super) fn invalid(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}
