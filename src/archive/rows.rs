//! The bytes of an archive's rows, and the tally that proves them whole.
//!
//! A tree holds, all integers big-endian:
//! `e` channel(16) index(8) position(2) → the entry (45 bytes) ·
//! `k` channel(16) digest(16) → index(8) position(2) of the newest entry with that key · `t` → the tally (24 bytes).

use crate::channel::{Archived, ChannelId, Place};
use crate::stdx::stable_hash;

const ENTRY: u8 = b'e';
const KEY: u8 = b'k';
const PLACE_BYTES: usize = 10;
const ENTRY_BYTES: usize = 45;

/// Key of the tally's row.
pub(super) const TALLY: &[u8] = b"t";

/// Key of the row of the entry first stored at `first`; rows of a channel sort by it.
pub(super) fn entry_key(channel: ChannelId, first: Place) -> Vec<u8> {
    let mut key = Vec::with_capacity(27);
    key.push(ENTRY);
    key.extend_from_slice(&channel);
    key.extend_from_slice(&place(first));
    key
}

/// Key of the row that says where the channel's newest record with this digest is.
pub(super) fn digest_key(channel: ChannelId, digest: &[u8; 16]) -> Vec<u8> {
    let mut key = Vec::with_capacity(33);
    key.push(KEY);
    key.extend_from_slice(&channel);
    key.extend_from_slice(digest);
    key
}

pub(super) fn place(place: Place) -> [u8; PLACE_BYTES] {
    let mut bytes = [0; PLACE_BYTES];
    bytes[..8].copy_from_slice(&place.index.to_be_bytes());
    bytes[8..].copy_from_slice(&place.position.to_be_bytes());
    bytes
}

/// `None` when these are not the bytes of a place.
pub(super) fn parse_place(bytes: &[u8]) -> Option<Place> {
    let bytes: &[u8; PLACE_BYTES] = bytes.try_into().ok()?;
    let mut reader = Reader(bytes);
    Some(Place {
        index: u64::from_be_bytes(reader.take()?),
        position: u16::from_be_bytes(reader.take()?),
    })
}

/// The value of an entry's row: all of it but `first`, which is in the key.
pub(super) fn entry(entry: &Archived) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(ENTRY_BYTES);
    bytes.extend_from_slice(&place(entry.now));
    bytes.extend_from_slice(&entry.stamp_ms.to_be_bytes());
    bytes.extend_from_slice(&entry.retention_s.to_be_bytes());
    bytes.extend_from_slice(&entry.bytes.to_be_bytes());
    bytes.extend_from_slice(&entry.count.to_be_bytes());
    bytes.push(u8::from(entry.ephemeral) | u8::from(entry.presence) << 1);
    bytes.extend_from_slice(&entry.key);
    bytes
}

/// `None` when this is not a row that [`entry_key`] and [`entry`] wrote.
pub(super) fn parse_entry(key: &[u8], value: &[u8]) -> Option<Archived> {
    if value.len() != ENTRY_BYTES {
        return None;
    }
    let first = parse_place(key.get(17..)?)?;
    let now = parse_place(&value[..PLACE_BYTES])?;
    let mut reader = Reader(&value[PLACE_BYTES..]);
    let (stamp_ms, retention_s) = (reader.take()?, reader.take()?);
    let (bytes, count) = (reader.take()?, reader.take()?);
    let [flags] = reader.take()?;
    Some(Archived {
        first,
        now,
        stamp_ms: u64::from_be_bytes(stamp_ms),
        retention_s: u32::from_be_bytes(retention_s),
        bytes: u32::from_be_bytes(bytes),
        count: u16::from_be_bytes(count),
        ephemeral: flags & 1 != 0,
        presence: flags & 2 != 0,
        key: reader.take()?,
    })
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }
}

/// What the rows of a tree are, besides the tally itself: one row more or less, or one bit changed, shows (by chance
/// of 2⁻⁶⁴ it does not; it guards against loss, not against forgery).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Calls of `put` that are wholly in the rows.
    pub(super) mark: u64,
    rows: u64,
    /// Wrapping sum of the rows' hashes: the order does not matter.
    sum: u64,
}

impl Tally {
    /// That of a tree without rows.
    pub(super) fn of_none(mark: u64) -> Self {
        Self {
            mark,
            ..Self::default()
        }
    }

    pub(super) fn add(&mut self, key: &[u8], value: &[u8]) {
        self.rows = self.rows.wrapping_add(1);
        self.sum = self.sum.wrapping_add(hash(key, value));
    }

    pub(super) fn remove(&mut self, key: &[u8], value: &[u8]) {
        self.rows = self.rows.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(hash(key, value));
    }

    pub(super) fn to_bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.mark.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.rows.to_be_bytes());
        bytes[16..].copy_from_slice(&self.sum.to_be_bytes());
        bytes
    }

    /// `None` when these are not the bytes of a tally.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != 24 {
            return None;
        }
        let mut reader = Reader(bytes);
        Some(Self {
            mark: u64::from_be_bytes(reader.take()?),
            rows: u64::from_be_bytes(reader.take()?),
            sum: u64::from_be_bytes(reader.take()?),
        })
    }
}

fn hash(key: &[u8], value: &[u8]) -> u64 {
    stable_hash(&[key, value])
}
