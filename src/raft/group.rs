//! The life of one Raft group on this node: start, propose, follow the leader, read the log, stop.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ClientWriteError, InitializeError, LinearizableReadError, RaftError};
use openraft::{Config, EmptyNode, ReadPolicy, SnapshotPolicy};
use tokio::sync::watch;

use crate::raft::adapter::Adapter;
use crate::raft::host::Parts;
use crate::raft::keeper::Keeper;
use crate::raft::log_store::{LogStore, normal_payload};
use crate::raft::mender::Health;
use crate::raft::network::Factory;
use crate::raft::rebuild::other_outline;
use crate::raft::{Machine, Options, Payload, Raft, Response, leadership};
use crate::storage::GroupLog;
use crate::tasks::{OnError, Tasks};
use crate::types::{GroupId, Leadership, NodeId};

/// A group that could not be started or has stopped for good.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{group}: {source}")]
    Storage { group: GroupId, source: io::Error },
    #[error("{group}: {reason}")]
    Raft { group: GroupId, reason: String },
}

/// How long a snapshot may take in all; each of its parts has a deadline of its own.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(3600);

/// Why a proposal has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// This node does not lead, or cannot reach a majority. The entry was not appended.
    #[error("not proposed: the leader is {}", .0.map_or("not known".to_owned(), |node| format!("node {node}")))]
    NotLeader(Option<NodeId>),
    /// Leadership was lost meanwhile: the entry may have been committed or may yet be.
    #[error("leadership was lost; the entry may or may not be committed")]
    Indeterminate,
    /// The group has stopped on this node; the entry may have been committed.
    #[error("the group has stopped: {0}")]
    Stopped(String),
}

