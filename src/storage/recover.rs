//! Reading the segments at start. The newest one is read whole, every frame verified, and what a crash does not
//! explain is refused: it holds the newest votes. Of the others the directories are enough; what they have lost
//! becomes holes.
//!
//! The one thing that a crash explains is a newest segment whose last writes are missing in part. A frame tells how
//! far its segment was durable when it was written; so unreadable bytes with a readable frame behind them are a torn
//! write if nothing behind them knew them to be durable, and damage if something did. Segments that were removed are
//! no hole: the newest one's head says exactly which entries existed then, and who wrote each of them. So an entry of
//! an older segment counts if no later segment goes on before it and its id is the one that the head knows.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::storage::Error;
use crate::storage::disk::Disk;
use crate::storage::frame::{self, Bad, Frame, Kind};
use crate::storage::group::{self, Placed, State};
use crate::storage::index::Slot;
use crate::storage::layout::{Holes, Layout};
use crate::storage::scan::{self, Stretch};
use crate::storage::segment::{self, BadHeader, Header, Segment};
use crate::storage::track::{self, Sheet, Track};

/// All that the segments say.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) groups: HashMap<u32, (State, Track)>,
    /// In order of their numbers.
    pub(super) segments: Vec<Arc<Segment>>,
    /// The end of the newest segment.
    pub(super) end: End,
}

/// How a segment ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing may be added.
    Sealed,
    /// The next frame goes to `at`. From there to `dirty_to` lie remains of writes that nobody was told about.
    Open { at: u64, dirty_to: u64 },
}

/// Changes nothing on the disk.
pub(super) fn recover(disk: &dyn Disk, dir: &Path) -> Result<Recovered, Error> {
    let names = disk.list().map_err(Error::io("list", dir))?;
    let mut numbers: Vec<u32> = names
        .iter()
        .filter_map(|name| segment::number(name))
        .collect();
    numbers.sort_unstable();
    let Some(newest) = numbers.pop() else {
        return Ok(Recovered {
            groups: HashMap::new(),
            segments: Vec::new(),
            end: End::Sealed,
        });
    };
    let scan = Scan::open(disk, dir, newest)?;
    let mut tracks = HashMap::new();
    let end = scan.run(&mut tracks)?;
    if end == End::Sealed {
        // Its directory says the same as the sheets; let there be one way from here.
        tracks
            .values_mut()
            .for_each(|track: &mut Track| track.sheet = Sheet::default());
        numbers.push(newest);
    }
    let mut layouts: HashMap<u32, Layout> = HashMap::new();
    let mut segments = Vec::new();
    for number in numbers {
        let (segment, stretches) = scan::open(disk, dir, number)?;
        for stretch in stretches {
            if let Some(track) = tracks.get(&stretch.group) {
                add(layouts.entry(stretch.group).or_default(), stretch, track);
            }
        }
        segments.push(Arc::new(segment));
    }
    if end != End::Sealed {
        segments.push(Arc::new(scan.segment));
    }
    let mut groups = HashMap::new();
    for (number, track) in tracks {
        let layout = layouts.remove(&number).unwrap_or_default();
        groups.insert(number, finish(number, newest, track, layout));
    }
    Ok(Recovered {
        groups,
        segments,
        end,
    })
}

/// Adds what a segment holds to what the earlier ones hold.
fn add(layout: &mut Layout, stretch: Stretch, track: &Track) {
    let Stretch { part, leaders, .. } = stretch;
    if !part.repaired {
        layout.truncate(part.first);
    }
    for (first, last) in track.leaders.agreeing(&leaders, part.first, part.last) {
        layout.overlay(part.clipped(first, last));
    }
}

/// Of all that lies in sealed segments, only what the newest one knows to exist counts.
fn finish(group: u32, newest: u32, mut track: Track, mut layout: Layout) -> (State, Track) {
    let (first, end) = track
        .span
        .map_or((0, 0), |(first, last)| (first, last.index + 1));
    let active = end - track.sheet.slots.len() as u64;
    layout.purge(first);
    layout.truncate(active);
    let placed = |slot: &Slot| Placed {
        segment: newest,
        slot: *slot,
    };
    let repaired = track.sheet.repaired.iter();
    let patches: std::collections::BTreeMap<_, _> = repaired
        .map(|(index, slot)| (*index, placed(slot)))
        .collect();
    let mut holes = Holes::default();
    layout
        .gaps(first..active)
        .into_iter()
        .for_each(|gap| holes.add(gap));
    patches
        .keys()
        .for_each(|index| holes.remove(*index..index + 1));
    for hole in holes.ranges() {
        tracing::warn!(
            group,
            first = hole.start,
            last = hole.end - 1,
            "entries are missing from the log"
        );
    }
    let stretch = |part: &crate::storage::layout::Part| track::Stretch {
        segment: part.segment,
        first: part.first,
        last: part.last,
    };
    track.sealed = layout.parts().map(stretch).collect();
    let state = State::recovered(group::Recovered {
        vote: track.vote.clone(),
        committed: track.committed,
        purged: track.purged,
        span: track.span,
        leaders: track.leaders.clone(),
        sealed: layout,
        slots: track.sheet.slots.iter().map(placed).collect(),
        patches,
        holes,
    });
    (state, track)
}

