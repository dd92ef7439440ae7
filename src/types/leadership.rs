//! Who leads a Raft group.

use crate::types::NodeId;

/// Who leads a group, as one node knows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    pub leader: Option<NodeId>,
    pub term: u64,
}
