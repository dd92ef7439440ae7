//! Serials: places in a channel's log, as clients see them.

use std::fmt;
use std::str::FromStr;

/// A place in a shard's log, and so in each of its channels.
///
/// Invariant: the text form is fixed-width, URL-safe (`[0-9a-f-]`) and orders like the value, which clients
/// may rely on. `incarnation` grows when a cluster is restored, so a restored cluster never repeats one.
/// `index` is the Raft log index of the entry, `position` the record's place in that entry, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Serial {
    pub incarnation: u16,
    pub index: u64,
    pub position: u16,
}

/// A text that is not a serial of this cluster's form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a serial")]
pub struct InvalidSerial;

impl Serial {
    /// Bytes of the text form: `iiii-nnnnnnnnnnnnnnnn-pppp`, all hexadecimal.
    pub const TEXT_BYTES: usize = 26;

    /// The serial of the message at `offset` within this record.
    #[must_use]
    pub const fn message(self, offset: u16) -> MessageSerial {
        MessageSerial {
            record: self,
            offset,
        }
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (incarnation, index, position) = (self.incarnation, self.index, self.position);
        write!(f, "{incarnation:04x}-{index:016x}-{position:04x}")
    }
}

impl FromStr for Serial {
    type Err = InvalidSerial;

    fn from_str(text: &str) -> Result<Self, InvalidSerial> {
        let bytes = text.as_bytes();
        if bytes.len() != Self::TEXT_BYTES || bytes[4] != b'-' || bytes[21] != b'-' {
            return Err(InvalidSerial);
        }
        Ok(Self {
            incarnation: u16::try_from(hex(&bytes[..4])?).map_err(|_| InvalidSerial)?,
            index: hex(&bytes[5..21])?,
            position: u16::try_from(hex(&bytes[22..])?).map_err(|_| InvalidSerial)?,
        })
    }
}

/// Lower-case hexadecimal only, so that every serial has exactly one text.
fn hex(digits: &[u8]) -> Result<u64, InvalidSerial> {
    digits.iter().try_fold(0, |value: u64, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return Err(InvalidSerial),
        };
        Ok(value << 4 | u64::from(digit))
    })
}

/// The permanent serial of one message: its record's serial and its offset in the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageSerial {
    pub record: Serial,
    pub offset: u16,
}

impl fmt::Display for MessageSerial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{:03}", self.record, self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn text_round_trips_and_orders_like_the_value(
            a in any::<(u16, u64, u16)>(), b in any::<(u16, u64, u16)>()
        ) {
            let serial = |(incarnation, index, position)| Serial { incarnation, index, position };
            let (a, b) = (serial(a), serial(b));
            prop_assert_eq!(a.to_string().parse::<Serial>(), Ok(a));
            prop_assert_eq!(a.to_string().len(), Serial::TEXT_BYTES);
            prop_assert_eq!(a.cmp(&b), a.to_string().cmp(&b.to_string()));
        }

        #[test]
        fn foreign_text_is_refused(text in "\\PC*") {
            if let Ok(serial) = text.parse::<Serial>() {
                prop_assert_eq!(serial.to_string(), text);
            }
        }
    }
}
