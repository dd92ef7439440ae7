//! Putting the node's part of the cluster together, and taking it apart.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::watch;

use crate::channel::{self, Archive};
use crate::cluster::admission::{Admission, Begin};
use crate::cluster::forward::Door;
use crate::cluster::lane::{Lane, Ways};
use crate::cluster::proposer::Proposer;
use crate::cluster::registry::ControlMachine;
use crate::cluster::replica::{EventSink, ShardMachine};
use crate::cluster::telling::Occupancy;
use crate::cluster::upkeep::{Exported, Upkeep, Usage};
use crate::cluster::{
    Cluster, Error, Inner, OnTaken, Options, READERS, Registry, Relay, Replica, attendance,
    balance, compare, control, readmit, relay, taken, telling,
};
use crate::raft::Host;
use crate::stdx::{ByteBudget, stable_hash};
use crate::tasks::{OnError, Tasks};
use crate::types::{GroupId, NodeId, ShardId};

/// What serials of this cluster begin with: another cluster's, kept by a client that was sent here, prove nothing.
fn incarnation(cluster_id: &str) -> u16 {
    let [.., high, low] = stable_hash(&[cluster_id.as_bytes()]).to_be_bytes();
    u16::from_be_bytes([high, low])
}

/// How often a node that is catching up at its start says so.
const CATCH_UP_REPORT: Duration = Duration::from_secs(5);

/// What the cluster stands on.
pub struct Parts {
    pub host: Host,
    /// Hears of every record applied on this node.
    pub sink: Arc<dyn EventSink>,
    /// Where a group's older index entries are kept.
    pub archive: Box<dyn Fn(GroupId) -> Arc<dyn Archive> + Send + Sync>,
    /// Tells operators what a starting node waits for.
    pub phase: watch::Sender<String>,
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
        let (machine, registry, _) = ControlMachine::new();
        let admission = Admission {
            node: options.node,
            others: (options.nodes.keys().copied())
                .filter(|node| *node != options.node)
                .collect(),
            directory: parts.host.directory().to_owned(),
            transport: transport.clone(),
            registry: registry.clone(),
            phase: parts.phase.clone(),
        };
        let unborn = admission.answer(&parts.host).map_err(Error::Log)?;
        let begin = match unborn {
            true => Some(admission.ask().await),
            false => {
                admission.confirm().await?;
                None
            }
        };
        let control = parts
            .host
            .start(GroupId::CONTROL, Box::new(machine), tasks)
            .await?;
        let cluster = Self(Arc::new(Inner {
            occupancy: Occupancy::new(options.shards),
            options,
            transport,
            host: parts.host.clone(),
            control,
            registry,
            shards: OnceLock::new(),
            directory: admission.directory,
            boot: attendance::random(),
            pulses: attendance::Pulses::default(),
            on_taken: OnTaken::default(),
            relay: Relay::default(),
            compared: AtomicU64::new(0),
            differed: AtomicU64::new(0),
            leaving: std::sync::Mutex::default(),
            readers: Arc::new(tokio::sync::Semaphore::new(READERS)),
        }));
        cluster.dial();
        if begin == Some(Begin::Found) && cluster.is_first() {
            cluster.0.control.initialize(&cluster.voters()).await?;
        }
        control::start(&cluster, tasks);
        readmit::start(&cluster, tasks);
        parts
            .phase
            .send_replace("waiting for the cluster's registry to name this node".to_owned());
        cluster.is_registered().await?;
        cluster.start_shards(&parts, tasks).await?;
        cluster.start_services(tasks);
        parts
            .phase
            .send_replace("catching up with the cluster".to_owned());
        Ok(cluster)
    }

    /// What needs the shards.
    fn start_services(&self, tasks: &Tasks) {
        compare::start(self, tasks);
        attendance::start(self, tasks);
        taken::start(self);
        relay::start(self);
        telling::start(self, tasks);
        balance::start(self, tasks);
    }

    /// Reaches out to all other nodes: who leads nothing calls nobody, and must be heard all the same when it leaves.
    fn dial(&self) {
        for node in self.nodes().keys().filter(|node| **node != self.node()) {
            if let Err(err) = self.0.transport.connect(*node) {
                tracing::debug!(%node, %err, "not dialed");
            }
        }
    }

    async fn start_shards(&self, parts: &Parts, tasks: &Tasks) -> Result<(), Error> {
        let usage = Usage::new(parts.host.clone(), self.0.options.shards);
        let start = Starter {
            cluster: self,
            parts,
            tasks,
            usage: Arc::new(usage),
        };
        let mut shards = Vec::new();
        let mut proposers = Vec::new();
        for shard in self.shards() {
            let (replica, proposer) = start.shard(shard).await?;
            shards.push(replica);
            proposers.push(proposer);
        }
        let founded = self.registry().borrow().founded;
        if !founded && self.is_first() {
            for replica in &shards {
                replica.group.initialize(&self.voters()).await?;
            }
        }
        // Set once, here.
        let _ = self.0.shards.set(shards);
        Door { proposers }.register(&self.0.transport);
        Ok(())
    }

    fn voters(&self) -> BTreeSet<NodeId> {
        self.nodes().keys().copied().collect()
    }

    /// The node with the lowest number gives groups that never had any their first voters.
    fn is_first(&self) -> bool {
        self.nodes().keys().next() == Some(&self.node())
    }

    /// Waits until the registry here names this node's directory: before that it acknowledges nothing of a shard, so that
    /// a directory that did is always known.
    async fn is_registered(&self) -> Result<(), Error> {
        let mut registry = self.registry();
        let node = self.node();
        let named =
            |registry: &Arc<Registry>| registry.directories.get(&node) == Some(&self.0.directory);
        let named = registry.wait_for(named).await;
        named.map(|_| ()).map_err(|_| Error::Stopping)
    }

    /// Waits until the cluster is born, each group has a leader, and this node shows what was acknowledged before:
    /// a client that attached earlier would take the past for news.
    ///
    /// # Errors
    /// When the cluster was created with other settings than this node's.
    pub async fn ready(&self) -> Result<(), Error> {
        let mut registry = self.registry();
        // What `wait_for` gives locks the registry: held over an await it would stop whoever applies to it, and then all.
        let created = registry
            .wait_for(|registry| registry.bootstrap.is_some() && registry.founded)
            .await
            .map_err(|_| Error::Stopping)?
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
        for replica in self.replicas() {
            replica.group.stop().await;
        }
        self.0.control.stop().await;
    }
}

