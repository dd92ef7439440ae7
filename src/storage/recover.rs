//! Reading the segments at start: every frame is verified, and what cannot be explained is refused.
//!
//! The one thing that a crash explains is a newest segment whose last writes are missing in part. A frame tells how
//! far its segment was durable when it was written; so unreadable bytes with a readable frame behind them are a torn
//! write if nothing behind them knew them to be durable, and damage if something did. Segments that were removed are
//! no hole: each segment's head says exactly which entries existed then.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::storage::disk::Disk;
use crate::storage::frame::{self, Bad, Frame, Kind, u64_at};
use crate::storage::group::{Slot, State};
use crate::storage::segment::{self, BadHeader, Header, Segment};
use crate::storage::track::Track;
use crate::storage::{Error, LogId};

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

/// One group while frames are being applied.
#[derive(Debug, Default)]
struct Replay {
    vote: Option<Bytes>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    entries: BTreeMap<u64, (LogId, Slot)>,
    /// First index and last id of the entries that exist at this point, found or not.
    span: Option<(u64, LogId)>,
}

/// Changes nothing on the disk.
pub(super) fn recover(disk: &dyn Disk, dir: &Path) -> Result<Recovered, Error> {
    let names = disk.list().map_err(Error::io("list", dir))?;
    let mut numbers: Vec<u32> = names
        .iter()
        .filter_map(|name| segment::number(name))
        .collect();
    numbers.sort_unstable();
    let newest = numbers.last().copied();
    let mut replays = HashMap::new();
    let mut segments = Vec::new();
    let mut end = End::Sealed;
    for number in numbers {
        let scan = Scan::open(disk, dir, number)?;
        end = scan.run(&mut replays)?;
        if let End::Open { at, .. } = end
            && newest != Some(number)
        {
            return Err(scan.damaged(at, "readable records end here, yet the segment goes on"));
        }
        segments.push(Arc::new(scan.segment));
    }
    let mut groups = HashMap::new();
    for (number, replay) in replays {
        groups.insert(number, replay.finish(number, dir)?);
    }
    Ok(Recovered {
        groups,
        segments,
        end,
    })
}

/// One segment, read whole.
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
                let segment = Segment {
                    number,
                    incarnation: header.incarnation,
                    file,
                };
                return Ok(Self {
                    path,
                    bytes,
                    header,
                    segment,
                });
            }
            Ok(header) => format!("the header is that of segment {:#x}", header.number),
            Err(BadHeader::Version(found)) => {
                return Err(Error::NewerVersion {
                    file: path,
                    found,
                    supported: segment::VERSION,
                });
            }
            Err(BadHeader::Short) => "shorter than a segment's header".to_owned(),
            Err(BadHeader::Magic) => "not a segment of a log".to_owned(),
            Err(BadHeader::Checksum) => "checksum of the header does not match".to_owned(),
        };
        Err(Error::Damaged {
            file: path,
            offset: 0,
            what,
        })
    }

    fn run(&self, replays: &mut HashMap<u32, Replay>) -> Result<End, Error> {
        let incarnation = self.segment.incarnation;
        let mut at = segment::HEADER;
        loop {
            match frame::decode(&self.bytes[at..], incarnation) {
                Ok((frame, _)) if frame.kind == Kind::Seal => return Ok(End::Sealed),
                Ok((frame, _)) if frame.kind == Kind::Close => at += frame.size(),
                Ok((frame, _)) => {
                    let replay = replays.entry(frame.group).or_default();
                    let applied = replay.apply(&frame, self.segment.number, at);
                    applied.map_err(|what| self.damaged(at as u64, what))?;
                    at += frame.size();
                }
                Err(Bad::Version(found)) => {
                    return Err(Error::NewerVersion {
                        file: self.path.clone(),
                        found: u32::from(found),
                        supported: u32::from(frame::VERSION),
                    });
                }
                Err(bad) => return self.tail(at, bad),
            }
        }
    }

    /// Whether the log may end at `at`, where no frame can be read.
    fn tail(&self, at: usize, bad: Bad) -> Result<End, Error> {
        let offset = at as u64;
        if offset < self.header.head_end || bad == Bad::Kind {
            return Err(self.damaged(offset, bad.to_string()));
        }
        let dirty_to = written_end(&self.bytes).max(at);
        let mark = self.segment.incarnation.to_le_bytes();
        let places = self.bytes[at..dirty_to].windows(mark.len()).enumerate();
        for (place, _) in places.filter(|(place, window)| *place > 16 && *window == mark) {
            let behind = at + place - 16;
            if let Ok((_, synced)) = frame::decode(&self.bytes[behind..], self.segment.incarnation)
                && synced > offset
            {
                let what = format!(
                    "{bad}; the record at byte {behind} shows that this one was acknowledged"
                );
                return Err(self.damaged(offset, what));
            }
        }
        Ok(End::Open {
            at: offset,
            dirty_to: dirty_to as u64,
        })
    }

    fn damaged(&self, offset: u64, what: impl Into<String>) -> Error {
        Error::Damaged {
            file: self.path.clone(),
            offset,
            what: what.into(),
        }
    }
}

