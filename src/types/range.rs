//! A stretch of a channel's records.

use crate::types::Serial;

/// What the records to read hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kinds {
    #[default]
    Messages,
    Presence,
    Both,
}

impl Kinds {
    /// Whether a record that holds presence events, or messages, is among them.
    #[must_use]
    pub const fn include(self, presence: bool) -> bool {
        match self {
            Self::Messages => !presence,
            Self::Presence => presence,
            Self::Both => true,
        }
    }
}

/// Which records of a channel to read: serials and stamps inclusive at both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub from: Option<Serial>,
    pub to: Option<Serial>,
    pub start_ms: u64,
    pub end_ms: u64,
    pub newest_first: bool,
}

impl Range {
    /// Everything retained, newest first.
    pub const ALL: Self = Self {
        from: None,
        to: None,
        start_ms: 0,
        end_ms: u64::MAX,
        newest_first: true,
    };
}
