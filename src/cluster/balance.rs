//! Keeps leaders spread over the nodes, and hands them over before a node stops.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::placement;
use crate::raft::Group;
use crate::tasks::{OnError, Tasks};
use crate::types::{NodeId, ShardId};

/// How often a node looks at what it leads.
const PERIOD: Duration = Duration::from_secs(1);
/// Leaderships given away at a time: each costs its shard a few milliseconds.
const MOVES: usize = 4;

pub(super) fn start(cluster: &Cluster, tasks: &Tasks) {
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
        let voters: BTreeSet<NodeId> = self.nodes().keys().copied().collect();
        let reachable = self.reachable();
        let mut moves = 0;
        for shard in self.shards().filter(|shard| self.leads(*shard)) {
            let Some(preferred) = placement::preferred_leader(shard, &voters) else {
                return;
            };
            let group = &self.replica(shard).group;
            let able = reachable.contains(&preferred) && group.is_caught_up(preferred);
            if preferred != self.node() && able && moves < MOVES {
                tracing::debug!(%shard, to = %preferred, "leadership goes to where it belongs");
                group.transfer_to(preferred).await;
                moves += 1;
            }
        }
    }

    fn leads(&self, shard: ShardId) -> bool {
        self.leadership(shard).borrow().leader == Some(self.node())
    }

    /// Gives every leadership of this node to one that has everything, and waits until it is taken.
    pub(super) async fn hand_over(&self) {
        for shard in self.shards() {
            self.hand_over_group(&self.replica(shard).group).await;
        }
        self.hand_over_group(&self.0.control).await;
    }

    async fn hand_over_group(&self, group: &Group) {
        let mut leadership = group.leadership();
        while leadership.borrow_and_update().leader == Some(self.node()) {
            let able = self
                .reachable()
                .into_iter()
                .find(|node| group.is_caught_up(*node));
            let Some(to) = able else {
                if self.reachable().is_empty() {
                    return;
                }
                // The last entries are still on their way; the caller bounds the wait.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            group.transfer_to(to).await;
            let moved = leadership.wait_for(|known| known.leader != Some(self.node()));
            // A transfer that was refused is tried again.
            let _ = tokio::time::timeout(Duration::from_millis(500), moved).await;
        }
    }
}
