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
use crate::storage::frame::{self, Bad, Frame, Kind, Order};
use crate::storage::group::{self, Placed, State};
use crate::storage::index::Slot;
use crate::storage::layout::{Holes, Layout};
use crate::storage::scan::{self, Stretch};
use crate::storage::segment::{self, BadHeader, Header, Segment};
use crate::storage::track::{self, Track};

/// All that the segments say.
#[derive(Debug)]
pub(super) struct Recovered {
    pub(super) groups: HashMap<u32, (State, Track)>,
    /// In order of their numbers.
    pub(super) segments: Vec<Arc<Segment>>,
    /// The end of the newest segment, if there is one.
    pub(super) end: Option<End>,
}

/// Where the newest segment ends. If it was sealed already, it ends before that: what seals a segment says nothing new.
#[derive(Debug)]
pub(super) struct End {
    /// The next frame goes here.
    pub(super) at: u64,
    /// The bytes up to there of which no frame says that they are durable.
    pub(super) unsure: Vec<u8>,
    /// The last frame is of kind `Close`, and nothing stands behind it.
    pub(super) closed: bool,
    /// Behind it stand remains of writes that a crash interrupted since the log was last opened.
    pub(super) torn: bool,
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
            end: None,
        });
    };
    let scan = Scan::open(disk, dir, newest)?;
    let mut tracks = HashMap::new();
    let end = scan.run(&mut tracks)?;
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
    segments.push(Arc::new(scan.segment));
    let mut groups = HashMap::new();
    for (number, track) in tracks {
        let layout = layouts.remove(&number).unwrap_or_default();
        groups.insert(number, finish(number, newest, track, layout));
    }
    Ok(Recovered {
        groups,
        segments,
        end: Some(end),
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

/// What was read of the newest segment so far.
struct Seen {
    order: Order,
    at: usize,
    /// As far as its frames say.
    synced: u64,
    /// The last frame was of kind `Close`.
    closed: bool,
    /// Where indexes begin, if they do.
    footer: Option<usize>,
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
        let mut seen = Seen {
            order: Order::default(),
            at: segment::HEADER,
            // It got its name when its head was durable.
            synced: self.header.head_end,
            closed: false,
            footer: None,
        };
        loop {
            let at = seen.at;
            match (seen.order).decode(&self.bytes, at, self.segment.incarnation) {
                Ok((frame, _)) if frame.kind == Kind::Seal => return Ok(self.end(&seen)),
                Ok((frame, synced)) => {
                    match frame.kind {
                        Kind::Close => {}
                        Kind::Index | Kind::Directory => seen.footer = seen.footer.or(Some(at)),
                        _ => {
                            let track = tracks.entry(frame.group).or_default();
                            let applied = apply(track, &frame, at);
                            applied.map_err(|what| self.damaged(at as u64, &what))?;
                        }
                    }
                    seen.synced = seen.synced.max(synced);
                    seen.closed = frame.kind == Kind::Close;
                    seen.at += frame.size();
                }
                Err(Bad::Version(found)) => {
                    let (found, ours) = (u32::from(found), u32::from(frame::VERSION));
                    return Err(Error::version(self.path.clone(), found, ours));
                }
                Err(bad) => return self.tail(&seen, bad),
            }
        }
    }

    /// Whether the log may end here, where no frame can be read.
    fn tail(&self, seen: &Seen, bad: Bad) -> Result<End, Error> {
        let offset = seen.at as u64;
        if offset < self.header.head_end || bad == Bad::Kind {
            return Err(self.damaged(offset, &bad.to_string()));
        }
        let incarnation = self.segment.incarnation;
        let mut from = seen.at;
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
        Ok(self.end(seen))
    }

    /// The log goes on before what was to seal the segment.
    fn end(&self, seen: &Seen) -> End {
        let at = seen.footer.unwrap_or(seen.at);
        let from = usize::try_from(seen.synced).map_or(at, |synced| synced.min(at));
        let remains = scan::next_mark(&self.bytes, self.segment.incarnation, at).is_some();
        End {
            at: at as u64,
            unsure: self.bytes[from..at].to_vec(),
            closed: seen.closed && !remains,
            torn: remains && !seen.closed && seen.footer.is_none(),
        }
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
