//! The control group at work: birth of the cluster, commands from any node, who is alive, who reads which Kafka
//! partitions, and how far a reader must have applied.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cluster::{ALIVE, BRIDGE_SLOTS, CONTROL, Cluster, READ_INDEX, Registry};
use crate::placement;
use crate::raft::{ProposeError, Response};
use crate::tasks::{OnError, Tasks};
use crate::transport::Lane;
use crate::types::{GroupId, NodeId, ShardId};
use crate::wire::{control as wire, peer};

/// How often each node says that it is alive, and the control group's leader looks who is.
const PULSE: Duration = Duration::from_millis(500);
/// A node that was not heard for so long reads no Kafka partition any more. Well above an election.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// One attempt at asking another node.
const ASK: Duration = Duration::from_secs(1);
/// Pause before asking again when nobody leads.
const ASK_AGAIN: Duration = Duration::from_millis(30);
/// How long a command tries to reach the control group's leader.
const COMMAND_PATIENCE: Duration = Duration::from_secs(10);

/// Why a command was not applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    #[error("refused: {0}")]
    Refused(String),
    #[error(
        "no leader of the control group was reached in time; it may or may not have been applied"
    )]
    Indeterminate,
}

/// When each node was last heard, on the control group's leader.
type Heard = Arc<Mutex<BTreeMap<NodeId, Instant>>>;

pub(super) fn start(cluster: &Cluster, tasks: &Tasks) {
    let heard = Heard::default();
    register(cluster, &heard);
    let this = cluster.clone();
    tasks.spawn("cluster.pulse", OnError::StopNode, |token| async move {
        let mut tick = tokio::time::interval(PULSE);
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                _ = tick.tick() => this.send_pulse().await,
            }
        }
    });
    let this = cluster.clone();
    tasks.spawn("cluster.steer", OnError::StopNode, |token| {
        this.steer(heard, token)
    });
}

fn register(cluster: &Cluster, heard: &Heard) {
    let transport = &cluster.0.transport;
    let this = cluster.clone();
    let read_index = move |_: NodeId, group: GroupId, _: Bytes| {
        let this = this.clone();
        async move {
            let at = match this.known_group(group) {
                Some(group) => group.read_index().await,
                None => None,
            };
            let at = at.map(|index| peer::LogId {
                index,
                ..Default::default()
            });
            Ok(peer::ReadIndexResponse { at }.encode_to_vec().into())
        }
    };
    transport.register(READ_INDEX, Arc::new(read_index));
    let this = cluster.clone();
    let control = move |_: NodeId, _: GroupId, body: Bytes| {
        let this = this.clone();
        async move {
            let request = peer::ControlRequest::decode(body).map_err(|err| err.to_string())?;
            let response = match this.propose_here(request.entry).await {
                Ok(Ok(())) => peer::ControlResponse::default(),
                Ok(Err(refused)) => peer::ControlResponse {
                    refused,
                    ..Default::default()
                },
                Err(_) => peer::ControlResponse {
                    not_leader: true,
                    ..Default::default()
                },
            };
            Ok(response.encode_to_vec().into())
        }
    };
    transport.register(CONTROL, Arc::new(control));
    let heard = heard.clone();
    let this = cluster.clone();
    let alive = move |from: NodeId, _: GroupId, body: Bytes| {
        hear(&heard, from);
        let this = this.clone();
        async move {
            let pulse = peer::Alive::decode(body).map_err(|err| err.to_string())?;
            this.register_directory(from, pulse.directory).await;
            Ok(peer::AliveResponse {}.encode_to_vec().into())
        }
    };
    transport.register(ALIVE, Arc::new(alive));
}

fn hear(heard: &Heard, node: NodeId) {
    let mut heard = heard.lock().unwrap_or_else(|err| err.into_inner());
    heard.insert(node, Instant::now());
}

