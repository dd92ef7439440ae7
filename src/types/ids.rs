//! Identities of nodes, shards, Raft groups and tenants.

use std::fmt;
use std::str::FromStr;

/// A text that is not the identity it was meant to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct ParseIdError {
    text: String,
    expected: &'static str,
}

/// A broker process's permanent number in its cluster, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One of the cluster's shards, from 0. A channel belongs to exactly one for the cluster's whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(pub u32);

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A Raft group: the control group is 0, shard *s* is *s* + 1. The number is on disk and on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u32);

impl GroupId {
    pub const CONTROL: Self = Self(0);

    #[must_use]
    pub const fn of_shard(shard: ShardId) -> Self {
        Self(shard.0 + 1)
    }

    /// The shard this group replicates; `None` for the control group.
    #[must_use]
    pub const fn shard(self) -> Option<ShardId> {
        match self.0 {
            0 => None,
            n => Some(ShardId(n - 1)),
        }
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shard() {
            None => f.write_str("control"),
            Some(shard) => write!(f, "shard {shard}"),
        }
    }
}

/// A tenant: 1 to 32 ASCII letters, digits, `-` or `_`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AppId(String);

impl AppId {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AppId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if text.is_empty() || text.len() > 32 || !text.bytes().all(legal) {
            return Err(ParseIdError {
                text: text.chars().take(64).collect(),
                expected: "an app id (1 to 32 letters, digits, `-` or `_`)",
            });
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for AppId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_number_the_control_group_first() {
        assert_eq!(GroupId::CONTROL.shard(), None);
        assert_eq!(GroupId::of_shard(ShardId(3)).shard(), Some(ShardId(3)));
        assert_eq!(GroupId::of_shard(ShardId(0)).to_string(), "shard 0");
    }

    #[test]
    fn an_app_id_is_short_and_plain() {
        assert!("app-1_x".parse::<AppId>().is_ok());
        for bad in ["", "a.b", "a b", &"x".repeat(33)] {
            assert!(bad.parse::<AppId>().is_err(), "{bad}");
        }
    }
}
