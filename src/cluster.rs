//! The node's part in the cluster: the control group and every shard, who leads them, the way to their leaders.
//!
//! Every node votes in every group (clusters of 1, 3 or 5 nodes); placement on a subset of more nodes comes with
//! membership changes.

mod balance;
mod control;
mod forward;
mod lane;
mod proposer;
mod registry;
mod replica;
mod start;

pub use control::CommandError;
pub use lane::{SubmitError, Submitted};
pub use registry::{BRIDGE_SLOTS, BridgeState, Registry};
pub use replica::{EventSink, ShardPage, StoredRecord};
pub use start::Parts;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, RwLockReadGuard};
use std::time::Duration;

use tokio::sync::watch;

use crate::channel::{RecordRef, Shard};
use crate::cluster::lane::Lane;
use crate::cluster::replica::State;
use crate::placement;
use crate::raft::{self, Group};
use crate::transport::{self, Transport};
use crate::types::{ChannelKey, GroupId, Leadership, NodeId, ShardId};
use crate::wire::{control as wire, entry};

/// What is known of a node without asking it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where clients reach it.
    pub url: String,
    /// Where operators reach it.
    pub admin: String,
}

/// How the cluster is put together.
#[derive(Clone, Debug)]
pub struct Options {
    pub node: NodeId,
    /// All nodes, this one among them.
    pub nodes: BTreeMap<NodeId, Peer>,
    /// Shards of the cluster; fixed at its creation, 1 to 256.
    pub shards: u32,
    /// What the cluster is born with; ignored by one that lives already.
    pub bootstrap: wire::Bootstrap,
    pub raft: raft::Options,
    /// Bytes of publishes that may wait for one shard on this node before publishers are refused.
    pub waiting_bytes_max: usize,
}

/// The cluster could not be joined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Raft(#[from] raft::Error),
    #[error("{0} nodes are configured; a cluster has 1, 3 or 5")]
    NodeCount(usize),
    #[error("the configuration says {configured} shards, the cluster was created with {created}")]
    Shards { configured: u32, created: u32 },
    #[error("the configuration says 0 or more than 256 shards: {0}")]
    ShardCount(u32),
    #[error("the node is stopping")]
    Stopping,
}

/// Why a read could not be answered; trying again later may help.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("no leader of the shard was reached in time")]
    NoLeader,
    #[error("this node's replica did not catch up in time")]
    Behind,
    #[error("the log could not be read: {0}")]
    Storage(#[from] io::Error),
}

/// A handle to the node's part in the cluster.
#[derive(Clone, Debug)]
pub struct Cluster(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: Options,
    transport: Transport,
    control: Group,
    registry: watch::Receiver<Arc<Registry>>,
    shards: Vec<Replica>,
}

/// One shard as this node holds it.
#[derive(Debug)]
struct Replica {
    group: Group,
    state: State,
    applied: watch::Receiver<u64>,
    lane: Lane,
}

impl Cluster {
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.0.options.node
    }

    #[must_use]
    pub fn nodes(&self) -> &BTreeMap<NodeId, Peer> {
        &self.0.options.nodes
    }

    /// The registry, as it changes.
    #[must_use]
    pub fn registry(&self) -> watch::Receiver<Arc<Registry>> {
        self.0.registry.clone()
    }

    #[must_use]
    pub fn shard_of(&self, key: &ChannelKey) -> ShardId {
        placement::shard_of(key, self.0.options.shards)
    }

    /// All shards, in order.
    pub fn shards(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.0.options.shards).map(ShardId)
    }

    /// Who leads the shard, as this node knows it.
    #[must_use]
    pub fn leadership(&self, shard: ShardId) -> watch::Receiver<Leadership> {
        self.replica(shard).group.leadership()
    }

    /// Who leads the control group, as this node knows it.
    #[must_use]
    pub fn control_leadership(&self) -> watch::Receiver<Leadership> {
        self.0.control.leadership()
    }

    /// Sends a publish to its shard's leader; the order of calls is the order in the log.
    ///
    /// # Errors
    /// `Busy` when too much waits; the returned receiver tells everything else.
    pub fn submit(
        &self,
        shard: ShardId,
        publish: entry::Publish,
    ) -> Result<Submitted, SubmitError> {
        self.replica(shard).lane.submit(publish)
    }

    /// The shard's state as applied on this node. Hold it briefly: applying waits for it.
    pub fn state(&self, shard: ShardId) -> RwLockReadGuard<'_, Shard> {
        self.replica(shard).state.read()
    }

    /// Newest log index applied on this node, as it grows.
    #[must_use]
    pub fn applied(&self, shard: ShardId) -> watch::Receiver<u64> {
        self.replica(shard).applied.clone()
    }

    /// Reads records from the log. May read the disk: call it where blocking is allowed.
    ///
    /// # Errors
    /// When the log is damaged or no longer reaches back that far.
    pub fn read_records(
        &self,
        shard: ShardId,
        refs: &[RecordRef],
    ) -> io::Result<Vec<StoredRecord>> {
        replica::read_records(&self.replica(shard).group, refs)
    }

    /// Reads accepted records after log index `after`, about `max_bytes` of them. May read the disk.
    ///
    /// # Errors
    /// When the log is damaged or no longer reaches back that far.
    pub fn read_shard(
        &self,
        shard: ShardId,
        after: u64,
        max_bytes: usize,
    ) -> io::Result<ShardPage> {
        let replica = self.replica(shard);
        replica::read_page(&replica.group, &replica.state, after, max_bytes)
    }

    /// Waits until this node's replica shows everything acknowledged anywhere before this call.
    ///
    /// # Errors
    /// When that could not be had within `patience`.
    pub async fn catch_up(&self, shard: ShardId, patience: Duration) -> Result<(), ReadError> {
        let until = tokio::time::Instant::now() + patience;
        let index = tokio::time::timeout_at(until, self.read_index(shard)).await;
        let index = index.map_err(|_| ReadError::NoLeader)?;
        let mut applied = self.applied(shard);
        let caught_up = applied.wait_for(|applied| *applied >= index);
        match tokio::time::timeout_at(until, caught_up).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(ReadError::Behind),
        }
    }

    /// Other nodes that can be reached at the moment.
    #[must_use]
    pub fn reachable(&self) -> BTreeSet<NodeId> {
        self.0.transport.reachable().borrow().clone()
    }

    fn replica(&self, shard: ShardId) -> &Replica {
        let at = usize::try_from(shard.0).expect("a u32 fits a usize here");
        &self.0.shards[at]
    }

    fn group(&self, id: GroupId) -> &Group {
        match id.shard() {
            None => &self.0.control,
            Some(shard) => &self.replica(shard).group,
        }
    }
}

/// Service numbers on the wire, for ever. 16 is the forwarding of publishes.
const READ_INDEX: transport::Service = transport::Service(17);
const CONTROL: transport::Service = transport::Service(18);
const ALIVE: transport::Service = transport::Service(19);
