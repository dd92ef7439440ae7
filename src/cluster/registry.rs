//! The registry: what every node knows of the cluster, replicated by the control group.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::watch;

use crate::auth::Revocations;
use crate::channel::Archive;
use crate::cluster::apps;
use crate::placement::Assignment;
use crate::raft::{Machine, Replay, Response, Restored};
use crate::types::{AppId, ChannelKey, NodeId};
use crate::wire::control;

/// Slots that each bridge's partitions are spread over. Fixed: a partition's slot is its hash modulo this.
pub const BRIDGE_SLOTS: u32 = 16;

/// The registry at one position of the control log.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    /// `None` until the cluster is born. Its apps are those of that day.
    pub bootstrap: Option<Arc<control::Bootstrap>>,
    /// Every app there is. The map and each app are another value whenever they changed, and only then.
    pub apps: Arc<BTreeMap<AppId, Arc<control::App>>>,
    /// Tokens that count no more.
    pub revocations: Arc<Revocations>,
    /// Newest stamp of an entry: what time it is for what expires.
    pub stamp_ms: u64,
    pub bridges: BTreeMap<String, BridgeState>,
    /// The data directory of each node: no other may vote in its name.
    pub directories: BTreeMap<NodeId, String>,
    /// Every group has its first voters.
    pub founded: bool,
    /// Nodes that lost their data and are on their way back, with their new directories.
    pub readmitting: BTreeMap<NodeId, String>,
}

/// What is known of one bridge's reading side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BridgeState {
    pub slots: BTreeMap<u32, Assignment>,
    /// Topic and partition to the offset below which every record is in its channel.
    pub floors: BTreeMap<(String, i32), i64>,
}

/// What channels of an app without a namespace rule of their own are kept for, in milliseconds.
const RETENTION_DEFAULT_MS: u64 = 120_000;

impl Registry {
    /// What of a channel is retained.
    #[must_use]
    pub fn rule(&self, key: &ChannelKey) -> control::Namespace {
        let app = self.apps.get(&key.app);
        let mut namespaces = app.into_iter().flat_map(|app| &app.namespaces);
        let rule = namespaces.find(|namespace| namespace.id == key.name.namespace());
        rule.cloned().unwrap_or_else(|| control::Namespace {
            retention_ms: RETENTION_DEFAULT_MS,
            ..Default::default()
        })
    }

    pub(super) fn apply(&mut self, entry: control::Entry) -> Result<(), String> {
        use control::entry::Command;
        self.stamp_ms = self.stamp_ms.max(entry.stamp_ms);
        match entry
            .command
            .ok_or("the entry has no command this build knows")?
        {
            Command::Bootstrap(bootstrap) => {
                if self.bootstrap.is_none() {
                    self.apps = apps::by_id(&bootstrap.apps);
                    self.bootstrap = Some(Arc::new(bootstrap));
                }
                Ok(())
            }
            Command::AssignSlots(change) => self.assign(change),
            Command::AdvanceFloors(change) => self.advance(change),
            Command::RegisterDirectory(change) => self.register(change),
            Command::Founded(control::Founded {}) => {
                self.founded = true;
                Ok(())
            }
            Command::Readmit(change) => self.readmit(change),
            Command::Readmitted(control::Readmitted { node }) => {
                self.readmitting.remove(&NodeId(node));
                Ok(())
            }
            Command::PutApp(change) => self.put_app(change),
            Command::DeleteApp(change) => self.delete_app(&change),
            Command::RevokeTokens(change) => self.revoke_tokens(&change),
        }
    }

    fn register(&mut self, change: control::RegisterDirectory) -> Result<(), String> {
        let node = NodeId(change.node);
        let known = self.directories.get(&node).map_or("", String::as_str);
        if known == change.directory {
            return Ok(());
        }
        if known != change.instead_of {
            return Err(format!("{node} is registered with another directory"));
        }
        self.directories.insert(node, change.directory);
        Ok(())
    }

    fn readmit(&mut self, change: control::Readmit) -> Result<(), String> {
        let node = NodeId(change.node);
        match self.directories.get(&node) {
            None => Err(format!("{node} was never part of this cluster")),
            Some(known) if *known == change.directory => Err(format!("{node} has its directory")),
            Some(_) => {
                self.readmitting.insert(node, change.directory);
                Ok(())
            }
        }
    }

    fn assign(&mut self, change: control::AssignSlots) -> Result<(), String> {
        let state = self.bridges.entry(change.bridge).or_default();
        let stale = |slot: &&control::Slot| {
            slot.epoch != state.slots.get(&slot.slot).map_or(1, |at| at.epoch + 1)
        };
        if let Some(slot) = change.slots.iter().find(stale) {
            return Err(format!("slot {} has been assigned meanwhile", slot.slot));
        }
        for slot in change.slots {
            let (node, epoch) = (NodeId(slot.node), slot.epoch);
            state.slots.insert(slot.slot, Assignment { node, epoch });
        }
        Ok(())
    }

