//! The life of one Raft group on this node: start, propose, follow the leader, read the log, stop.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{
    ClientWriteError, Fatal, InitializeError, LinearizableReadError, RaftError,
};
use openraft::{Config, EmptyNode, ReadPolicy, ServerState, SnapshotPolicy};
use tokio::sync::watch;

use crate::raft::host::Parts;
use crate::raft::log_store::{LogStore, normal_payload};
use crate::raft::machine::Adapter;
use crate::raft::network::Factory;
use crate::raft::{Machine, Options, Payload, Raft, Response};
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
    raft: Raft,
    log: GroupLog,
    leadership: watch::Receiver<Leadership>,
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
        let machine = Adapter::open(machine, parts.snapshots)
            .map_err(|source| Error::Storage { group: id, source })?;
        let factory = Factory {
            transport: parts.transport,
            group: id,
        };
        let log = LogStore(parts.log.clone());
        let raft = Raft::new(parts.node.0, config, factory, log, machine).await;
        let raft = raft.map_err(|err| failed(err.to_string()))?;
        let leadership = follow_leadership(id, &raft, tasks);
        Ok(Self {
            id,
            raft,
            log: parts.log,
            leadership,
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
    pub async fn transfer_to(&self, to: NodeId) {
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

    /// Stops the group on this node.
    pub async fn stop(&self) {
        if let Err(err) = self.raft.shutdown().await {
            tracing::warn!(group = %self.id, error = %err, "group did not stop cleanly");
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
        api_channel_size: Some(4096),
        backoff: "20ms 50ms 100ms 200ms ...500ms".to_owned(),
        ..Config::default()
    }
}

/// Tells who leads as it changes, and stops the node when the group has failed: a replica that cannot write its
/// log keeps no promise.
fn follow_leadership(id: GroupId, raft: &Raft, tasks: &Tasks) -> watch::Receiver<Leadership> {
    let (leadership_tx, leadership) = watch::channel(Leadership::default());
    let mut metrics = raft.metrics();
    tasks.spawn(
        "raft.leadership",
        OnError::StopNode,
        move |token| async move {
            loop {
                let (now, state) = {
                    let seen = metrics.borrow_watched();
                    let leads =
                        seen.state != ServerState::Leader || seen.current_leader == Some(seen.id);
                    let now = Leadership {
                        leader: seen.current_leader.filter(|_| leads).map(NodeId),
                        term: seen.current_term,
                    };
                    (now, seen.running_state.clone())
                };
                match state {
                    Ok(()) => {}
                    Err(Fatal::Stopped) => return Ok(()),
                    Err(err) => return Err(anyhow::anyhow!("{id}: {err}")),
                }
                leadership_tx.send_if_modified(|known| {
                    let changed = *known != now;
                    *known = now;
                    changed
                });
                tokio::select! {
                    () = token.cancelled() => return Ok(()),
                    changed = metrics.changed() => if changed.is_err() {
                    // A stopped group says so before it goes; one that panicked does not.
                    return match metrics.borrow_watched().running_state {
                        Err(Fatal::Stopped) => Ok(()),
                        _ => Err(anyhow::anyhow!("{id}: its task ended unexpectedly")),
                    };
                },
                }
            }
        },
    );
    leadership
}
