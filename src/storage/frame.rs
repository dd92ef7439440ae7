//! How a record lies in a segment: 56 bytes of header, then the payload. Numbers are little-endian.
//!
//! ```text
//!  0 payload length u32 | 4 CRC32C u32: of the payload, then of the rest of the header
//!  8 format version u8  | 9 kind u8 | 10 tag u8 | 11 zero | 12 group u32
//! 16 incarnation u64    | 24 synced u64
//! 32 index u64          | 40 term u64 | 48 node u64
//! ```
//!
//! The *incarnation* is drawn anew for each use of a file, so what an earlier use left behind never passes. *Synced*
//! is how far this segment was known to be durable when the frame was written: an unreadable frame before that point
//! was once acknowledged, one behind it may simply not have reached the disk. It never falls from one frame to the next:
//! see [`Order`]. Length, checksum, version and incarnation keep their places in every future version.
//!
//! The checksum begins with the payload, so that whoever hands an entry in can sum it while the disk syncs, and only the
//! header is left to the thread that writes.

use crc32c::{crc32c, crc32c_append};

use crate::storage::LogId;

/// What this build writes, and all it reads: no release wrote older ones.
pub(super) const VERSION: u8 = 3;
pub(super) const HEADER: usize = 56;
pub(super) const PAYLOAD_MAX: usize = 1 << 30;

/// What a frame says. The numbers are on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An entry; the tag is its own kind.
    Entry = 1,
    /// The group's vote is the payload.
    Vote = 2,
    /// Committed up to the id (tag 1), or nothing is (tag 0).
    Committed = 3,
    /// Entries behind the id (tag 1), or all entries (tag 0), no longer exist.
    Truncate = 4,
    /// Entries up to the id no longer exist.
    Purge = 5,
    /// At a segment's head: the group's entries run from the index that the payload begins with to the id (tag 1),
    /// or there are none (tag 0). The rest of the payload says who wrote which of them.
    Span = 6,
    /// The segment ends here, and all of it is durable. The id is no log id: its index is where the directory's frame
    /// begins, its term that one's payload length, its node the segment's number. Repeated at the end of the file.
    Seal = 7,
    /// The log was closed here, or opened again where it had not been: nothing behind was written before all up to
    /// the end of this frame was durable.
    Close = 8,
    /// At a segment's end: where entries of the group lie in it, the first of them being the index of the id; tag 1
    /// for `Repaired` ones.
    Index = 9,
    /// At a segment's end: what its indexes cover.
    Directory = 10,
    /// An entry that replaces one which was lost; it does not follow the one before.
    Repaired = 11,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::Entry,
        Self::Vote,
        Self::Committed,
        Self::Truncate,
        Self::Purge,
        Self::Span,
        Self::Seal,
        Self::Close,
        Self::Index,
        Self::Directory,
        Self::Repaired,
    ];
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    pub(super) kind: Kind,
    pub(super) tag: u8,
    pub(super) group: u32,
    pub(super) id: LogId,
    pub(super) payload: &'a [u8],
}

impl Frame<'_> {
    pub(super) const NO_ID: LogId = LogId {
        term: 0,
        node: 0,
        index: 0,
    };

    /// A frame that says only what its kind says.
    pub(super) const fn bare(kind: Kind) -> Self {
        Self {
            kind,
            tag: 0,
            group: 0,
            id: Self::NO_ID,
            payload: &[],
        }
    }

    /// A frame of one id or none.
    pub(super) fn mark(kind: Kind, group: u32, id: Option<LogId>) -> Self {
        Self {
            kind,
            tag: u8::from(id.is_some()),
            group,
            id: id.unwrap_or(Self::NO_ID),
            payload: &[],
        }
    }

    /// The id of a frame built by [`Frame::mark`].
    pub(super) fn marked(&self) -> Option<LogId> {
        (self.tag == 1).then_some(self.id)
    }

    pub(super) const fn size(&self) -> usize {
        HEADER + self.payload.len()
    }

    /// Appends the frame to `out`. The payload is at most [`PAYLOAD_MAX`].
    pub(super) fn encode(&self, incarnation: u64, synced: u64, out: &mut Vec<u8>) {
        self.encode_head(sum_of(self.payload), incarnation, synced, out);
        out.extend_from_slice(self.payload);
    }

    /// Appends what stands before the payload, whose [`sum_of`] is known.
    pub(super) fn encode_head(&self, sum: u32, incarnation: u64, synced: u64, out: &mut Vec<u8>) {
        let start = out.len();
        let length =
            u32::try_from(self.payload.len()).expect("payloads are limited when handed in");
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&[VERSION, self.kind as u8, self.tag, 0]);
        out.extend_from_slice(&self.group.to_le_bytes());
        for number in [
            incarnation,
            synced,
            self.id.index,
            self.id.term,
            self.id.node,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        let sum = checksum(sum, &out[start..]);
        out[start + 4..start + 8].copy_from_slice(&sum.to_le_bytes());
    }
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Bad {
    #[error("the file ends within the frame")]
    Short,
    #[error("no frame of this file's present use begins here")]
    Foreign,
    #[error("impossible length")]
    Length,
    #[error("checksum does not match")]
    Checksum,
    #[error("a record from before the log was last opened, of which nobody was told")]
    Stale,
    #[error("unknown kind of frame")]
    Kind,
    /// Whole, but of a version this build does not know.
    #[error("format version {0}")]
    Version(u8),
}

