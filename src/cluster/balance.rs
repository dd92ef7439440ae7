//! Keeps leaders spread over the nodes, and hands them over before a node stops.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::time::Instant;

use crate::cluster::{Cluster, LEAVING_SERVICE};
use crate::placement;
use crate::raft::Group;
use crate::tasks::{OnError, Tasks};
use crate::transport::Lane;
use crate::types::{GroupId, NodeId, ShardId};
use crate::wire::peer;

/// How often a node looks at what it leads.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a node that said it is leaving is given no leadership; it is back or gone after that.
const LEAVING: Duration = Duration::from_secs(15);
/// How long telling a node may take.
const TELL: Duration = Duration::from_millis(500);
/// Leaderships given away at a time: each costs its shard a few milliseconds.
const MOVES: usize = 4;

pub(super) fn start(cluster: &Cluster, tasks: &Tasks) {
    cluster.hear_leaving();
    let cluster = cluster.clone();
    tasks.spawn("cluster.balance", OnError::StopNode, |token| async move {
        let mut tick = tokio::time::interval(PERIOD);
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                _ = tick.tick() => cluster.balance().await,
            }
        }
    });
}

impl Cluster {
    /// Gives shards that another node should lead to that node, if it is there and has everything.
    async fn balance(&self) {
        // A node on its way back changes the voters of every group: leaders stay where they are until it is there.
        if !self.registry().borrow().readmitting.is_empty() {
            return;
        }
        let voters: BTreeSet<NodeId> = self.nodes().keys().copied().collect();
        let reachable = self.staying();
        let mut moves = 0;
        for shard in self.shards().filter(|shard| self.leads(*shard)) {
            let Some(preferred) = placement::preferred_leader(shard, &voters) else {
                return;
            };
            let group = &self.replica(shard).group;
            let votes = group.members().0.contains(&preferred);
            let able = votes && reachable.contains(&preferred) && group.is_caught_up(preferred);
            if preferred != self.node() && able && moves < MOVES {
                tracing::debug!(%shard, to = %preferred, "leadership goes to where it belongs");
                group.transfer_to(preferred).await;
                moves += 1;
            }
        }
    }

    /// Other nodes that can be reached and have not said that they are leaving.
    fn staying(&self) -> BTreeSet<NodeId> {
        let leaving = self
            .0
            .leaving
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let leaving = |node: &NodeId| {
            leaving
                .get(node)
                .is_some_and(|since| since.elapsed() < LEAVING)
        };
        self.reachable()
            .into_iter()
            .filter(|node| !leaving(node))
            .collect()
    }

    /// Keeps the others from giving leaderships back while this node gives them away.
    async fn say_leaving(&self) {
        let told = self.reachable().into_iter().map(|node| {
            let body = peer::Leaving {}.encode_to_vec().into();
            let (transport, group) = (&self.0.transport, GroupId::CONTROL);
            transport.call(node, Lane::Raft, LEAVING_SERVICE, group, body, TELL)
        });
        // Who does not hear it may give one back; an election follows then.
        futures_util::future::join_all(told).await;
    }

    fn hear_leaving(&self) {
        let this = self.clone();
        let handler = move |from: NodeId, _: GroupId, _: Bytes| {
            let mut leaving = this
                .0
                .leaving
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            leaving.insert(from, Instant::now());
            drop(leaving);
            async { Ok(peer::LeavingResponse {}.encode_to_vec().into()) }
        };
        self.0
            .transport
            .register(LEAVING_SERVICE, Arc::new(handler));
    }

    fn leads(&self, shard: ShardId) -> bool {
        self.leadership(shard).borrow().leader == Some(self.node())
    }

    /// Gives every leadership of this node to one that has everything, and waits until it is taken.
    pub(super) async fn hand_over(&self) {
        self.say_leaving().await;
        for shard in self.shards() {
            self.hand_over_group(&self.replica(shard).group).await;
        }
        self.hand_over_group(&self.0.control).await;
    }

    async fn hand_over_group(&self, group: &Group) {
        let mut leadership = group.leadership();
        while leadership.borrow_and_update().leader == Some(self.node()) {
            let staying = self.staying();
            let voters = group.members().0;
            let able =
                (staying.intersection(&voters).copied()).find(|node| group.is_caught_up(*node));
            let Some(to) = able else {
                if staying.is_empty() {
                    return;
                }
                // The last entries are still on their way; the caller bounds the wait.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            group.transfer_to(to).await;
            let moved = leadership.wait_for(|known| known.leader != Some(self.node()));
            // A transfer that was refused is tried again.
            if let Ok(Err(_)) = tokio::time::timeout(Duration::from_millis(500), moved).await {
                return;
            }
        }
    }
}
