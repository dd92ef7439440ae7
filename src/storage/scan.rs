//! What can be learned from a segment other than the newest: from its directory if that is whole, or else from every
//! frame that can still be read. Such a segment was durable before the next one began, so whatever is missing there
//! is damage; since votes and marks are repeated at later heads, entries are all that can be lost.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use crate::storage::disk::{Disk, DiskFile};
use crate::storage::frame::{self, Frame, Kind, Order, u64_at};
use crate::storage::index::{self, Slot};
use crate::storage::layout::{Part, Where};
use crate::storage::leaders::Leaders;
use crate::storage::segment::{self, BadHeader, Header, Segment};
use crate::storage::track::consecutive;
use crate::storage::{Error, LogId};

/// What the first attempt to read a broken file asks for, and how it goes on where that fails.
const PIECES: [usize; 2] = [1 << 20, 4096];

/// Where in a frame the incarnation stands.
const MARK: usize = 16;

/// A stretch of entries in a segment, and who wrote them.
#[derive(Debug)]
pub(super) struct Stretch {
    pub(super) group: u32,
    pub(super) part: Part,
    pub(super) leaders: Vec<LogId>,
}

/// Opens a sealed segment. Fails when that cannot be tried, or when it has another format.
pub(super) fn open(
    disk: &dyn Disk,
    dir: &Path,
    number: u32,
) -> Result<(Segment, Vec<Stretch>), Error> {
    let name = segment::name(number);
    let path = dir.join(&name);
    let file = disk.open(&name).map_err(Error::io("open", &path))?;
    let size = file.size().map_err(Error::io("measure", &path))?;
    let mut header = vec![0; segment::HEADER.min(usize::try_from(size).unwrap_or(usize::MAX))];
    let header = match file.read_at(&mut header, 0) {
        Ok(()) => Header::decode(&header),
        Err(_) => Err(BadHeader::Short),
    };
    let seal = seal(&*file, size, number);
    let incarnation = match header {
        Err(BadHeader::Version(found)) => {
            return Err(Error::version(path, found, segment::VERSION));
        }
        Ok(header) if header.number == u64::from(number) => header.incarnation,
        // A whole header of another segment: none of what is there belongs here.
        Ok(_) => 0,
        Err(_) => seal.map_or_else(|| by_first_frame(&*file), |seal| seal.incarnation),
    };
    let segment = Segment::new(number, incarnation, file).map_err(Error::io("measure", &path))?;
    let stretches = seal
        .filter(|seal| seal.incarnation == incarnation)
        .and_then(|seal| directory(&segment, seal));
    if header.is_err() || stretches.is_none() {
        segment.damaged.store(true, Relaxed);
        let bytes = read_what_can_be(&*segment.file, size);
        let found = contents(&bytes, &segment);
        tracing::warn!(file = %path.display(), "a sealed segment is damaged; what can be read of it is kept");
        return Ok((segment, found));
    }
    Ok((segment, stretches.unwrap_or_default()))
}

#[derive(Clone, Copy)]
struct Seal {
    incarnation: u64,
    at: u32,
    length: u32,
}

/// The seal at the end of the file, if it is that of this segment.
fn seal(file: &dyn DiskFile, size: u64, number: u32) -> Option<Seal> {
    let mut bytes = vec![0; frame::HEADER];
    file.read_at(&mut bytes, size.checked_sub(frame::HEADER as u64)?)
        .ok()?;
    let incarnation = u64_at(&bytes, 16);
    let (frame, _) = frame::decode(&bytes, incarnation).ok()?;
    let ours = frame.kind == Kind::Seal && frame.id.node == u64::from(number);
    ours.then_some(Seal {
        incarnation,
        at: u32::try_from(frame.id.index).ok()?,
        length: u32::try_from(frame.id.term).ok()?,
    })
}

