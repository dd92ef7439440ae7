//! What a sealed segment ends with: for each stretch of a group's entries in it an *index* that says where each one
//! lies, and one *directory* that says where the indexes lie. Opening reads the directory only.
//!
//! ```text
//! index:      first index | number of entries | per entry:
//!             gap to the end of the frame before, shifted by one, + 1 when a kind byte follows | length - that before
//! directory:  number of stretches | per stretch:
//!             group | 1 if repaired | first | last - first | payload bytes | offset and length of its index | leaders
//! ```
//! All numbers are varints, differences are zigzag.

use crate::storage::LogId;
use crate::storage::frame;
use crate::storage::leaders;
use crate::storage::varint::{put, take, unzigzag, zigzag};

/// Where an entry's frame lies in its segment, and what its payload is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) offset: u32,
    pub(super) length: u32,
    pub(super) kind: u8,
}

/// The slots of consecutive entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) first: u64,
    pub(super) slots: Vec<Slot>,
}

/// A stretch of entries as the directory lists it. In a frame of kind `Index`, the group, the tag (1 if repaired)
/// and the index in the id (the first) must be the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) group: u32,
    /// Replacements for entries that were lost elsewhere, rather than the sequence of what was appended.
    pub(super) repaired: bool,
    pub(super) first: u64,
    pub(super) last: u64,
    /// Of all payloads.
    pub(super) bytes: u64,
    /// Where the frame with its index begins.
    pub(super) at: u32,
    /// Payload bytes of that frame.
    pub(super) length: u32,
    pub(super) leaders: Vec<LogId>,
}

impl Index {
    pub(super) fn slot(&self, index: u64) -> Option<Slot> {
        let at = usize::try_from(index.checked_sub(self.first)?).ok()?;
        self.slots.get(at).copied()
    }

    /// Payload bytes of the entries `first..=last`.
    pub(super) fn bytes(&self, first: u64, last: u64) -> u64 {
        let slots = (self.first..=last).zip(&self.slots);
        let inside = slots.filter(|(index, _)| *index >= first);
        inside.map(|(_, slot)| u64::from(slot.length)).sum()
    }

    /// Bytes it takes in memory.
    pub(super) fn memory(&self) -> usize {
        size_of::<Self>() + self.slots.len() * size_of::<Slot>()
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + 3 * self.slots.len());
        put(&mut out, self.first);
        put(&mut out, self.slots.len() as u64);
        let (mut expected, mut length, mut kind) = (0, 0, 0);
        for slot in &self.slots {
            let gap = zigzag(i64::from(slot.offset) - expected);
            put(&mut out, gap << 1 | u64::from(slot.kind != kind));
            if slot.kind != kind {
                out.push(slot.kind);
            }
            put(&mut out, zigzag(i64::from(slot.length) - length));
            (length, kind) = (i64::from(slot.length), slot.kind);
            expected = i64::from(slot.offset) + frame::HEADER as i64 + length;
        }
        out
    }

    /// `None` when this is no index.
    pub(super) fn decode(mut bytes: &[u8]) -> Option<Self> {
        let bytes = &mut bytes;
        let first = take(bytes)?;
        let count = usize::try_from(take(bytes)?).ok()?;
        // Each takes two bytes or more.
        if count > bytes.len() {
            return None;
        }
        let mut slots = Vec::with_capacity(count);
        let (mut expected, mut length, mut kind) = (0_i64, 0_i64, 0);
        for _ in 0..count {
            let gap = take(bytes)?;
            if gap & 1 == 1 {
                let (byte, rest) = bytes.split_first()?;
                (kind, *bytes) = (*byte, rest);
            }
            let offset = expected.checked_add(unzigzag(gap >> 1))?;
            length = length.checked_add(unzigzag(take(bytes)?))?;
            slots.push(Slot {
                offset: u32::try_from(offset).ok()?,
                length: u32::try_from(length).ok()?,
                kind,
            });
            expected = offset + frame::HEADER as i64 + length;
        }
        bytes.is_empty().then_some(Self { first, slots })
    }
}

/// The payload of a directory frame.
pub(super) fn directory(listed: &[Listed]) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out, listed.len() as u64);
    for run in listed {
        let Listed { first, last, .. } = run;
        put(&mut out, u64::from(run.group));
        put(&mut out, u64::from(run.repaired));
        for number in [*first, last - first, run.bytes] {
            put(&mut out, number);
        }
        put(&mut out, u64::from(run.at));
        put(&mut out, u64::from(run.length));
        leaders::put(&mut out, &run.leaders);
    }
    out
}

/// What [`directory`] wrote; `None` when this is no directory.
pub(super) fn listed(mut bytes: &[u8]) -> Option<Vec<Listed>> {
    let bytes = &mut bytes;
    let count = usize::try_from(take(bytes)?).ok()?;
    let mut listed = Vec::with_capacity(count.min(bytes.len()));
    for _ in 0..count {
        let group = u32::try_from(take(bytes)?).ok()?;
        let repaired = take(bytes)? == 1;
        let first = take(bytes)?;
        let last = first.checked_add(take(bytes)?)?;
        listed.push(Listed {
            group,
            repaired,
            first,
            last,
            bytes: take(bytes)?,
            at: u32::try_from(take(bytes)?).ok()?,
            length: u32::try_from(take(bytes)?).ok()?,
            leaders: leaders::take(bytes)?,
        });
    }
    bytes.is_empty().then_some(listed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot() -> impl Strategy<Value = Slot> {
        (any::<u32>(), any::<u32>(), 0..4_u8).prop_map(|(offset, length, kind)| Slot {
            offset,
            length,
            kind,
        })
    }

    proptest! {
        #[test]
        fn indexes_come_back(first: u64, slots in proptest::collection::vec(slot(), 0..50)) {
            let index = Index { first, slots };
            let bytes = index.encode();
            prop_assert_eq!(Index::decode(&bytes), Some(index));
            if let Some(short) = bytes.len().checked_sub(1) {
                prop_assert_eq!(Index::decode(&bytes[..short]), None);
            }
        }

        #[test]
        fn directories_come_back(numbers: Vec<(u32, bool, u32, u32, u64)>) {
            let runs: Vec<_> = numbers.into_iter().map(|(group, repaired, first, more, bytes)| {
                let first = u64::from(first);
                let leader = LogId { term: bytes, node: 3, index: first };
                Listed {
                    group, repaired, first, last: first + u64::from(more), bytes,
                    at: group, length: more, leaders: vec![leader],
                }
            }).collect();
            prop_assert_eq!(listed(&directory(&runs)), Some(runs));
        }

        #[test]
        fn garbage_does_not_panic(bytes: Vec<u8>) {
            let _ = Index::decode(&bytes);
            let _ = listed(&bytes);
        }
    }

    #[test]
    fn neighbours_of_one_size_take_two_bytes_each() {
        let slot = |n: u32| Slot {
            offset: 64 + n * 156,
            length: 100,
            kind: 1,
        };
        let slots = (0..1000).map(slot).collect();
        let bytes = Index { first: 7, slots }.encode();
        assert!(bytes.len() < 2020, "{}", bytes.len());
    }
}