impl Cluster {
    /// The log index a reader of the shard must have applied to see everything acknowledged before this call.
    /// Asks until someone leads: the caller bounds the wait.
    pub(super) async fn read_index(&self, shard: ShardId) -> u64 {
        let group = GroupId::of_shard(shard);
        loop {
            let leader = self.leadership(shard).borrow().leader;
            let index = match leader {
                None => None,
                Some(leader) if leader == self.node() => self.group(group).read_index().await,
                Some(leader) => self.ask_read_index(leader, group).await,
            };
            if let Some(index) = index {
                return index;
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }

    async fn ask_read_index(&self, leader: NodeId, group: GroupId) -> Option<u64> {
        let body = peer::ReadIndexRequest {}.encode_to_vec().into();
        let transport = &self.0.transport;
        let answer = transport
            .call(leader, Lane::Raft, READ_INDEX, group, body, ASK)
            .await;
        let response = peer::ReadIndexResponse::decode(answer.ok()?).ok()?;
        response.at.map(|at| at.index)
    }

    /// Applies a command to the registry, from any node.
    ///
    /// # Errors
    /// `Refused` with the reason when the registry says no. Commands may be repeated: each names the state it
    /// expects, or changes nothing the second time.
    pub async fn command(&self, command: wire::entry::Command) -> Result<(), CommandError> {
        let entry = wire::Entry {
            version: wire::VERSION,
            stamp_ms: 0,
            command: Some(command),
        };
        let entry: Bytes = entry.encode_to_vec().into();
        let until = Instant::now() + COMMAND_PATIENCE;
        while Instant::now() < until {
            let leader = self.control_leadership().borrow().leader;
            let answer = match leader {
                None => None,
                Some(leader) if leader == self.node() => {
                    let proposed = self.propose_here(entry.clone());
                    // Cut off from its majority, a leader would wait for ever.
                    let proposed = tokio::time::timeout_at(until, proposed).await;
                    proposed.ok().and_then(Result::ok)
                }
                Some(leader) => self.ask_command(leader, entry.clone()).await,
            };
            if let Some(answer) = answer {
                return answer.map_err(CommandError::Refused);
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
        Err(CommandError::Indeterminate)
    }

    async fn ask_command(&self, leader: NodeId, entry: Bytes) -> Option<Result<(), String>> {
        let body = peer::ControlRequest { entry }.encode_to_vec().into();
        let (transport, group) = (&self.0.transport, GroupId::CONTROL);
        let answer = transport
            .call(leader, Lane::Bulk, CONTROL, group, body, ASK)
            .await;
        let response = peer::ControlResponse::decode(answer.ok()?).ok()?;
        match (response.not_leader, response.refused) {
            (true, _) => None,
            (false, refused) if refused.is_empty() => Some(Ok(())),
            (false, refused) => Some(Err(refused)),
        }
    }

    /// Proposes an encoded command on this node, stamped now.
    async fn propose_here(&self, entry: Bytes) -> Result<Result<(), String>, ProposeError> {
        let Ok(mut entry) = wire::Entry::decode(entry) else {
            return Ok(Err("the command cannot be decoded".to_owned()));
        };
        entry.stamp_ms = self.0.options.clock.now_ms();
        let (_, response) = self.0.control.propose(entry.encode_to_vec().into()).await?;
        Ok(match response {
            Response::Control(result) => result,
            Response::None | Response::Publishes(_) => Err("not a control entry".to_owned()),
        })
    }

    /// Notes the data directory of a node that has none registered yet.
    async fn register_directory(&self, node: NodeId, directory: String) {
        let registry = self.registry().borrow().clone();
        let born = registry.bootstrap.is_some();
        let leads = self.control_leadership().borrow().leader == Some(self.node());
        if !born || !leads || registry.directories.contains_key(&node) {
            return;
        }
        let register = wire::RegisterDirectory {
            node: node.0,
            directory,
            instead_of: String::new(),
        };
        self.command_or_warn(wire::entry::Command::RegisterDirectory(register))
            .await;
    }

    async fn send_pulse(&self) {
        let leader = self.control_leadership().borrow().leader;
        let Some(leader) = leader else { return };
        if leader == self.node() {
            let directory = self.0.directory.clone();
            return self.register_directory(leader, directory).await;
        }
        let directory = self.0.directory.clone();
        let body = peer::Alive { directory }.encode_to_vec().into();
        let (transport, group) = (&self.0.transport, GroupId::CONTROL);
        // A pulse that does not arrive is what silence means.
        let _ = transport
            .call(leader, Lane::Raft, ALIVE, group, body, PULSE)
            .await;
    }

    /// While this node leads the control group: gives birth to the cluster, and gives bridge slots to the living.
    async fn steer(self, heard: Heard, token: CancellationToken) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(PULSE);
        let mut leading_since: Option<Instant> = None;
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                _ = tick.tick() => {}
            }
            if self.control_leadership().borrow().leader != Some(self.node()) {
                leading_since = None;
                continue;
            }
            let since = *leading_since.get_or_insert_with(Instant::now);
            let registry = self.registry().borrow().clone();
            let Some(bootstrap) = registry.bootstrap.clone() else {
                self.command_or_warn(wire::entry::Command::Bootstrap(
                    self.0.options.bootstrap.clone(),
                ))
                .await;
                continue;
            };
            hear(&heard, self.node());
            self.found(&registry).await;
            // A new leader first listens for as long as a living node may be silent.
            if since.elapsed() > SILENCE_MAX {
                for bridge in bootstrap.bridges.iter().filter(|bridge| bridge.inbound) {
                    self.assign_slots(&bridge.id, &alive(&heard)).await;
                }
            }
        }
    }

    /// Once every node is known by its directory and every shard is led, the cluster is founded: from then on no group is
    /// ever given first voters.
    async fn found(&self, registry: &Registry) {
        let all_known = (self.nodes().keys()).all(|node| registry.directories.contains_key(node));
        if registry.founded || !all_known || !self.has_shards() {
            return;
        }
        let led = |shard| self.leadership(shard).borrow().leader.is_some();
        if self.shards().all(led) {
            self.command_or_warn(wire::entry::Command::Founded(wire::Founded {}))
                .await;
        }
    }

    async fn assign_slots(&self, bridge: &str, alive: &BTreeSet<NodeId>) {
        let registry = self.registry().borrow().clone();
        let now = registry
            .bridges
            .get(bridge)
            .map(|state| state.slots.clone());
        let changes = placement::reassign(BRIDGE_SLOTS, &now.unwrap_or_default(), alive);
        if changes.is_empty() {
            return;
        }
        tracing::info!(
            bridge,
            slots = changes.len(),
            ?alive,
            "bridge slots change hands"
        );
        let slot = |(slot, at): (u32, placement::Assignment)| wire::Slot {
            slot,
            node: at.node.0,
            epoch: at.epoch,
        };
        let change = wire::AssignSlots {
            bridge: bridge.to_owned(),
            slots: changes.into_iter().map(slot).collect(),
        };
        self.command_or_warn(wire::entry::Command::AssignSlots(change))
            .await;
    }

    pub(super) async fn command_or_warn(&self, command: wire::entry::Command) {
        if let Err(err) = self.command(command).await {
            tracing::warn!(error = %err, "a control command was not applied; it is decided anew");
        }
    }
}

fn alive(heard: &Heard) -> BTreeSet<NodeId> {
    let heard = heard.lock().unwrap_or_else(|err| err.into_inner());
    let recent = heard.iter().filter(|(_, at)| at.elapsed() < SILENCE_MAX);
    recent.map(|(node, _)| *node).collect()
}
