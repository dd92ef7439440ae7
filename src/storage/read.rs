//! Reading entries: from memory, or with few reads from the files. No lock is held while a file is read.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;

use crate::storage::frame::{self, Frame, Kind};
use crate::storage::group::{Found, Group};
use crate::storage::group_log::GroupLog;
use crate::storage::index::{Index, Slot};
use crate::storage::layout::{Part, Where};
use crate::storage::leaders::Leaders;
use crate::storage::log::Shared;
use crate::storage::segment::{self, Segment};
use crate::storage::{Damaged, Entry, LogId, locked, scan};
use crate::types::GroupId;

/// Entries are read together while all of them take at most this much, ...
const TOGETHER: u64 = 1 << 20;
/// ... and less than this lies between two of them.
const BETWEEN: u64 = 16 << 10;

/// An entry to be read from a file. While the segment is held, its file is not written anew.
struct Wanted {
    id: LogId,
    segment: Arc<Segment>,
    slot: Slot,
    repaired: bool,
}

enum Taken {
    Here(Entry),
    There(Wanted),
}

/// Why a part cannot be used as it is.
enum Unusable {
    /// Its index was made anew: look again.
    Changed,
    Failed(io::Error),
}

impl GroupLog {
    /// Entries of `range` in order, from the first that exists on, until `max_bytes` of payload are reached; at
    /// least one if there is one. Recent ones come from memory, others from disk, which may block.
    ///
    /// # Errors
    /// `InvalidData` with [`Damaged`] inside when an entry's bytes on disk are not what was written, or are known to
    /// be lost. From then on, at the latest, the entry is one of [`GroupLog::holes`].
    pub fn read(&self, range: Range<u64>, max_bytes: usize) -> io::Result<Vec<Entry>> {
        loop {
            let taken = match self.take(range.clone(), max_bytes) {
                Ok(taken) => taken,
                // An index is made anew once.
                Err(Unusable::Changed) => continue,
                Err(Unusable::Failed(error)) => return Err(error),
            };
            return self.fetch(taken);
        }
    }

    /// Payload bytes of all entries that exist. Reads an index when entries of its segment were purged or truncated
    /// since this was last asked for.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        loop {
            let part = match locked(&self.group.state).bytes() {
                Ok(bytes) => return bytes,
                Err(part) => part,
            };
            let segment = self.shared().segments().get(&part.segment).cloned();
            let index = segment.map(|segment| self.shared().index(&self.group, &segment, &part));
            match index {
                Some(Ok(index)) => {
                    let bytes = index.bytes(part.first, part.last);
                    locked(&self.group.state).set_bytes(&part, bytes);
                }
                Some(Err(Unusable::Changed)) => {}
                // A rough number: nobody can say better as long as this cannot be read.
                Some(Err(Unusable::Failed(_))) | None => {
                    locked(&self.group.state).set_bytes(&part, 0);
                }
            }
        }
    }

    /// Everything to be returned, with what must be read for it.
    fn take(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Taken>, Unusable> {
        let mut taken = Vec::new();
        let mut left = max_bytes as u64;
        // The first one is taken whatever its size.
        let mut fits = |taken: &[Taken], length: u64| {
            let fits = taken.is_empty() || length <= left;
            left = left.saturating_sub(length);
            fits
        };
        for (found, segment) in self.find(range, max_bytes).map_err(Unusable::Failed)? {
            match (found, segment) {
                (Found::Here(entry), _) => {
                    if !fits(&taken, entry.payload.len() as u64) {
                        break;
                    }
                    taken.push(Taken::Here(entry));
                }
                (Found::There(id, placed, repaired), Some(segment)) => {
                    let slot = placed.slot;
                    if !fits(&taken, u64::from(slot.length)) {
                        break;
                    }
                    taken.push(Taken::There(Wanted {
                        id,
                        segment,
                        slot,
                        repaired,
                    }));
                }
                (Found::Sealed(part, range, leaders), Some(segment)) => {
                    let index = self.shared().index(&self.group, &segment, &part)?;
                    for at in range {
                        let wanted = wanted(&index, at, &leaders, &segment, part.repaired);
                        let wanted = wanted.map_err(Unusable::Failed)?;
                        if !fits(&taken, u64::from(wanted.slot.length)) {
                            return Ok(taken);
                        }
                        taken.push(Taken::There(wanted));
                    }
                }
                (Found::Lost(range), _) => {
                    let what = "its bytes were lost".to_owned();
                    let group = GroupId(self.group.number);
                    let damaged = Damaged { group, range, what };
                    return Err(Unusable::Failed(damaged.into()));
                }
                (Found::There(..) | Found::Sealed(..), None) => {
                    let what = "an entry has no segment";
                    return Err(Unusable::Failed(io::Error::other(what)));
                }
            }
        }
        Ok(taken)
    }

    /// Collects what memory has, and files for the rest.
    fn find(
        &self,
        range: Range<u64>,
        max_bytes: usize,
    ) -> io::Result<Vec<(Found, Option<Arc<Segment>>)>> {
        let state = locked(&self.group.state);
        let found = state.find(range, max_bytes);
        let segments = self.shared().segments();
        let with_file = |found| {
            let number = match &found {
                Found::There(_, placed, _) => placed.segment,
                Found::Sealed(part, ..) => part.segment,
                Found::Here(_) | Found::Lost(_) => return Ok((found, None)),
            };
            let segment = segments.get(&number).cloned();
            let segment = segment.ok_or_else(|| {
                io::Error::other(format!("segment {} is gone", segment::name(number)))
            })?;
            Ok((found, Some(segment)))
        };
        found.into_iter().map(with_file).collect()
    }

    fn fetch(&self, taken: Vec<Taken>) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::with_capacity(taken.len());
        let mut run: Vec<Wanted> = Vec::new();
        for taken in taken {
            match taken {
                Taken::Here(entry) => {
                    self.fetch_run(&mut run, &mut entries)?;
                    entries.push(entry);
                }
                Taken::There(wanted) => {
                    if !run.is_empty() && !joins(&run, &wanted) {
                        self.fetch_run(&mut run, &mut entries)?;
                    }
                    run.push(wanted);
                }
            }
        }
        self.fetch_run(&mut run, &mut entries)?;
        Ok(entries)
    }

    /// Reads entries that lie close together at once, or each alone when that fails.
    fn fetch_run(&self, run: &mut Vec<Wanted>, entries: &mut Vec<Entry>) -> io::Result<()> {
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            return Ok(());
        };
        let start = first.slot.offset;
        let size = last.slot.end() - u64::from(start);
        let together = match run.len() {
            1 => None,
            _ => {
                let size = usize::try_from(size).map_err(io::Error::other)?;
                let read = first.segment.file.read_new(size, u64::from(start));
                read.ok().map(Bytes::from)
            }
        };
        for wanted in run.drain(..) {
            let whole = match &together {
                Some(together) => {
                    let from = (wanted.slot.offset - start) as usize;
                    let size = frame::HEADER + wanted.slot.length as usize;
                    Ok(together.slice(from..from + size))
                }
                None => read_alone(&wanted),
            };
            entries.push(self.shared().entry(&self.group, &wanted, whole)?);
        }
        Ok(())
    }
}

