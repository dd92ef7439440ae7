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
}

impl Status {
    pub(super) fn of(serving: &Serving) -> Self {
        let broker = &serving.broker;
        let registry = broker.registry();
        let born = registry.borrow().bootstrap.clone();
        let shards = broker.shards().into_iter().map(|shard| ShardStatus {
            id: shard.shard.0,
            leader: shard.leader.map(|leader| leader.0),
            term: shard.term,
            applied: shard.applied,
        });
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
        }
    }
}
