//! What a node says of itself and its cluster.

use serde::{Deserialize, Serialize};

use crate::admin::Serving;

/// The answer to `GET /status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub cluster: String,
    /// The node that answers.
    pub node: u64,
    pub version: String,
    pub control: ControlStatus,
    pub nodes: Vec<NodeStatus>,
    pub shards: Vec<ShardStatus>,
    pub bridges: Vec<serde_json::Value>,
    pub log: LogStatus,
    pub states: StatesStatus,
}

/// The answering node's log.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LogStatus {
    pub segments: usize,
    pub bytes_on_disk: u64,
    /// Entries that were damaged or lost and are being had from other nodes.
    pub unreadable_entries: u64,
    pub syncs: u64,
    pub scrub_rounds: u64,
    pub scrubbed_bytes: u64,
}

/// How often the answering node compared the state of a shard with the other replicas', since its start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StatesStatus {
    pub agreed: u64,
    pub differed: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ControlStatus {
    pub leader: Option<u64>,
}

/// A node of the cluster's configuration.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    pub id: u64,
    pub url: String,
    pub admin: String,
}

/// A shard as the answering node knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ShardStatus {
    pub id: u32,
    pub leader: Option<u64>,
    pub term: u64,
    /// Newest log index applied on the answering node.
    pub applied: u64,
    /// Oldest log index the answering node still holds, and bytes of log.
    pub first: Option<u64>,
    pub log_bytes: u64,
}

impl Status {
    pub(super) fn of(serving: &Serving) -> Self {
        let broker = &serving.broker;
        let registry = broker.registry();
        let born = registry.borrow().bootstrap.clone();
        let shards = broker.shards().into_iter().map(|shard| {
            let (first, log_bytes) = broker.cluster().log_of(shard.shard);
            ShardStatus {
                id: shard.shard.0,
                leader: shard.leader.map(|leader| leader.0),
                term: shard.term,
                applied: shard.applied,
                first,
                log_bytes,
            }
        });
        let log = broker.cluster().log_usage();
        let (agreed, differed) = broker.cluster().comparisons();
        let nodes = broker.nodes().iter().map(|(id, peer)| NodeStatus {
            id: id.0,
            url: peer.url.clone(),
            admin: peer.admin.clone(),
        });
        let bridges = serving.bridge.status().into_iter();
        Self {
            cluster: born.map_or_else(String::new, |born| born.cluster_id.clone()),
            node: broker.node().0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            control: ControlStatus {
                leader: broker.control_leader().map(|leader| leader.0),
            },
            nodes: nodes.collect(),
            shards: shards.collect(),
            bridges: bridges
                .filter_map(|status| serde_json::to_value(status).ok())
                .collect(),
            log: LogStatus {
                segments: log.segments,
                bytes_on_disk: log.bytes_on_disk,
                unreadable_entries: log.unreadable_entries,
                syncs: log.syncs,
                scrub_rounds: log.scrub_rounds,
                scrubbed_bytes: log.scrubbed_bytes,
            },
            states: StatesStatus { agreed, differed },
        }
    }
}
