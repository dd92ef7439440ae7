//! Putting the node's part of the cluster together, and taking it apart.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::cluster::forward::Door;
use crate::cluster::lane::{Lane, Ways};
use crate::cluster::proposer::Proposer;
use crate::cluster::registry::ControlMachine;
use crate::cluster::replica::{EventSink, ShardMachine, State};
use crate::cluster::{Cluster, Error, Inner, Options, Replica, balance, control};
use crate::raft::{Group, Host, Machine};
use crate::stdx::ByteBudget;
use crate::tasks::{OnError, Tasks};
use crate::types::{GroupId, NodeId, ShardId};

/// Bumped when a cluster is restored from a backup, so that no serial repeats.
const INCARNATION: u16 = 1;

/// How often a node that is catching up at its start says so.
const CATCH_UP_REPORT: Duration = Duration::from_secs(5);

/// What the cluster stands on.
pub struct Parts {
    pub host: Host,
    /// Hears of every record applied on this node.
    pub sink: Arc<dyn EventSink>,
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").finish_non_exhaustive()
    }
}

impl Cluster {
    /// Starts every group where its log left it, and begins to take part. Returns before anything is led.
    ///
    /// # Errors
    /// When the options contradict themselves or a group cannot start.
    pub async fn start(options: Options, parts: Parts, tasks: &Tasks) -> Result<Self, Error> {
        if ![1, 3, 5].contains(&options.nodes.len()) {
            return Err(Error::NodeCount(options.nodes.len()));
        }
        if options.shards == 0 || options.shards > 256 {
            return Err(Error::ShardCount(options.shards));
        }
        let transport = parts.host.transport().clone();
        let start = Starter {
            options: &options,
            parts: &parts,
            tasks,
        };
        let (machine, registry, _) = ControlMachine::new();
        let control = start.group(GroupId::CONTROL, Box::new(machine)).await?;
        let mut shards = Vec::new();
        let mut proposers = Vec::new();
        for shard in (0..options.shards).map(ShardId) {
            let (replica, proposer) = start.shard(shard).await?;
            shards.push(replica);
            proposers.push(proposer);
        }
        Door { proposers }.register(&transport);
        let cluster = Self(Arc::new(Inner {
            options,
            transport,
            control,
            registry,
            shards,
        }));
        control::start(&cluster, tasks);
        balance::start(&cluster, tasks);
        cluster.initialize().await?;
        Ok(cluster)
    }

    /// The node with the lowest number gives groups that never had any their first voters.
    async fn initialize(&self) -> Result<(), Error> {
        let voters: BTreeSet<NodeId> = self.nodes().keys().copied().collect();
        if voters.first() != Some(&self.node()) {
            return Ok(());
        }
        self.0.control.initialize(&voters).await?;
        for replica in &self.0.shards {
            replica.group.initialize(&voters).await?;
        }
        Ok(())
    }

    /// Waits until the cluster is born, each group has a leader, and this node shows what was acknowledged before:
    /// a client that attached earlier would take the past for news.
    ///
    /// # Errors
    /// When the cluster was created with other settings than this node's.
    pub async fn ready(&self) -> Result<(), Error> {
        let mut registry = self.registry();
        let born = registry
            .wait_for(|registry| registry.bootstrap.is_some())
            .await;
        let created = born.map_err(|_| Error::Stopping)?;
        let created = created
            .bootstrap
            .as_ref()
            .map_or(0, |bootstrap| bootstrap.shards);
        let configured = self.0.options.shards;
        if created != configured {
            return Err(Error::Shards {
                configured,
                created,
            });
        }
        for shard in self.shards() {
            let mut leadership = self.leadership(shard);
            let led = leadership.wait_for(|known| known.leader.is_some()).await;
            led.map_err(|_| Error::Stopping)?;
            while let Err(err) = self.catch_up(shard, CATCH_UP_REPORT).await {
                tracing::info!(%shard, reason = %err, "still catching up");
            }
        }
        Ok(())
    }

    /// Hands every leadership over to a node that has everything, then stops all groups. Takes at most `grace`
    /// for the handing over.
    pub async fn stop(&self, grace: Duration) {
        if tokio::time::timeout(grace, self.hand_over()).await.is_err() {
            tracing::warn!("not every leadership was handed over in time; an election follows");
        }
        for replica in &self.0.shards {
            replica.group.stop().await;
        }
        self.0.control.stop().await;
    }
}

struct Starter<'a> {
    options: &'a Options,
    parts: &'a Parts,
    tasks: &'a Tasks,
}

impl Starter<'_> {
    async fn group(&self, id: GroupId, machine: Box<dyn Machine>) -> Result<Group, Error> {
        let (host, options) = (&self.parts.host, &self.options.raft);
        Ok(host.start(id, machine, options, self.tasks).await?)
    }

    async fn shard(&self, shard: ShardId) -> Result<(Replica, Proposer), Error> {
        let state = State::new(INCARNATION);
        let (machine, applied) = ShardMachine::new(shard, state.clone(), self.parts.sink.clone());
        let group = self
            .group(GroupId::of_shard(shard), Box::new(machine))
            .await?;
        let (proposer, task) = Proposer::new(group.clone(), state.clone());
        self.tasks
            .spawn("cluster.proposer", OnError::StopNode, |token| {
                task.run(token)
            });
        let ways = Ways {
            node: self.options.node,
            group: group.id(),
            leadership: group.leadership(),
            proposer: proposer.clone(),
            transport: self.parts.host.transport().clone(),
        };
        let (lane, task) = Lane::new(ways, ByteBudget::new(self.options.waiting_bytes_max));
        self.tasks
            .spawn("cluster.lane", OnError::StopNode, |token| task.run(token));
        let replica = Replica {
            group,
            state,
            applied,
            lane,
        };
        Ok((replica, proposer))
    }
}