/// The incarnation that a whole frame right behind the header has, or zero.
fn by_first_frame(file: &dyn DiskFile) -> u64 {
    let read = |length: usize| {
        let mut bytes = vec![0; length];
        file.read_at(&mut bytes, segment::HEADER as u64).ok()?;
        Some(bytes)
    };
    let found = || {
        let head = read(frame::HEADER)?;
        let length = frame::u32_at(&head, 0) as usize;
        let whole = (length <= frame::PAYLOAD_MAX).then(|| read(frame::HEADER + length))??;
        let incarnation = u64_at(&head, 16);
        frame::decode(&whole, incarnation).ok().map(|_| incarnation)
    };
    found().unwrap_or(0)
}

fn directory(segment: &Segment, seal: Seal) -> Option<Vec<Stretch>> {
    let bytes = segment.read(seal.at, seal.length).ok()?;
    segment.verify(&bytes, Frame::bare(Kind::Directory)).ok()?;
    let listed = index::listed(&bytes[frame::HEADER..])?;
    let stretch = |listed: index::Listed| Stretch {
        group: listed.group,
        part: Part {
            segment: segment.number,
            repaired: listed.repaired,
            first: listed.first,
            last: listed.last,
            bytes: Some(listed.bytes),
            index: Where::Frame {
                at: listed.at,
                length: listed.length,
            },
        },
        leaders: listed.leaders,
    };
    Some(listed.into_iter().map(stretch).collect())
}

/// The file's bytes, with zeros where the disk refuses to give them.
pub(super) fn read_what_can_be(file: &dyn DiskFile, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    for (big, piece) in bytes.chunks_mut(PIECES[0]).enumerate() {
        let start = (big * PIECES[0]) as u64;
        if file.read_at(piece, start).is_ok() {
            continue;
        }
        for (small, piece) in piece.chunks_mut(PIECES[1]).enumerate() {
            if file
                .read_at(piece, start + (small * PIECES[1]) as u64)
                .is_err()
            {
                piece.fill(0);
            }
        }
    }
    bytes
}

/// Calls `each` with every readable frame of the segment's present use, in order, up to its seal, and returns where
/// something else stands in between. `from` is where the first frame should begin.
pub(super) fn walk<'a>(
    bytes: &'a [u8],
    incarnation: u64,
    from: usize,
    mut each: impl FnMut(usize, &Frame<'a>),
) -> Vec<Range<usize>> {
    let mut unreadable = Vec::new();
    let mut order = Order::default();
    let mut at = from;
    while at < bytes.len() && incarnation != 0 {
        let Ok((frame, _)) = order.decode(bytes, at, incarnation) else {
            let next = resume(bytes, incarnation, at + 1);
            unreadable.push(at..next.unwrap_or(bytes.len()));
            at = next.unwrap_or(bytes.len());
            continue;
        };
        each(at, &frame);
        if frame.kind == Kind::Seal {
            return unreadable;
        }
        at += frame.size();
    }
    unreadable
}

/// Where the next readable frame begins.
pub(super) fn resume(bytes: &[u8], incarnation: u64, from: usize) -> Option<usize> {
    let mut at = from;
    loop {
        let mark = next_mark(bytes, incarnation, at + MARK)?;
        at = mark - MARK;
        if frame::decode(&bytes[at..], incarnation).is_ok() {
            return Some(at);
        }
        at += 1;
    }
}

/// Where the incarnation stands next, which may be in a frame.
pub(super) fn next_mark(bytes: &[u8], incarnation: u64, from: usize) -> Option<usize> {
    let mark = incarnation.to_le_bytes();
    let mut at = from;
    while let Some(rest) = bytes.get(at..).filter(|rest| rest.len() >= mark.len()) {
        // The lowest byte of an incarnation is not zero, so what was only written ahead is passed over in large steps.
        let step = |size: usize| &rest[..rest.len().min(size)];
        if let Some(none) = [4096, 64]
            .map(step)
            .into_iter()
            .find(|piece| !piece.contains(&mark[0]))
        {
            at += none.len();
            continue;
        }
        let piece = step(64 + mark.len() - 1);
        match piece.windows(mark.len()).position(|window| window == mark) {
            Some(place) => return Some(at + place),
            None => at += piece.len() - mark.len() + 1,
        }
    }
    None
}