fn wanted(
    index: &Index,
    at: u64,
    leaders: &Leaders,
    segment: &Arc<Segment>,
    repaired: bool,
) -> io::Result<Wanted> {
    let (Some(slot), Some(id)) = (index.slot(at), leaders.id(at)) else {
        return Err(io::Error::other(format!("entry {at} is in no index")));
    };
    let segment = segment.clone();
    Ok(Wanted {
        id,
        segment,
        slot,
        repaired,
    })
}

fn joins(run: &[Wanted], next: &Wanted) -> bool {
    let (first, last) = (&run[0], &run[run.len() - 1]);
    let offset = u64::from(next.slot.offset);
    Arc::ptr_eq(&first.segment, &next.segment)
        && offset >= last.slot.end()
        && offset - last.slot.end() < BETWEEN
        && next.slot.end() - u64::from(first.slot.offset) <= TOGETHER
}

fn read_alone(wanted: &Wanted) -> io::Result<Bytes> {
    let Slot { offset, length, .. } = wanted.slot;
    wanted.segment.read(offset, length).map(Bytes::from)
}

impl Slot {
    /// Where its frame ends.
    fn end(&self) -> u64 {
        u64::from(self.offset) + frame::HEADER as u64 + u64::from(self.length)
    }
}

/// Whether a failed read means that the bytes are lost, rather than that this process could not read just now.
fn is_damage(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, OutOfMemory, TimedOut, WouldBlock};
    !matches!(
        error.kind(),
        Interrupted | OutOfMemory | TimedOut | WouldBlock
    )
}

impl Shared {
    /// The entry in a frame, of which everything is verified. One that is not there becomes a hole.
    fn entry(&self, group: &Group, wanted: &Wanted, whole: io::Result<Bytes>) -> io::Result<Entry> {
        let Wanted {
            id,
            segment,
            slot,
            repaired,
        } = wanted;
        let expected = Frame {
            kind: match repaired {
                true => Kind::Repaired,
                false => Kind::Entry,
            },
            tag: slot.kind,
            group: group.number,
            id: *id,
            payload: &[],
        };
        let why = match &whole {
            Ok(bytes) => match segment.verify(bytes, expected) {
                Ok(()) => {
                    let payload = bytes.slice(frame::HEADER..);
                    return Ok(Entry {
                        id: *id,
                        kind: slot.kind,
                        payload,
                    });
                }
                Err(why) => why,
            },
            Err(error) if !is_damage(error) => {
                return Err(io::Error::new(error.kind(), error.to_string()));
            }
            Err(error) => error.to_string(),
        };
        let (file, offset) = (segment::name(segment.number), slot.offset);
        let range = id.index..id.index + 1;
        segment.damaged.store(true, Relaxed);
        if locked(&group.state).damage(*id, segment.number) {
            self.report(
                group,
                range.clone(),
                &format!("segment {file} at byte {offset}: {why}"),
            );
        }
        let damaged = Damaged {
            group: GroupId(group.number),
            range,
            what: format!("segment {file} at byte {offset}: {why}"),
        };
        Err(damaged.into())
    }

