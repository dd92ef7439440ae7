//! The node's part in the cluster: the control group and every shard, who leads them, the way to their leaders.
//!
//! Every node votes in every group (clusters of 1, 3 or 5 nodes); placement on a subset of more nodes comes with
//! membership changes.

mod admission;
mod apps;
mod attendance;
mod balance;
mod clock;
mod compare;
mod control;
mod forward;
mod lane;
mod occupancy;
mod proposer;
mod readmit;
mod registry;
mod relay;
mod replica;
mod start;
mod taken;
mod telling;
mod upkeep;

pub use apps::AppError;
pub use attendance::left_id;
pub use clock::Clock;
pub use control::CommandError;
pub use lane::{SubmitError, Submitted};
pub use readmit::{ReadmitError, Standing};
pub use registry::{BRIDGE_SLOTS, BridgeState, Registry};
pub use relay::Answer as Relaying;
pub use replica::{EventSink, ShardPage, StoredRecord};
pub use start::Parts;
pub use taken::Taken;
pub use telling::Occupying;
pub use upkeep::Options as UpkeepOptions;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLockReadGuard};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use crate::channel::{RecordRef, Shard};
use crate::cluster::attendance::Pulses;
use crate::cluster::lane::Lane;
use crate::cluster::relay::Relay;
use crate::cluster::replica::State;
use crate::cluster::taken::OnTaken;
use crate::cluster::telling::Occupancy;
use crate::cluster::upkeep::Exported;
use crate::placement;
use crate::raft::{self, Group, Host, LogUsage};
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
    pub upkeep: UpkeepOptions,
    /// Records of one shard whose index entries are kept in memory; those of older ones are on disk.
    pub records_in_memory_max: usize,
    /// Bytes of publishes that may wait for one shard on this node before publishers are refused.
    pub waiting_bytes_max: usize,
    /// What leaders stamp entries with.
    pub clock: Clock,
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
    #[error(
        "the cluster knows {node} with data directory {registered}, this one is {found}: one of the two was copied or \
         readmitted since"
    )]
    OtherDirectory {
        node: NodeId,
        registered: String,
        found: String,
    },
    #[error("the log cannot be read: {0}")]
    Log(#[source] io::Error),
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
    #[error(transparent)]
    State(#[from] crate::channel::ReadError),
}

/// A handle to the node's part in the cluster.
#[derive(Clone, Debug)]
pub struct Cluster(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: Options,
    transport: Transport,
    host: Host,
    control: Group,
    registry: watch::Receiver<Arc<Registry>>,
    /// Empty until this node takes part in them.
    shards: OnceLock<Vec<Replica>>,
    /// Tells this node's data directory from every other.
    directory: String,
    /// Drawn at the start: tells this process from every other of the node.
    boot: u64,
    pulses: Pulses,
    on_taken: OnTaken,
    relay: Relay,
    occupancy: Occupancy,
    /// Comparisons of states that agreed, and that did not.
    compared: AtomicU64,
    differed: AtomicU64,
    readers: Arc<Semaphore>,
    /// Nodes that said they are stopping, and when.
    leaving: Mutex<BTreeMap<NodeId, tokio::time::Instant>>,
}

/// How long a reader waits for damaged records to be had from other nodes, and how often that is looked at.
const MEND_PATIENCE: Duration = Duration::from_secs(5);
const MEND_LOOK: Duration = Duration::from_millis(50);

/// Pages of the log read at a time.
const READERS: usize = 16;

/// One shard as this node holds it.
#[derive(Debug)]
struct Replica {
    group: Group,
    state: State,
    applied: watch::Receiver<u64>,
    lane: Lane,
    exported: Exported,
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

    /// The time that this node stamps entries with, milliseconds since 1970.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.0.options.clock.now_ms()
    }

    /// Newest log index applied on this node, as it grows.
    #[must_use]
    pub fn applied(&self, shard: ShardId) -> watch::Receiver<u64> {
        self.replica(shard).applied.clone()
    }

    /// Reads records from the log, in the order of `refs`: fewer when they are large, but at least one. Few readers at
    /// a time hold pages of the log; others wait their turn.
    ///
    /// # Errors
    /// When the log is damaged or no longer reaches back that far.
    pub async fn read_records(
        &self,
        shard: ShardId,
        refs: Vec<RecordRef>,
    ) -> io::Result<Vec<StoredRecord>> {
        let until = tokio::time::Instant::now() + MEND_PATIENCE;
        loop {
            match self.read_records_once(shard, refs.clone()).await {
                // Damaged here: other nodes are being asked for it.
                Err(err)
                    if err.kind() == io::ErrorKind::InvalidData && until.elapsed().is_zero() =>
                {
                    tokio::time::sleep(MEND_LOOK).await;
                }
                read => return read,
            }
        }
    }

    async fn read_records_once(
        &self,
        shard: ShardId,
        refs: Vec<RecordRef>,
    ) -> io::Result<Vec<StoredRecord>> {
        let stopping = |_| io::Error::other("the node is stopping");
        let turn = self.0.readers.clone().acquire_owned().await;
        let turn = turn.map_err(|err| io::Error::other(err.to_string()))?;
        let cluster = self.clone();
        let read = tokio::task::spawn_blocking(move || {
            let records = replica::read_records(&cluster.replica(shard).group, &refs);
            drop(turn);
            records
        });
        read.await.map_err(stopping)?
    }

    /// Reads accepted messages after log index `after`, about `max_bytes` of them. May read the disk.
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

    /// What this node's log holds and has done since its start.
    #[must_use]
    pub fn log_usage(&self) -> LogUsage {
        self.0.host.log_usage()
    }

    /// The shard's log on this node: its first index, and its bytes.
    #[must_use]
    pub fn log_of(&self, shard: ShardId) -> (Option<u64>, u64) {
        let group = &self.replica(shard).group;
        (group.log_first(), group.log_bytes())
    }

    /// Comparisons with the other replicas' states since the start: how many agreed, and how many did not.
    #[must_use]
    pub fn comparisons(&self) -> (u64, u64) {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (count(&self.0.compared), count(&self.0.differed))
    }

    /// Everything in the shard's log up to `index` is where the bridge carries it: the log need not be kept for it.
    pub fn exported(&self, shard: ShardId, bridge: &str, index: u64) {
        self.replica(shard).exported.advance(bridge, index);
    }

    fn has_shards(&self) -> bool {
        self.0.shards.get().is_some()
    }

    fn replicas(&self) -> &[Replica] {
        self.0.shards.get().map_or(&[], Vec::as_slice)
    }

    fn replica(&self, shard: ShardId) -> &Replica {
        let at = usize::try_from(shard.0).expect("a u32 fits a usize here");
        &self.replicas()[at]
    }

    /// `None` for a group that is not here, or not yet.
    fn known_group(&self, id: GroupId) -> Option<&Group> {
        match id.shard() {
            None => Some(&self.0.control),
            Some(shard) => {
                let at = usize::try_from(shard.0).ok()?;
                self.replicas().get(at).map(|replica| &replica.group)
            }
        }
    }

    fn group(&self, id: GroupId) -> &Group {
        self.known_group(id)
            .expect("asked for only after the node takes part in its shards")
    }
}

/// Service numbers on the wire, for ever. 16 is the forwarding of publishes, 21 admission, 22 membership, 23 digests, 24
/// whose process lives.
const READ_INDEX: transport::Service = transport::Service(17);
const CONTROL: transport::Service = transport::Service(18);
const ALIVE: transport::Service = transport::Service(19);
const LEAVING_SERVICE: transport::Service = transport::Service(20);