/// Reads the frame at the start of `bytes` and how far the segment was durable when it was written.
pub(super) fn decode(bytes: &[u8], incarnation: u64) -> Result<(Frame<'_>, u64), Bad> {
    let head = bytes.get(..HEADER).ok_or(Bad::Short)?;
    if u64_at(head, 16) != incarnation {
        return Err(Bad::Foreign);
    }
    let length = u32_at(head, 0) as usize;
    if length > PAYLOAD_MAX {
        return Err(Bad::Length);
    }
    let whole = bytes.get(..HEADER + length).ok_or(Bad::Short)?;
    if checksum(sum_of(&whole[HEADER..]), head) != u32_at(head, 4) {
        return Err(Bad::Checksum);
    }
    if head[8] != VERSION {
        return Err(Bad::Version(head[8]));
    }
    let kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == head[9]);
    let frame = Frame {
        kind: kind.ok_or(Bad::Kind)?,
        tag: head[10],
        group: u32_at(head, 12),
        id: LogId {
            index: u64_at(head, 32),
            term: u64_at(head, 40),
            node: u64_at(head, 48),
        },
        payload: &whole[HEADER..],
    };
    Ok((frame, u64_at(head, 24)))
}

/// Reads frames in the order in which they stand, and tells those that belong there from what an interrupted write of
/// this same use of the file left behind, which new frames may come to end just before.
///
/// Whatever is written after the log was opened again stands behind a frame of kind `Close` and knows that this one is
/// durable. What was written before cannot know that. To wipe the remains instead would not do: when that fails, they
/// may be gone from the cache and still be on the medium.
#[derive(Debug, Default)]
pub(super) struct Order {
    /// The next frame knows at least this much to be durable.
    floor: u64,
}

impl Order {
    /// Like [`decode`], of the frame that begins at `at` in the segment's bytes.
    pub(super) fn decode<'a>(
        &mut self,
        bytes: &'a [u8],
        at: usize,
        incarnation: u64,
    ) -> Result<(Frame<'a>, u64), Bad> {
        let (frame, synced) = decode(&bytes[at..], incarnation)?;
        self.floor = match frame.kind {
            // Itself, it may follow one that is not known to be durable; and a stale one says nothing wrong.
            Kind::Close => (at + frame.size()) as u64,
            _ if synced < self.floor => return Err(Bad::Stale),
            _ => synced,
        };
        Ok((frame, synced))
    }
}

/// The part of the checksum that does not depend on where a frame will stand.
pub(super) fn sum_of(payload: &[u8]) -> u32 {
    crc32c(payload)
}

/// Of a frame with this sum of its payload and this header, leaving out the field it is kept in.
fn checksum(payload: u32, header: &[u8]) -> u32 {
    crc32c_append(crc32c_append(payload, &header[..4]), &header[8..HEADER])
}

/// The caller's slice is long enough.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes were taken"))
}

/// The caller's slice is long enough.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(
        bytes[at..at + 8]
            .try_into()
            .expect("eight bytes were taken"),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trip_and_every_flip_is_seen(
            tag: u8, group: u32, index: u64, term: u64, node: u64, synced: u64,
            payload in proptest::collection::vec(any::<u8>(), 0..200), flip: proptest::sample::Index,
        ) {
            let id = LogId { term, node, index };
            let frame = Frame { kind: Kind::Entry, tag, group, id, payload: &payload };
            let mut bytes = Vec::new();
            frame.encode(7, synced, &mut bytes);
            prop_assert_eq!(bytes.len(), frame.size());
            prop_assert_eq!(decode(&bytes, 7), Ok((frame, synced)));
            prop_assert_eq!(decode(&bytes, 8), Err(Bad::Foreign));
            prop_assert_eq!(decode(&bytes[..bytes.len() - 1], 7), Err(Bad::Short));
            let bit = flip.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode(&bytes, 7).is_err());
        }
    }
}