/// One past the last byte that is not zero.
fn written_end(bytes: &[u8]) -> usize {
    const PAGE: [u8; 4096] = [0; 4096];
    // A preallocated segment is mostly zeros: compare pages first.
    let zeros = bytes
        .rchunks(PAGE.len())
        .take_while(|page| **page == PAGE[..page.len()]);
    let end = bytes.len() - zeros.map(<[u8]>::len).sum::<usize>();
    bytes[..end]
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1)
}

impl Replay {
    fn apply(&mut self, frame: &Frame<'_>, segment: u32, at: usize) -> Result<(), String> {
        match frame.kind {
            Kind::Entry => self.append(frame, segment, at)?,
            Kind::Vote => self.vote = Some(Bytes::copy_from_slice(frame.payload)),
            Kind::Committed => self.committed = frame.marked(),
            Kind::Truncate => self.truncate(frame.marked()),
            Kind::Purge => self.purge(frame.id),
            Kind::Span => {
                self.span = match frame.marked() {
                    Some(last) if frame.payload.len() == 8 => {
                        Some((u64_at(frame.payload, 0), last))
                    }
                    Some(_) => return Err("the span of a group has no first index".to_owned()),
                    None => None,
                };
                let (first, last) = self
                    .span
                    .map_or((1, 0), |(first, last)| (first, last.index));
                self.entries
                    .retain(|index, _| (first..=last).contains(index));
            }
            Kind::Seal | Kind::Close => {}
        }
        Ok(())
    }

    fn append(&mut self, frame: &Frame<'_>, segment: u32, at: usize) -> Result<(), String> {
        let index = frame.id.index;
        let before = self.span.map(|(_, last)| last).or(self.purged);
        if let Some(before) = before
            && index != before.index + 1
        {
            let (group, before) = (frame.group, before.index);
            return Err(format!(
                "group {group}: entry {index} follows entry {before}"
            ));
        }
        let slot = Slot {
            segment,
            offset: u32::try_from(at)
                .map_err(|_| "a segment this large is not readable".to_owned())?,
            length: u32::try_from(frame.payload.len()).expect("decoded frames are limited"),
            kind: frame.tag,
        };
        let first = self.span.map_or(index, |(first, _)| first);
        self.span = Some((first, frame.id));
        self.entries.insert(index, (frame.id, slot));
        Ok(())
    }

    fn truncate(&mut self, keep: Option<LogId>) {
        let end = keep.map_or(0, |id| id.index.saturating_add(1));
        self.entries.split_off(&end);
        self.span = match (self.span, keep) {
            (Some((first, _)), Some(keep)) if first <= keep.index => Some((first, keep)),
            _ => None,
        };
    }

    fn purge(&mut self, upto: LogId) {
        self.purged = Some(upto);
        self.entries = self.entries.split_off(&upto.index.saturating_add(1));
        self.span = match self.span {
            Some((first, last)) if last.index > upto.index => {
                Some((first.max(upto.index + 1), last))
            }
            _ => None,
        };
    }

    /// Every entry that should exist must have been found.
    fn finish(self, group: u32, dir: &Path) -> Result<(State, Track), Error> {
        let hole = |what| Error::Hole {
            dir: dir.to_owned(),
            group,
            what,
        };
        if let Some((first, last)) = self.span {
            let mut found = self.entries.keys();
            if let Some(missing) = (first..=last.index).find(|index| found.next() != Some(index)) {
                return Err(hole(format!(
                    "entry {missing} is missing of {first} to {}",
                    last.index
                )));
            }
            let newest = self.entries.last_key_value().map(|(_, (id, _))| *id);
            if newest != Some(last) {
                return Err(hole(format!(
                    "its last entry should be {last:?}, it is {newest:?}"
                )));
            }
        }
        let mut track = Track::default();
        track.vote = self.vote.clone();
        track.committed = self.committed;
        track.purged = self.purged;
        for (id, slot) in self.entries.values() {
            track.append(slot.segment, *id);
        }
        let entries = self.entries.into_values();
        let state = State::recovered(self.vote, self.committed, self.purged, entries);
        Ok((state, track))
    }
}
