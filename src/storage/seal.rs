//! How the writer ends a segment: indexes, directory, seal, and a copy of the seal at the end of the file.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use crate::storage::frame::{self, Frame, Kind};
use crate::storage::group::Group;
use crate::storage::index::{self, Listed};
use crate::storage::layout::{Part, Where};
use crate::storage::read::index_frame;
use crate::storage::track::{Sheet, Stretch};
use crate::storage::writer::{PIECE, Writer};
use crate::storage::{LogId, locked};

/// At most what one more stretch of entries adds to the end of a segment, its leaders apart.
pub(super) const PER_STRETCH: u64 = frame::HEADER as u64 + 96;
/// About what one more entry adds; entries of very different sizes take a little more.
pub(super) const PER_ENTRY: u64 = 4;
/// What stands at the end of any segment: directory, seal, copy of the seal.
pub(super) const ALWAYS: u64 = 3 * frame::HEADER as u64 + 8;

/// The parts that a group has in a segment being sealed.
struct Sealed {
    group: Arc<Group>,
    parts: Vec<Part>,
}

impl Writer {
    /// Ends the active segment, durably.
    pub(super) fn seal(&mut self) -> io::Result<()> {
        let mut listed = Vec::new();
        let mut sealed = Vec::new();
        for group in self.shared.all_groups() {
            let parts = self.put_indexes(&group, &mut listed)?;
            if !parts.is_empty() {
                sealed.push(Sealed { group, parts });
            }
        }
        let trailer = self.put_seal(&listed)?;
        self.flush()?;
        let (file, end) = (&self.active.file, self.end());
        let size = file.size()?;
        if end < size {
            // It also ends the file when the seal itself reaches into the last bytes.
            file.write_at(&trailer, end.max(size - trailer.len() as u64))?;
            let bytes = &self.shared.counters.bytes;
            bytes.fetch_add(trailer.len() as u64, Relaxed);
        }
        self.active.size.store(file.size()?, Relaxed);
        self.sync()?;
        for Sealed { group, parts } in sealed {
            locked(&group.state).seal(self.active.number, &parts);
            let track = self.track(group.number);
            track.sheet = Sheet::default();
            track.sealed.extend(parts.iter().map(|part| Stretch {
                segment: part.segment,
                first: part.first,
                last: part.last,
            }));
        }
        Ok(())
    }

    fn put_indexes(
        &mut self,
        group: &Arc<Group>,
        listed: &mut Vec<Listed>,
    ) -> io::Result<Vec<Part>> {
        let number = group.number;
        let track = self.track(number);
        let mut parts = Vec::new();
        let indexes = track.sheet.indexes();
        let leaders = match indexes.is_empty() {
            true => return Ok(parts),
            false => track.leaders.clone(),
        };
        for (repaired, index) in indexes {
            let (first, last) = (index.first, index.first + index.slots.len() as u64 - 1);
            let payload = index.encode();
            let at = u32::try_from(self.at()).map_err(io::Error::other)?;
            let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
            self.put_end(&Frame {
                payload: &payload,
                ..index_frame(number, repaired, first)
            })?;
            let bytes = index.bytes(first, last);
            parts.push(Part {
                segment: self.active.number,
                repaired,
                first,
                last,
                bytes: Some(bytes),
                index: Where::Frame { at, length },
            });
            listed.push(Listed {
                group: number,
                repaired,
                first,
                last,
                bytes,
                at,
                length,
                leaders: leaders.of(first, last),
            });
        }
        Ok(parts)
    }

    /// Puts directory and seal, and returns the seal's bytes.
    fn put_seal(&mut self, listed: &[Listed]) -> io::Result<Vec<u8>> {
        let directory = index::directory(listed);
        let seal = Frame {
            tag: 1,
            id: LogId {
                index: self.at(),
                term: directory.len() as u64,
                node: u64::from(self.active.number),
            },
            ..Frame::bare(Kind::Seal)
        };
        self.put_end(&Frame {
            payload: &directory,
            ..Frame::bare(Kind::Directory)
        })?;
        let mut bytes = Vec::with_capacity(frame::HEADER);
        seal.encode(self.active.incarnation, self.synced(), &mut bytes);
        self.buffer.put_bytes(&bytes);
        Ok(bytes)
    }

    /// Puts a frame in the active segment, whether or not it is full.
    fn put_end(&mut self, frame: &Frame<'_>) -> io::Result<()> {
        let stamp = self.stamp();
        self.buffer.put(frame, stamp);
        match self.buffer.len() >= PIECE {
            true => self.flush(),
            false => Ok(()),
        }
    }
}
