//! How many do what on a channel.

use crate::types::ChannelKey;

/// How many attachments of a channel may do what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub connections: u32,
    pub publishers: u32,
    pub subscribers: u32,
    /// Those that may enter members.
    pub presence_connections: u32,
    /// Those that hear of members.
    pub presence_subscribers: u32,
}

impl Counts {
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    fn each(self, other: Self, with: impl Fn(u32, u32) -> u32) -> Self {
        Self {
            connections: with(self.connections, other.connections),
            publishers: with(self.publishers, other.publishers),
            subscribers: with(self.subscribers, other.subscribers),
            presence_connections: with(self.presence_connections, other.presence_connections),
            presence_subscribers: with(self.presence_subscribers, other.presence_subscribers),
        }
    }

    /// The sum.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.each(other, u32::saturating_add)
    }

    /// What is left without `other`; nothing is less than none.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        self.each(other, u32::saturating_sub)
    }
}

/// A channel's occupancy as of a moment ago.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    pub counts: Counts,
    pub presence_members: u32,
}

/// What became of a channel in the eyes of its leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OccupancyChange {
    /// Nobody was attached, and somebody is.
    Opened(ChannelKey),
    /// Nobody is attached any more.
    Closed(ChannelKey),
}