#[derive(Default)]
struct Contents {
    entries: BTreeMap<u64, (LogId, Slot)>,
    repaired: BTreeMap<u64, (LogId, Slot)>,
}

impl Contents {
    fn truncate(&mut self, end: u64) {
        self.entries.split_off(&end);
        self.repaired.split_off(&end);
    }

    fn apply(&mut self, at: usize, frame: &Frame<'_>) {
        let (Ok(offset), Ok(length)) = (u32::try_from(at), u32::try_from(frame.payload.len()))
        else {
            return;
        };
        let kind = frame.tag;
        let slot = Slot {
            offset,
            length,
            kind,
        };
        let index = frame.id.index;
        match frame.kind {
            Kind::Entry => {
                // Also when the truncation before it cannot be read.
                self.truncate(index);
                self.entries.insert(index, (frame.id, slot));
            }
            Kind::Repaired => {
                self.repaired.insert(index, (frame.id, slot));
            }
            Kind::Truncate => {
                self.truncate(frame.marked().map_or(0, |id| id.index.saturating_add(1)));
            }
            Kind::Purge => {
                let first = index.saturating_add(1);
                self.entries = self.entries.split_off(&first);
                self.repaired = self.repaired.split_off(&first);
            }
            _ => {}
        }
    }

    fn stretches(&self, group: u32, segment: u32, found: &mut Vec<Stretch>) {
        for (repaired, slots) in [(false, &self.entries), (true, &self.repaired)] {
            for index in consecutive(slots.iter().map(|(index, (_, slot))| (*index, *slot))) {
                let (first, last) = (index.first, index.first + index.slots.len() as u64 - 1);
                let ids: Leaders = slots.range(first..=last).map(|(_, (id, _))| *id).collect();
                let part = Part {
                    segment,
                    repaired,
                    first,
                    last,
                    bytes: Some(index.bytes(first, last)),
                    index: Where::Memory(Arc::new(index)),
                };
                let leaders = ids.of(first, last);
                found.push(Stretch {
                    group,
                    part,
                    leaders,
                });
            }
        }
    }
}

/// The surviving entries that can be found without indexes. Some may be stale: those whose ids are not the known ones.
pub(super) fn contents(bytes: &[u8], segment: &Segment) -> Vec<Stretch> {
    let mut groups: HashMap<u32, Contents> = HashMap::new();
    walk(bytes, segment.incarnation, segment::HEADER, |at, frame| {
        groups.entry(frame.group).or_default().apply(at, frame);
    });
    let mut found = Vec::new();
    for (group, contents) in groups {
        contents.stretches(group, segment.number, &mut found);
    }
    found
}

/// Makes the index of a part anew from the frames of its segment. Entries that cannot be read are not in the result.
pub(super) fn rebuild(segment: &Segment, group: u32, of: &Part, leaders: &Leaders) -> Vec<Part> {
    segment.damaged.store(true, Relaxed);
    let bytes = read_what_can_be(&*segment.file, segment.file.size().unwrap_or(0));
    let mut parts = Vec::new();
    for stretch in contents(&bytes, segment) {
        if stretch.group == group && stretch.part.repaired == of.repaired {
            let Stretch {
                part,
                leaders: theirs,
                ..
            } = stretch;
            let agreeing = leaders.agreeing(&theirs, part.first, part.last);
            parts.extend(
                agreeing
                    .iter()
                    .map(|(first, last)| part.clipped(*first, *last)),
            );
        }
    }
    parts.sort_unstable_by_key(|part| part.first);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_found_wherever_it_stands() {
        let mark = 0x1234_5678_9abc_0065_u64;
        for size in [64, 4096, 9000] {
            for at in (0..size - 8).step_by(13).chain([0, size - 8]) {
                for fill in [0, 0x65] {
                    let mut bytes = vec![fill; size];
                    bytes[at..at + 8].copy_from_slice(&mark.to_le_bytes());
                    assert_eq!(next_mark(&bytes, mark, 0), Some(at));
                    assert_eq!(next_mark(&bytes, mark, at), Some(at));
                    assert_eq!(next_mark(&bytes, mark, at + 1), None);
                }
            }
        }
    }
}
