//! How far a shard has been exported, as the cursor topic keeps it.

use serde::{Deserialize, Serialize};

/// Version this build writes, and the newest it reads.
const VERSION: u32 = 1;

/// Every record of the shard up to and including `index` has been exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Cursor {
    pub(super) incarnation: u16,
    /// Raft log index; 0 before the first.
    pub(super) index: u64,
}

/// A cursor record this build cannot act on. Guessing would lose or double messages.
#[derive(Debug, thiserror::Error)]
pub(super) enum InvalidCursor {
    #[error("cursor record is damaged: {0}")]
    Damaged(#[from] serde_json::Error),
    #[error("cursor record has version {0}, newer than {VERSION}")]
    Newer(u32),
}

/// JSON, so that an operator can read it with any Kafka tool.
#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    incarnation: u16,
    index: u64,
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

impl Cursor {
    /// The value of the cursor record.
    #[must_use]
    pub(super) fn encode(self) -> String {
        let Self { incarnation, index } = self;
        format!("{{\"version\":{VERSION},\"incarnation\":{incarnation},\"index\":{index}}}")
    }

    /// # Errors
    /// When the value is no cursor, or one of a newer version.
    pub(super) fn decode(value: &[u8]) -> Result<Self, InvalidCursor> {
        let Versioned { version } = serde_json::from_slice(value)?;
        if version > VERSION {
            return Err(InvalidCursor::Newer(version));
        }
        let Stored {
            incarnation, index, ..
        } = serde_json::from_slice(value)?;
        Ok(Self { incarnation, index })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn comes_back(incarnation in any::<u16>(), index in any::<u64>()) {
            let cursor = Cursor { incarnation, index };
            prop_assert_eq!(Cursor::decode(cursor.encode().as_bytes()).unwrap(), cursor);
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert!(matches!(
            Cursor::decode(br#"{"version":2,"place":"elsewhere"}"#),
            Err(InvalidCursor::Newer(2))
        ));
        for bad in ["", "7", "{}", r#"{"version":1,"index":3}"#] {
            assert!(
                matches!(
                    Cursor::decode(bad.as_bytes()),
                    Err(InvalidCursor::Damaged(_))
                ),
                "{bad}"
            );
        }
    }
}
