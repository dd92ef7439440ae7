//! Numbers in as few bytes as they need: seven bits each, the lowest first.

/// Appends a number: 1 to 10 bytes.
pub(super) fn put(out: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push((number & 0x7f) as u8);
}

/// Takes a number from the front; `None` when there is none.
pub(super) fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None;
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Makes small numbers of either sign small: 0, -1, 1, -2, ...
pub(super) fn zigzag(number: i64) -> u64 {
    (number << 1 ^ number >> 63).cast_unsigned()
}

pub(super) fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ -(number & 1).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_come_back(numbers: Vec<u64>, signed: i64) {
            let mut bytes = Vec::new();
            for number in &numbers {
                put(&mut bytes, *number);
            }
            let mut left = &bytes[..];
            for number in numbers {
                prop_assert_eq!(take(&mut left), Some(number));
            }
            prop_assert_eq!((take(&mut left), unzigzag(zigzag(signed))), (None, signed));
        }

        #[test]
        fn garbage_does_not_panic(bytes: Vec<u8>) {
            let mut left = &bytes[..];
            while take(&mut left).is_some() {}
        }
    }
}