struct Starter<'a> {
    cluster: &'a Cluster,
    parts: &'a Parts,
    tasks: &'a Tasks,
    usage: Arc<Usage>,
}

impl Starter<'_> {
    async fn shard(&self, shard: ShardId) -> Result<(Replica, Proposer), Error> {
        let options = &self.cluster.0.options;
        let id = GroupId::of_shard(shard);
        let (machine, state, applied) = ShardMachine::new(
            shard,
            incarnation(&options.bootstrap.cluster_id),
            channel::Options {
                records_max: options.records_in_memory_max,
            },
            (self.parts.archive)(id),
            self.parts.sink.clone(),
        );
        let started = self.parts.host.start(id, Box::new(machine), self.tasks);
        let group = started.await?;
        let exported = Exported::default();
        let upkeep = Upkeep::new(
            shard,
            options.upkeep.clone(),
            group.clone(),
            state.clone(),
            self.cluster.registry(),
            exported.clone(),
            self.usage.clone(),
        );
        let (proposer, task) =
            Proposer::new(group.clone(), state.clone(), upkeep, options.clock.clone());
        self.tasks
            .spawn("cluster.proposer", OnError::StopNode, |token| {
                task.run(token)
            });
        let ways = Ways {
            node: options.node,
            group: group.id(),
            leadership: group.leadership(),
            proposer: proposer.clone(),
            transport: self.parts.host.transport().clone(),
        };
        let (lane, task) = Lane::new(ways, ByteBudget::new(options.waiting_bytes_max));
        self.tasks
            .spawn("cluster.lane", OnError::StopNode, |token| task.run(token));
        let replica = Replica {
            group,
            state,
            applied,
            lane,
            exported,
        };
        Ok((replica, proposer))
    }
}