    fn advance(&mut self, change: control::AdvanceFloors) -> Result<(), String> {
        let state = self.bridges.entry(change.bridge).or_default();
        let fenced = |floor: &&control::Floor| {
            state
                .slots
                .get(&floor.slot)
                .is_none_or(|at| at.epoch != floor.epoch)
        };
        if let Some(floor) = change.floors.iter().find(fenced) {
            return Err(format!("slot {} has another owner", floor.slot));
        }
        for floor in change.floors {
            let known = state.floors.entry((floor.topic, floor.partition));
            let known = known.or_insert(floor.offset);
            *known = floor.offset.max(*known);
        }
        Ok(())
    }

    pub(super) fn encode(&self) -> Bytes {
        let slot = |(slot, at): (&u32, &Assignment)| control::Slot {
            slot: *slot,
            node: at.node.0,
            epoch: at.epoch,
        };
        let floor = |((topic, partition), offset): (&(String, i32), &i64)| control::Floor {
            topic: topic.clone(),
            partition: *partition,
            offset: *offset,
            ..Default::default()
        };
        let directory = |(node, directory): (&NodeId, &String)| control::RegisterDirectory {
            node: node.0,
            directory: directory.clone(),
            ..Default::default()
        };
        let readmit = |(node, directory): (&NodeId, &String)| control::Readmit {
            node: node.0,
            directory: directory.clone(),
        };
        let bridges = self.bridges.iter().map(|(id, state)| control::BridgeState {
            bridge: id.clone(),
            slots: state.slots.iter().map(slot).collect(),
            floors: state.floors.iter().map(floor).collect(),
        });
        let snapshot = control::Snapshot {
            version: control::VERSION,
            bootstrap: self.bootstrap.as_deref().cloned(),
            bridges: bridges.collect(),
            directories: (self.directories.iter().map(directory)).collect(),
            founded: self.founded,
            readmitting: (self.readmitting.iter().map(readmit)).collect(),
            apps: (self.apps.values().map(|app| (**app).clone())).collect(),
            revocations: (self.revocations.iter().map(apps::revoke_command)).collect(),
            stamp_ms: self.stamp_ms,
        };
        snapshot.encode_to_vec().into()
    }

    pub(super) fn decode(bytes: Bytes) -> Result<Self, String> {
        let snapshot = control::Snapshot::decode(bytes).map_err(|err| err.to_string())?;
        check_version(snapshot.version)?;
        let bootstrap = snapshot.bootstrap.map(Arc::new);
        let apps = match (snapshot.version, &bootstrap) {
            (0 | 1, Some(born)) => apps::by_id(&born.apps),
            _ => apps::by_id(&snapshot.apps),
        };
        let mut registry = Self {
            bootstrap,
            apps,
            founded: snapshot.founded,
            stamp_ms: snapshot.stamp_ms,
            ..Self::default()
        };
        let mut revocations = Revocations::default();
        for revoked in &snapshot.revocations {
            apps::add_revocations(&mut revocations, revoked, registry.stamp_ms)?;
        }
        registry.revocations = Arc::new(revocations);
        for known in snapshot.directories {
            let node = NodeId(known.node);
            registry.directories.insert(node, known.directory);
        }
        for known in snapshot.readmitting {
            let node = NodeId(known.node);
            registry.readmitting.insert(node, known.directory);
        }
        for bridge in snapshot.bridges {
            let state = registry.bridges.entry(bridge.bridge).or_default();
            for slot in bridge.slots {
                let (node, epoch) = (NodeId(slot.node), slot.epoch);
                state.slots.insert(slot.slot, Assignment { node, epoch });
            }
            for floor in bridge.floors {
                let key = (floor.topic, floor.partition);
                state.floors.insert(key, floor.offset);
            }
        }
        Ok(registry)
    }
}

fn check_version(found: u32) -> Result<(), String> {
    if found > control::VERSION {
        let known = control::VERSION;
        return Err(format!(
            "control entry has version {found}; this build applies up to {known}"
        ));
    }
    Ok(())
}

/// Entries after which the control group's log starts anew behind the registry as it is then.
const HORIZON_ENTRIES: u64 = 256;

/// The registry as a replicated state machine that tells its followers.
pub(super) struct ControlMachine {
    registry: Registry,
    /// The registry at the horizon, encoded.
    frozen: (u64, Bytes),
    applied: u64,
    registry_tx: watch::Sender<Arc<Registry>>,
    applied_tx: watch::Sender<u64>,
}

impl ControlMachine {
    pub(super) fn new() -> (Self, watch::Receiver<Arc<Registry>>, watch::Receiver<u64>) {
        let (registry_tx, registry_rx) = watch::channel(Arc::default());
        let (applied_tx, applied_rx) = watch::channel(0);
        let machine = Self {
            registry: Registry::default(),
            frozen: (0, Bytes::new()),
            applied: 0,
            registry_tx,
            applied_tx,
        };
        (machine, registry_rx, applied_rx)
    }
}

