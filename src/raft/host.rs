//! What every group of a node stands on.

use crate::raft::server::Server;
use crate::raft::{Error, Group, Machine, Options};
use crate::storage::{GroupLog, Log, SnapshotFile};
use crate::tasks::Tasks;
use crate::transport::Transport;
use crate::types::{GroupId, NodeId};

/// The node's log and its way to other nodes, with the groups started on them. Clones share them.
#[derive(Clone, Debug)]
pub struct Host {
    node: NodeId,
    log: Log,
    transport: Transport,
    server: Server,
}

/// What one group stands on.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) node: NodeId,
    pub(super) log: GroupLog,
    pub(super) snapshots: SnapshotFile,
    pub(super) transport: Transport,
}

impl Host {
    /// Answers Raft's calls on this transport from now on.
    #[must_use]
    pub fn new(node: NodeId, log: Log, transport: Transport) -> Self {
        let server = Server::default();
        server.register(&transport);
        Self {
            node,
            log,
            transport,
            server,
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
        options: &Options,
        tasks: &Tasks,
    ) -> Result<Group, Error> {
        let parts = Parts {
            node: self.node,
            log: self.log.group(id),
            snapshots: self.log.snapshot(id),
            transport: self.transport.clone(),
        };
        let group = Group::start(id, parts, machine, options, tasks).await?;
        self.server.add(group.clone());
        Ok(group)
    }

    #[must_use]
    pub const fn transport(&self) -> &Transport {
        &self.transport
    }
}
