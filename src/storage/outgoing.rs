//! What is on its way to a segment: one stretch of bytes, of which only the small parts were copied together.

use std::io::{self, IoSlice};

use bytes::Bytes;

use crate::storage::disk::DiskFile;
use crate::storage::frame::Frame;

/// From here on a payload is cheaper to hand to the system where it lies.
const LARGE: usize = 4 << 10;

/// How a frame is stamped when it is put at the end of a segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamp {
    pub(super) incarnation: u64,
    pub(super) synced: u64,
}

#[derive(Debug, Default)]
pub(super) struct Outgoing {
    copied: Vec<u8>,
    /// Payloads that stand behind so many of the copied bytes, in order.
    large: Vec<(usize, Bytes)>,
    large_bytes: usize,
}

impl Outgoing {
    pub(super) fn len(&self) -> usize {
        self.copied.len() + self.large_bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn put(&mut self, frame: &Frame<'_>, stamp: Stamp) {
        frame.encode(stamp.incarnation, stamp.synced, &mut self.copied);
    }

    /// Like [`Outgoing::put`], of a frame with this payload, whose sum is known.
    pub(super) fn put_summed(
        &mut self,
        frame: &Frame<'_>,
        payload: &Bytes,
        sum: u32,
        stamp: Stamp,
    ) {
        frame.encode_head(sum, stamp.incarnation, stamp.synced, &mut self.copied);
        if payload.len() < LARGE {
            self.copied.extend_from_slice(payload);
            return;
        }
        self.large_bytes += payload.len();
        self.large.push((self.copied.len(), payload.clone()));
    }

    /// Puts bytes that are frames already.
    pub(super) fn put_bytes(&mut self, bytes: &[u8]) {
        self.copied.extend_from_slice(bytes);
    }

    /// Writes everything at `offset`, and forgets it.
    pub(super) fn write(&mut self, file: &dyn DiskFile, offset: u64) -> io::Result<()> {
        let mut slices = Vec::with_capacity(2 * self.large.len() + 1);
        let mut from = 0;
        for (to, payload) in &self.large {
            slices.push(IoSlice::new(&self.copied[from..*to]));
            slices.push(IoSlice::new(payload));
            from = *to;
        }
        slices.push(IoSlice::new(&self.copied[from..]));
        file.write_slices_at(&mut slices, offset)?;
        drop(slices);
        self.copied.clear();
        self.large.clear();
        self.large_bytes = 0;
        Ok(())
    }

    /// Gives memory back that one large batch took.
    pub(super) fn shrink_to(&mut self, bytes: usize) {
        self.copied.shrink_to(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::disk::{Disk, RealDisk};
    use crate::storage::frame::{self, Kind, decode};
    use crate::storage::{LogId, MemoryDisk};

    #[test]
    fn copied_or_not_the_same_frames_stand_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let real = RealDisk::new(folder.path()).unwrap();
        let memory = MemoryDisk::default();
        // More slices than one call of the system takes.
        let sizes = [0, 1, LARGE - 1, LARGE, 3 * LARGE + 7].repeat(300);
        let payloads = (1..=250_u8).cycle().zip(&sizes);
        let payloads: Vec<Bytes> = payloads.map(|(n, size)| vec![n; *size].into()).collect();
        for disk in [&real as &dyn Disk, &memory] {
            let mut out = Outgoing::default();
            let stamp = Stamp {
                incarnation: 7,
                synced: 3,
            };
            let frame = |index, payload| Frame {
                id: LogId {
                    term: 1,
                    node: 1,
                    index,
                },
                payload,
                ..Frame::bare(Kind::Entry)
            };
            for (index, payload) in (0..).zip(&payloads) {
                out.put_summed(
                    &frame(index, payload),
                    payload,
                    frame::sum_of(payload),
                    stamp,
                );
            }
            let length = out.len();
            let file = disk.create("a").unwrap();
            out.write(&*file, 11).unwrap();
            assert!(out.is_empty());
            let mut bytes = vec![0; length];
            file.read_at(&mut bytes, 11).unwrap();
            let mut rest = &bytes[..];
            for (index, payload) in (0..).zip(&payloads) {
                let (found, synced) = decode(rest, 7).unwrap();
                assert_eq!((found, synced), (frame(index, payload), 3));
                rest = &rest[found.size()..];
            }
            assert!(rest.is_empty());
        }
    }
}