impl ControlMachine {
    fn moved_on(&mut self, index: u64) {
        self.applied = index;
        if index >= self.frozen.0 + HORIZON_ENTRIES {
            self.frozen = (index, self.registry.encode());
        }
        self.applied_tx.send_replace(index);
    }

    fn replace(&mut self, index: u64, state: Bytes) -> Result<(), String> {
        self.registry = Registry::decode(state.clone())?;
        self.frozen = (index, state);
        self.applied = index;
        self.registry_tx
            .send_replace(Arc::new(self.registry.clone()));
        self.applied_tx.send_replace(index);
        Ok(())
    }
}

impl Machine for ControlMachine {
    fn apply(&mut self, index: u64, payload: Bytes) -> Result<Response, String> {
        let entry = control::Entry::decode(payload).map_err(|err| err.to_string())?;
        check_version(entry.version)?;
        let result = self.registry.apply(entry);
        self.registry_tx
            .send_replace(Arc::new(self.registry.clone()));
        self.moved_on(index);
        Ok(Response::Control(result))
    }

    fn skip(&mut self, index: u64) {
        self.moved_on(index);
    }

    fn checkpoint(&self) -> Bytes {
        self.registry.encode()
    }

    fn checkpointed(&mut self, _: u64) -> Result<(), String> {
        Ok(())
    }

    fn restore(&mut self, index: u64, checkpoint: Bytes) -> Result<Restored, String> {
        self.replace(index, checkpoint)?;
        Ok(Restored::Whole)
    }

    fn archive(&self) -> Option<Arc<dyn Archive>> {
        None
    }

    fn horizon(&self) -> Option<u64> {
        Some(self.frozen.0).filter(|horizon| *horizon > 0)
    }

    fn let_go(&mut self) {
        if self.applied > self.frozen.0 {
            self.frozen = (self.applied, self.registry.encode());
        }
    }

    fn outline(&self) -> Bytes {
        self.frozen.1.clone()
    }

    fn restore_outline(&mut self, index: u64, outline: Bytes) -> Result<(), String> {
        self.replace(index, outline)
    }

    fn rebuild(&mut self, index: u64, outline: Bytes, replay: Replay<'_>) -> Result<(), String> {
        let mut registry = Registry::decode(outline)?;
        let mut applied = index;
        while let Some((index, payload)) = replay().map_err(|err| err.to_string())? {
            if let Some(payload) = payload {
                let entry = control::Entry::decode(payload).map_err(|err| err.to_string())?;
                check_version(entry.version)?;
                // Refusals are part of the state's history, not failures.
                let _ = registry.apply(entry);
            }
            applied = index;
        }
        let state = registry.encode();
        self.replace(applied, state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use control::entry::Command;

    fn apply(registry: &mut Registry, command: Command) -> Result<(), String> {
        registry.apply(control::Entry {
            version: control::VERSION,
            stamp_ms: 0,
            command: Some(command),
        })
    }

    fn assign(slot: u32, node: u64, epoch: u64) -> Command {
        let slots = vec![control::Slot { slot, node, epoch }];
        Command::AssignSlots(control::AssignSlots {
            bridge: "b".into(),
            slots,
        })
    }

    fn advance(offset: i64, epoch: u64) -> Command {
        let floor = control::Floor {
            topic: "t".into(),
            partition: 0,
            offset,
            slot: 3,
            epoch,
        };
        Command::AdvanceFloors(control::AdvanceFloors {
            bridge: "b".into(),
            floors: vec![floor],
        })
    }

    #[test]
    fn a_cluster_is_born_once() {
        let mut registry = Registry::default();
        for shards in [16, 99] {
            let bootstrap = control::Bootstrap {
                shards,
                ..Default::default()
            };
            apply(&mut registry, Command::Bootstrap(bootstrap)).unwrap();
        }
        assert_eq!(registry.bootstrap.unwrap().shards, 16);
    }

    #[test]
    fn a_slot_changes_hands_only_from_its_present_epoch_and_a_former_owner_moves_no_floor() {
        let mut registry = Registry::default();
        apply(&mut registry, assign(3, 1, 1)).unwrap();
        assert!(
            apply(&mut registry, assign(3, 2, 1)).is_err(),
            "decided on old knowledge"
        );
        apply(&mut registry, advance(10, 1)).unwrap();
        apply(&mut registry, assign(3, 2, 2)).unwrap();
        assert!(apply(&mut registry, advance(20, 1)).is_err());
        apply(&mut registry, advance(5, 2)).unwrap();
        assert_eq!(
            registry.bridges["b"].floors[&("t".into(), 0)],
            10,
            "a floor never sinks"
        );
        let copy = Registry::decode(registry.encode()).unwrap();
        assert_eq!(copy.bridges, registry.bridges);
    }
}