/// A handle to a group on this node.
#[derive(Clone)]
pub struct Group {
    id: GroupId,
    pub(super) raft: Raft,
    pub(super) log: GroupLog,
    pub(super) adapter: Adapter,
    leadership: watch::Receiver<Leadership>,
    health: Health,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Group {
    /// Starts the group where its log and snapshot left it.
    ///
    /// # Errors
    /// When log or snapshot cannot be read or applied.
    pub(super) async fn start(
        id: GroupId,
        parts: Parts,
        machine: Box<dyn Machine>,
        options: &Options,
        tasks: &Tasks,
    ) -> Result<Self, Error> {
        let failed = |reason: String| Error::Raft { group: id, reason };
        let config = config(id, options).validate();
        let config = Arc::new(config.map_err(|err| failed(err.to_string()))?);
        let storage = |source| Error::Storage { group: id, source };
        let opened = Adapter::open(machine, parts.snapshots.clone(), parts.log.clone());
        let (adapter, usable) = opened.map_err(storage)?;
        if !usable {
            let (meta, outline) = other_outline(id, &parts).await;
            adapter.adopt(&meta, outline).await.map_err(storage)?;
        }
        let factory = Factory {
            transport: parts.transport.clone(),
            group: id,
            catch_up: parts.catch_up,
        };
        let store = LogStore(parts.log.clone());
        let raft = Raft::new(parts.node.0, config, factory, store, adapter.clone()).await;
        let raft = raft.map_err(|err| failed(err.to_string()))?;
        raft.runtime_config()
            .elect(parts.health.load(Ordering::Acquire));
        let leadership = leadership::follow(id, &raft, parts.transport, tasks);
        let keeper = Keeper {
            raft: raft.clone(),
            adapter: adapter.clone(),
            log: parts.log.clone(),
            checkpoint_bytes: options.checkpoint_bytes,
            turns: parts.turns,
        };
        tasks.spawn("raft.keeper", OnError::StopNode, move |token| {
            keeper.run(id, token)
        });
        Ok(Self {
            id,
            raft,
            log: parts.log,
            adapter,
            leadership,
            health: parts.health,
        })
    }

    /// Gives the group its first voters; `false` when it has voters already.
    ///
    /// # Errors
    /// When the group has stopped.
    pub async fn initialize(&self, voters: &BTreeSet<NodeId>) -> Result<bool, Error> {
        let voters = voters.iter().map(|node| (node.0, EmptyNode::new()));
        match self
            .raft
            .initialize(voters.collect::<BTreeMap<_, _>>())
            .await
        {
            Ok(()) => Ok(true),
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(false),
            Err(err) => Err(self.failed(&err)),
        }
    }

    /// Proposes an entry and waits until it is applied here: durable on a majority then.
    ///
    /// # Errors
    /// See [`ProposeError`]: only `NotLeader` says that nothing was stored.
    pub async fn propose(&self, payload: Bytes) -> Result<(u64, Response), ProposeError> {
        match self.raft.client_write(Payload(payload)).await {
            Ok(written) => Ok((written.log_id.index, written.data)),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to))) => {
                Err(ProposeError::NotLeader(to.leader_id.map(NodeId)))
            }
            Err(RaftError::APIError(_)) => Err(ProposeError::Indeterminate),
            Err(RaftError::Fatal(err)) => Err(ProposeError::Stopped(err.to_string())),
        }
    }

    /// The log index a reader must have applied to see everything acknowledged before this call; `None` when
    /// this node does not lead or cannot reach a majority.
    pub async fn read_index(&self) -> Option<u64> {
        match self.raft.get_read_log_id(ReadPolicy::ReadIndex).await {
            Ok((read, _)) => Some(read.index()),
            Err(
                RaftError::APIError(
                    LinearizableReadError::ForwardToLeader(_)
                    | LinearizableReadError::QuorumNotEnough(_),
                )
                | RaftError::Fatal(_),
            ) => None,
        }
    }

    /// Asks `to` to take the leadership over. The caller makes sure that it is reachable and a voter: a
    /// transfer to a dead node leaves the group without a leader until an election.
    ///
    /// Does nothing while the group's voters are being changed: the change would be left half done.
    pub async fn transfer_to(&self, to: NodeId) {
        if self.is_changing() {
            return;
        }
        // An error is a stopped group, which the leadership task reports.
        let _ = self.raft.trigger().transfer_leader(to.0).await;
    }

    /// Whether `node` holds everything this leader has; `false` when this node does not lead.
    #[must_use]
    pub fn is_caught_up(&self, node: NodeId) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let Some(matching) = metrics
            .replication
            .as_ref()
            .and_then(|all| all.get(&node.0))
        else {
            return false;
        };
        matching.as_ref().map(|id| id.index) >= metrics.last_log_index
    }

    /// Who leads, as it changes.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.clone()
    }

    /// Whether this node leads, as far as it knows.
    #[must_use]
    pub fn leads(&self) -> bool {
        let leader = self.leadership.borrow().leader;
        leader.is_some_and(|leader| self.is_me(leader))
    }

    pub(super) fn is_me(&self, node: NodeId) -> bool {
        node.0 == *self.raft.node_id()
    }

    /// Committed commands from `first` on, with their log indexes, about `max_bytes` of them but at least one,
    /// none past `last`. The caller knows that `last` is applied. May read the disk.
    ///
    /// # Errors
    /// When the log cannot be read or no longer reaches back to `first`.
    pub fn read_log(
        &self,
        first: u64,
        last: u64,
        max_bytes: usize,
    ) -> io::Result<Vec<(u64, Option<Bytes>)>> {
        if first > last {
            return Ok(Vec::new());
        }
        let entries = self.log.read(first..last + 1, max_bytes)?;
        let entries = entries.into_iter();
        Ok(entries
            .map(|entry| (entry.id.index, normal_payload(entry)))
            .collect())
    }

    /// Stops the group on this node, where a restart goes on without replaying anything.
    pub async fn stop(&self) {
        if let Err(err) = self.raft.shutdown().await {
            tracing::warn!(group = %self.id, error = %err, "group did not stop cleanly");
        }
        if let Err(err) = self.adapter.checkpoint().await {
            tracing::warn!(group = %self.id, error = %err, "no last checkpoint was made");
        }
    }

    /// The log index of the oldest entry here, if there is one.
    #[must_use]
    pub fn log_first(&self) -> Option<u64> {
        self.log.first()
    }

    /// Payload bytes of the log as it is here.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.log.bytes()
    }

    /// Segments of the node's log that begin after the group's oldest entry: what purging may set free.
    #[must_use]
    pub fn newer_segments(&self) -> usize {
        self.log.newer_segments()
    }

    /// # Errors
    /// While the replica cannot prove its log.
    pub(super) fn may_vote(&self) -> Result<(), String> {
        match self.health.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(format!("{}: this replica's log is being repaired", self.id)),
        }
    }

    #[must_use]
    pub const fn id(&self) -> GroupId {
        self.id
    }

    pub(super) const fn raft(&self) -> &Raft {
        &self.raft
    }

    fn failed(&self, err: &dyn fmt::Display) -> Error {
        Error::Raft {
            group: self.id,
            reason: err.to_string(),
        }
    }
}

fn config(id: GroupId, options: &Options) -> Config {
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Config {
        cluster_name: id.to_string(),
        heartbeat_interval: millis(options.heartbeat),
        heartbeat_min_interval: Some(millis(options.heartbeat / 2)),
        election_timeout_min: millis(options.election_min),
        election_timeout_max: millis(options.election_max),
        enable_pre_vote: Some(true),
        // A restarted leader must not believe that it still leads.
        enable_leader_restore: Some(false),
        // The log is the data: it goes when retention says so, never because a snapshot was taken.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        max_payload_entries: options.entries_max,
        // Each part of a snapshot has its own deadline.
        install_snapshot_timeout: millis(SNAPSHOT_PATIENCE),
        api_channel_size: Some(4096),
        backoff: "20ms 50ms 100ms 200ms ...500ms".to_owned(),
        ..Config::default()
    }
}
