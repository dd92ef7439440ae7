//! The house's side of openraft: its types, our encodings, our log, our network, and a group's life.
//!
//! Nothing outside this room names openraft: an alpha whose interfaces move with each release stays replaceable.

mod adapter;
mod codec;
mod group;
mod host;
mod keeper;
mod leadership;
mod log_store;
mod machine;
mod members;
mod mender;
mod network;
mod rebuild;
mod server;
#[cfg(test)]
mod tests;
mod throttle;

pub use group::{Error, Group, ProposeError};
pub use host::{Host, LogUsage};
pub use machine::{Machine, Replay, Response, Restored};

use std::fmt;
use std::time::Duration;

use bytes::Bytes;

/// How groups elect and replicate.
#[derive(Clone, Debug)]
pub struct Options {
    /// Pause between a leader's heartbeats.
    pub heartbeat: Duration,
    /// A follower campaigns after `election_max` without a leader plus a random time in
    /// `election_min..election_max`. Keep the window narrow, and `election_max` at least three times the
    /// slowest sync: a leader whose quorum syncs slower refuses publishes.
    pub election_min: Duration,
    pub election_max: Duration,
    /// Entries in one replication request.
    pub entries_max: u64,
    /// Bytes of log that a restart of the node replays at most for one group, about.
    pub checkpoint_bytes: u64,
    /// Bytes per second that this node sends to nodes which are catching up, all together. 0: no limit.
    pub catch_up_bytes_per_second: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(200),
            election_min: Duration::from_millis(400),
            election_max: Duration::from_millis(600),
            entries_max: 1024,
            checkpoint_bytes: 32 << 20,
            catch_up_bytes_per_second: 256 << 20,
        }
    }
}

/// What an entry carries: opaque to Raft.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Payload(pub(crate) Bytes);

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

openraft::declare_raft_types!(
    pub(crate) TypeConfig:
        D = Payload,
        R = Response,
        NodeId = u64,
        Node = openraft::EmptyNode,
);

type LogId = openraft::alias::LogIdOf<TypeConfig>;
type Vote = openraft::alias::VoteOf<TypeConfig>;
type Entry = openraft::alias::EntryOf<TypeConfig>;
type Membership = openraft::Membership<u64, openraft::EmptyNode>;
type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
type Raft = openraft::Raft<TypeConfig, adapter::Adapter>;