/// The newest segment, read whole.
struct Scan {
    path: PathBuf,
    bytes: Vec<u8>,
    header: Header,
    segment: Segment,
}

impl Scan {
    fn open(disk: &dyn Disk, dir: &Path, number: u32) -> Result<Self, Error> {
        let name = segment::name(number);
        let path = dir.join(&name);
        let file = disk.open(&name).map_err(Error::io("open", &path))?;
        let size = file.size().map_err(Error::io("measure", &path))?;
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
        file.read_at(&mut bytes, 0)
            .map_err(Error::io("read", &path))?;
        let what = match Header::decode(&bytes) {
            Ok(header) if header.number == u64::from(number) => {
                let segment = Segment::new(number, header.incarnation, file);
                let segment = segment.map_err(Error::io("measure", &path))?;
                return Ok(Self {
                    path,
                    bytes,
                    header,
                    segment,
                });
            }
            Ok(header) => format!("the header is that of segment {:#x}", header.number),
            Err(BadHeader::Version(found)) => {
                return Err(Error::version(path, found, segment::VERSION));
            }
            Err(BadHeader::Short) => "shorter than a segment's header".to_owned(),
            Err(BadHeader::Magic) => "not a segment of a log".to_owned(),
            Err(BadHeader::Checksum) => "checksum of the header does not match".to_owned(),
        };
        Err(Error::newest(path, 0, &what))
    }

    fn run(&self, tracks: &mut HashMap<u32, Track>) -> Result<End, Error> {
        let incarnation = self.segment.incarnation;
        let mut at = segment::HEADER;
        let mut footer = None;
        loop {
            match frame::decode(&self.bytes[at..], incarnation) {
                Ok((frame, _)) if frame.kind == Kind::Seal => return Ok(End::Sealed),
                Ok((frame, _)) => {
                    match frame.kind {
                        Kind::Close => {}
                        Kind::Index | Kind::Directory => footer = footer.or(Some(at)),
                        _ => {
                            let track = tracks.entry(frame.group).or_default();
                            let applied = apply(track, &frame, at);
                            applied.map_err(|what| self.damaged(at as u64, &what))?;
                        }
                    }
                    at += frame.size();
                }
                Err(Bad::Version(found)) => {
                    let (found, ours) = (u32::from(found), u32::from(frame::VERSION));
                    return Err(Error::version(self.path.clone(), found, ours));
                }
                Err(bad) => return self.tail(at, footer.unwrap_or(at), bad),
            }
        }
    }

    /// Whether the log may end at `at`, where no frame can be read. It goes on at `end`, before what was to seal the
    /// segment but did not.
    fn tail(&self, at: usize, end: usize, bad: Bad) -> Result<End, Error> {
        let offset = at as u64;
        if offset < self.header.head_end || bad == Bad::Kind {
            return Err(self.damaged(offset, &bad.to_string()));
        }
        let incarnation = self.segment.incarnation;
        let mut from = at;
        while let Some(behind) = scan::resume(&self.bytes, incarnation, from + 1) {
            if let Ok((_, synced)) = frame::decode(&self.bytes[behind..], incarnation)
                && synced > offset
            {
                let what = format!(
                    "{bad}; the record at byte {behind} shows that this one was acknowledged"
                );
                return Err(self.damaged(offset, &what));
            }
            from = behind;
        }
        // What an earlier use of the file left cannot be taken for a frame; what this one left could be, once new
        // frames end just before it.
        let mut dirty_to = end;
        while let Some(mark) = scan::next_mark(&self.bytes, incarnation, dirty_to) {
            dirty_to = mark + size_of_val(&incarnation);
        }
        Ok(End::Open {
            at: end as u64,
            dirty_to: dirty_to as u64,
        })
    }

    fn damaged(&self, offset: u64, what: &str) -> Error {
        Error::newest(self.path.clone(), offset, what)
    }
}

fn apply(track: &mut Track, frame: &Frame<'_>, at: usize) -> Result<(), String> {
    match frame.kind {
        Kind::Entry | Kind::Repaired => {
            let slot = Slot {
                offset: u32::try_from(at)
                    .map_err(|_| "a segment this large is not readable".to_owned())?,
                length: u32::try_from(frame.payload.len()).expect("decoded frames are limited"),
                kind: frame.tag,
            };
            match frame.kind {
                Kind::Repaired => track.repair(frame.id, slot),
                _ => append(track, frame, slot)?,
            }
        }
        Kind::Vote => track.vote = Some(Bytes::copy_from_slice(frame.payload)),
        Kind::Committed => track.committed = frame.marked(),
        Kind::Truncate => track.truncate(frame.marked()),
        Kind::Purge => track.purge(frame.id),
        Kind::Span => track.set_span(frame)?,
        Kind::Seal | Kind::Close | Kind::Index | Kind::Directory => {}
    }
    Ok(())
}

fn append(track: &mut Track, frame: &Frame<'_>, slot: Slot) -> Result<(), String> {
    let index = frame.id.index;
    let before = track.span.map(|(_, last)| last).or(track.purged);
    if let Some(before) = before
        && index != before.index + 1
    {
        let (group, before) = (frame.group, before.index);
        return Err(format!(
            "group {group}: entry {index} follows entry {before}"
        ));
    }
    track.append(frame.id, slot);
    Ok(())
}