    /// Tells everybody of new holes.
    fn report(&self, group: &Group, range: Range<u64>, what: &str) {
        tracing::error!(
            group = group.number,
            first = range.start,
            last = range.end - 1,
            what,
            "entries of the log are unreadable"
        );
        let callback = locked(&self.on_damage).clone();
        if let Some(callback) = callback {
            callback(GroupId(group.number), range);
        }
    }

    /// The index of a part: from memory, or read, or made anew from the segment's frames.
    fn index(&self, group: &Group, segment: &Segment, part: &Part) -> Result<Arc<Index>, Unusable> {
        let (at, length) = match &part.index {
            Where::Memory(index) => return Ok(index.clone()),
            Where::Frame { at, length } => (*at, *length),
        };
        let key = (segment.number, at);
        if let Some(index) = locked(&self.indexes).find(key) {
            return Ok(index);
        }
        let why = match read_index(group, segment, part, at, length) {
            Ok(index) => {
                let index = Arc::new(index);
                locked(&self.indexes).keep(key, index.clone());
                return Ok(index);
            }
            Err(error) if !is_damage(&error) => return Err(Unusable::Failed(error)),
            Err(error) => error.to_string(),
        };
        tracing::error!(
            segment = segment.number,
            at,
            why,
            "an index is unreadable; reading the whole segment"
        );
        let (first, last) = (part.first, part.last);
        let known: Leaders = (locked(&group.state).leaders_of(first, last))
            .into_iter()
            .collect();
        let instead = scan::rebuild(segment, group.number, part, &known);
        let news = locked(&group.state).reindex(part, &instead);
        for range in news {
            self.report(group, range, "neither they nor their index can be read");
        }
        Err(Unusable::Changed)
    }

    /// Reads those entries of a segment whose frames lie in `bytes` of it. Those that are bad become holes.
    /// Returns how many did.
    pub(super) fn check(&self, segment: &Arc<Segment>, bytes: &Range<u64>) -> u64 {
        let mut bad = 0;
        for group in self.all_groups() {
            let before = locked(&group.state).holes().len();
            while self.check_group(&group, segment, bytes).is_err() {}
            bad += locked(&group.state).holes().len().saturating_sub(before);
        }
        bad
    }

    /// `Err` when an index was made anew.
    fn check_group(
        &self,
        group: &Group,
        segment: &Arc<Segment>,
        bytes: &Range<u64>,
    ) -> Result<(), ()> {
        let parts: Vec<Part> = {
            let state = locked(&group.state);
            let parts = state.sealed().parts();
            parts
                .filter(|part| part.segment == segment.number)
                .cloned()
                .collect()
        };
        for part in parts {
            let index = match self.index(group, segment, &part) {
                Ok(index) => index,
                Err(Unusable::Changed) => return Err(()),
                Err(Unusable::Failed(_)) => continue,
            };
            for at in part.first..=part.last {
                let Some(slot) = index.slot(at) else { continue };
                if slot.end() <= bytes.start || u64::from(slot.offset) >= bytes.end {
                    continue;
                }
                let id = {
                    let state = locked(&group.state);
                    let there = state.holes().at(at).is_none() && !state.is_patched(at);
                    there.then(|| state.id(at)).flatten()
                };
                if let Some(id) = id {
                    let (segment, repaired) = (segment.clone(), part.repaired);
                    let wanted = Wanted {
                        id,
                        segment,
                        slot,
                        repaired,
                    };
                    // What is wrong was reported.
                    drop(self.entry(group, &wanted, read_alone(&wanted)));
                }
            }
        }
        Ok(())
    }
}

fn read_index(
    group: &Group,
    segment: &Segment,
    part: &Part,
    at: u32,
    length: u32,
) -> io::Result<Index> {
    let bad = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let bytes = segment.read(at, length)?;
    let index = Index::decode(&bytes[frame::HEADER..]);
    let index = index.ok_or_else(|| bad("not an index".to_owned()))?;
    segment
        .verify(
            &bytes,
            index_frame(group.number, part.repaired, index.first),
        )
        .map_err(bad)?;
    match index.slot(part.first).and(index.slot(part.last)) {
        Some(_) => Ok(index),
        None => Err(bad("the index does not cover its part".to_owned())),
    }
}

/// The frame of an index, without its payload.
pub(super) fn index_frame(group: u32, repaired: bool, first: u64) -> Frame<'static> {
    Frame {
        tag: u8::from(repaired),
        group,
        id: LogId {
            index: first,
            ..Frame::NO_ID
        },
        ..Frame::bare(Kind::Index)
    }
}
