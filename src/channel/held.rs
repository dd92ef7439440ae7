//! One retained record in memory, packed: there are millions of them.

use crate::channel::archive::{Archived, Place};
use crate::types::Serial;

/// First 16 bytes of the SHA-256 of an idempotency key behind a byte that tells its kind.
pub(super) type KeyDigest = [u8; 16];

/// Log indexes and stamps are kept in 48 bits: 890 years of 10,000 entries a second, and stamps to the year 10889.
pub(super) const UINT48_MAX: u64 = (1 << 48) - 1;

/// The flags beside 30 bits of seconds.
const EPHEMERAL: u32 = 1 << 31;
const PRESENCE: u32 = 1 << 30;
const FLAGS: u32 = EPHEMERAL | PRESENCE;

impl Place {
    pub(super) const MIN: Self = Self {
        index: 0,
        position: 0,
    };
    pub(super) const MAX: Self = Self {
        index: u64::MAX,
        position: u16::MAX,
    };

    /// The place right after this one.
    pub(super) const fn next(self) -> Self {
        match self.position.checked_add(1) {
            Some(position) => Self { position, ..self },
            None => Self {
                index: self.index.saturating_add(1),
                position: 0,
            },
        }
    }

    /// The place right before this one; the first has none.
    pub(super) const fn previous(self) -> Option<Self> {
        if let Some(position) = self.position.checked_sub(1) {
            return Some(Self { position, ..self });
        }
        match self.index.checked_sub(1) {
            Some(index) => Some(Self {
                index,
                position: u16::MAX,
            }),
            None => None,
        }
    }

    pub(super) const fn serial(self, incarnation: u16) -> Serial {
        Serial {
            incarnation,
            index: self.index,
            position: self.position,
        }
    }

    pub(super) const fn of(serial: Serial) -> Self {
        Self {
            index: serial.index,
            position: serial.position,
        }
    }
}

/// A retained record, without where it was moved to: few are, so that is kept aside.
///
/// Invariant: 40 bytes. With the lookup by key a record then stays below 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    index: [u8; 6],
    stamp_ms: [u8; 6],
    pub(super) key: KeyDigest,
    retention_s: u32,
    pub(super) bytes: u32,
    position: u16,
    pub(super) count: u16,
}

const _: () = assert!(size_of::<Held>() == 40);

impl Held {
    pub(super) fn new(record: &Archived) -> Self {
        let ephemeral = if record.ephemeral { EPHEMERAL } else { 0 };
        let presence = if record.presence { PRESENCE } else { 0 };
        Self {
            index: pack(record.first.index),
            stamp_ms: pack(record.stamp_ms),
            key: record.key,
            retention_s: record.retention_s | ephemeral | presence,
            bytes: record.bytes,
            position: record.first.position,
            count: record.count,
        }
    }

    /// The record, with its payload at `now`.
    pub(super) fn record(&self, now: Place) -> Archived {
        Archived {
            first: self.first(),
            now,
            stamp_ms: self.stamp_ms(),
            retention_s: self.retention_s & !FLAGS,
            bytes: self.bytes,
            count: self.count,
            ephemeral: self.retention_s & EPHEMERAL != 0,
            presence: self.retention_s & PRESENCE != 0,
            key: self.key,
        }
    }

    pub(super) fn first(&self) -> Place {
        Place {
            index: unpack(self.index),
            position: self.position,
        }
    }

    pub(super) fn stamp_ms(&self) -> u64 {
        unpack(self.stamp_ms)
    }

    pub(super) fn expires_ms(&self) -> u64 {
        expires_ms(self.stamp_ms(), self.retention_s & !FLAGS)
    }
}

/// Seconds that a retention is kept as: rounded up, and not more than fit beside the flags, which are 34 years.
pub(super) fn retention_s(retention_ms: u64) -> u32 {
    u32::try_from(retention_ms.div_ceil(1000))
        .unwrap_or(u32::MAX)
        .min(PRESENCE - 1)
}

pub(super) fn expires_ms(stamp_ms: u64, retention_s: u32) -> u64 {
    stamp_ms.saturating_add(u64::from(retention_s) * 1000)
}

fn pack(value: u64) -> [u8; 6] {
    debug_assert!(value <= UINT48_MAX, "checked when the entry came in");
    let [a, b, c, d, e, f, ..] = value.to_le_bytes();
    [a, b, c, d, e, f]
}

fn unpack([a, b, c, d, e, f]: [u8; 6]) -> u64 {
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn packing_loses_nothing(
            index in 0..=UINT48_MAX, position: u16, stamp_ms in 0..=UINT48_MAX, retention_ms: u64,
            bytes: u32, count: u16, ephemeral: bool, presence: bool, key: [u8; 16],
        ) {
            let first = Place { index, position };
            let retention_s = retention_s(retention_ms);
            let record =
                Archived { first, now: first, stamp_ms, retention_s, bytes, count, ephemeral, presence, key };
            prop_assert_eq!(Held::new(&record).record(first), record);
        }

        #[test]
        fn places_are_dense(index in 1..9_u64, position: u16) {
            let place = Place { index, position };
            prop_assert!(place.next() > place);
            prop_assert_eq!(place.next().previous(), Some(place));
        }
    }
}
