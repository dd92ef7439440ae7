//! A hash that is the same on every machine, build and release: what shards and slots are chosen by.

/// FNV-1a with 64 bits, finished with a multiply-shift so that the low bits may be used.
/// Each part is followed by a byte that UTF-8 never holds, so `["a", "b"]` and `["ab"]` differ.
///
/// Source: <https://www.rfc-editor.org/rfc/rfc9923> (FNV), the finisher of `MurmurHash3` (`fmix64`).
#[must_use]
pub fn stable_hash(parts: &[&[u8]]) -> u64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(PRIME);
    let hash = parts.iter().fold(OFFSET, |hash, part| {
        step(part.iter().copied().fold(hash, step), 0xff)
    });
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// These values place channels on shards in every cluster there is: they may never change.
    #[test]
    fn values_are_frozen() {
        assert_eq!(stable_hash(&[]), stable_hash(&[]));
        assert_ne!(stable_hash(&[b"a", b"b"]), stable_hash(&[b"ab"]));
        assert_eq!(stable_hash(&[b"app", b"channel"]), FROZEN);
    }

    const FROZEN: u64 = 10_582_504_019_182_541_270;

    #[test]
    fn low_bits_spread() {
        let mut seen = [0_u32; 16];
        for n in 0..16_000 {
            seen[usize::try_from(stable_hash(&[format!("channel-{n}").as_bytes()]) % 16)
                .unwrap()] += 1;
        }
        assert!(seen.iter().all(|n| (850..1150).contains(n)), "{seen:?}");
    }
}
