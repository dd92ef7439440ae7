//! What every group of a node stands on.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::raft::log_store::normal_payload;
use crate::raft::mender::{Health, Healths, Mender};
use crate::raft::server::Server;
use crate::raft::throttle::Throttle;
use crate::raft::{Error, Group, Machine, Options};
use crate::storage::{GroupLog, Log, SnapshotFile};
use crate::tasks::{OnError, Tasks};
use crate::transport::Transport;
use crate::types::{GroupId, NodeId};

/// The node's log and its way to other nodes, with the groups started on them. Clones share them.
#[derive(Clone, Debug)]
pub struct Host {
    node: NodeId,
    log: Log,
    transport: Transport,
    server: Server,
    /// Checkpoints being made at a time: each holds a state's bytes in memory.
    turns: Arc<Semaphore>,
    catch_up: Throttle,
    healths: Healths,
    options: Options,
}

const CHECKPOINTS: usize = 2;

/// What a node's log holds, and what it has done since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogUsage {
    pub segments: usize,
    /// What the segments' files take.
    pub bytes_on_disk: u64,
    /// Entries that were damaged or lost and are being had from other nodes.
    pub unreadable_entries: u64,
    pub syncs: u64,
    /// Times that all sealed segments were read and verified in the background, and bytes of it.
    pub scrub_rounds: u64,
    pub scrubbed_bytes: u64,
}

/// What one group stands on.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) node: NodeId,
    pub(super) log: GroupLog,
    pub(super) snapshots: SnapshotFile,
    pub(super) transport: Transport,
    pub(super) turns: Arc<Semaphore>,
    pub(super) catch_up: Throttle,
    pub(super) health: Health,
}

impl Host {
    /// Answers Raft's calls on this transport from now on.
    #[must_use]
    pub fn new(
        node: NodeId,
        log: Log,
        transport: Transport,
        options: Options,
        tasks: &Tasks,
    ) -> Self {
        let server = Server::new(log.clone());
        server.register(&transport);
        let healths = Healths::default();
        let (known, way) = (healths.clone(), transport.clone());
        let mender = Mender::new(log.clone(), way, server.clone(), known);
        tasks.spawn("raft.mender", OnError::StopNode, |token| mender.run(token));
        Self {
            node,
            log,
            transport,
            server,
            turns: Arc::new(Semaphore::new(CHECKPOINTS)),
            catch_up: Throttle::new(options.catch_up_bytes_per_second),
            healths,
            options,
        }
    }

    /// Starts a group where its log and snapshot left it.
    ///
    /// # Errors
    /// When log or snapshot cannot be read or applied.
    pub async fn start(
        &self,
        id: GroupId,
        machine: Box<dyn Machine>,
        tasks: &Tasks,
    ) -> Result<Group, Error> {
        let parts = Parts {
            node: self.node,
            log: self.log.group(id),
            snapshots: self.log.snapshot(id),
            transport: self.transport.clone(),
            turns: self.turns.clone(),
            catch_up: self.catch_up.clone(),
            health: self.healths.of(id),
        };
        let group = Group::start(id, parts, machine, &self.options, tasks).await?;
        self.server.add(group.clone());
        Ok(group)
    }

    /// Whether nothing was ever decided in the group's log on this node: no command stands in it, nor did.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub fn is_unborn(&self, id: GroupId) -> std::io::Result<bool> {
        /// A founding takes fewer entries.
        const ENTRIES: u64 = 16;
        let log = self.log.group(id);
        if log.purged().is_some() || log.last().is_some_and(|last| last.index >= ENTRIES) {
            return Ok(false);
        }
        let entries = log.read(0..ENTRIES, usize::MAX)?;
        Ok(entries
            .into_iter()
            .all(|entry| normal_payload(entry).is_none()))
    }

    /// What the node's log holds and has done since it was opened.
    #[must_use]
    pub fn log_usage(&self) -> LogUsage {
        let stats = self.log.stats();
        LogUsage {
            segments: stats.segments,
            bytes_on_disk: stats.bytes_on_disk,
            unreadable_entries: stats.holes,
            syncs: stats.syncs,
            scrub_rounds: stats.scrub_rounds,
            scrubbed_bytes: stats.scrubbed_bytes,
        }
    }

    /// Tells the node's data directory from every other.
    #[must_use]
    pub fn directory(&self) -> &str {
        self.log.directory_id()
    }

    #[must_use]
    pub const fn transport(&self) -> &Transport {
        &self.transport
    }
}
