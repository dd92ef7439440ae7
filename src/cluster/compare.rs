//! Replicas compare their states: at the same entry the same digest. One that differs from the majority says so and
//! rebuilds its state from another's outline and its own log.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio_util::sync::CancellationToken;

use crate::cluster::Cluster;
use crate::tasks::{OnError, Tasks};
use crate::transport::{Lane, Service};
use crate::types::{GroupId, NodeId, ShardId};
use crate::wire::peer;

const DIGEST: Service = Service(23);

/// How often a node looks for entries to compare at.
const PERIOD: Duration = Duration::from_secs(2);
/// How long another node may take to answer.
const ASK: Duration = Duration::from_secs(1);
/// Looks after which those who have not come as far are no longer waited for.
const LOOKS: u32 = 15;

pub(super) fn start(cluster: &Cluster, tasks: &Tasks) {
    let this = cluster.clone();
    let handler = move |_: NodeId, group: GroupId, body: Bytes| {
        let this = this.clone();
        async move {
            let request = peer::DigestRequest::decode(body).map_err(|err| err.to_string())?;
            let digest = group
                .shard()
                .filter(|shard| shard.0 < this.0.options.shards && this.has_shards())
                .and_then(|shard| this.digest_at(shard, request.index));
            let response = peer::DigestResponse {
                known: digest.is_some(),
                digest: digest.unwrap_or_default(),
            };
            Ok(response.encode_to_vec().into())
        }
    };
    cluster.0.transport.register(DIGEST, Arc::new(handler));
    let this = cluster.clone();
    tasks.spawn("cluster.compare", OnError::StopNode, |token| {
        this.compare_all(token)
    });
}

/// How a shard's comparison stands.
#[derive(Debug, Default)]
struct Compared {
    /// Newest index that needs no further look.
    through: u64,
    looks: u32,
}

/// What a comparison says.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// A majority has this node's digest.
    Agrees,
    /// A majority has another one; these nodes do.
    Differs(BTreeSet<NodeId>),
    /// Too few have answered.
    Open,
    /// All have answered, and there is no majority.
    Scattered,
}

impl Cluster {
    fn digest_at(&self, shard: ShardId, index: u64) -> Option<u64> {
        let state = self.state(shard);
        let found = state.checks().iter().find(|(at, _)| *at == index);
        found.map(|(_, digest)| *digest)
    }

    async fn compare_all(self, token: CancellationToken) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(PERIOD);
        let mut compared: BTreeMap<ShardId, Compared> = BTreeMap::new();
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                _ = tick.tick() => {}
            }
            for shard in self.shards() {
                let newest = self.state(shard).checks().last().copied();
                let known = compared.entry(shard).or_default();
                let Some((index, digest)) = newest.filter(|(index, _)| *index > known.through)
                else {
                    continue;
                };
                let verdict = tokio::select! {
                    () = token.cancelled() => return Ok(()),
                    verdict = self.compare(shard, index, digest) => verdict,
                };
                known.looks += 1;
                let settled = match &verdict {
                    Verdict::Open => known.looks >= LOOKS,
                    Verdict::Agrees | Verdict::Differs(_) | Verdict::Scattered => true,
                };
                if settled {
                    *known = Compared {
                        through: index,
                        looks: 0,
                    };
                }
                self.act(shard, index, verdict).await?;
            }
        }
    }

    async fn compare(&self, shard: ShardId, index: u64, mine: u64) -> Verdict {
        let others: Vec<NodeId> = (self.nodes().keys().copied())
            .filter(|node| *node != self.node())
            .collect();
        let asked = others
            .iter()
            .map(|node| self.ask_digest(*node, shard, index));
        let answers = futures_util::future::join_all(asked).await;
        let answers = others.iter().copied().zip(answers);
        verdict(
            self.node(),
            mine,
            answers.filter_map(|(node, digest)| Some((node, digest?))),
            self.nodes().len(),
        )
    }

    async fn ask_digest(&self, node: NodeId, shard: ShardId, index: u64) -> Option<u64> {
        let body = peer::DigestRequest { index }.encode_to_vec().into();
        let group = GroupId::of_shard(shard);
        let transport = &self.0.transport;
        let answer = transport.call(node, Lane::Bulk, DIGEST, group, body, ASK);
        let response = peer::DigestResponse::decode(answer.await.ok()?).ok()?;
        response.known.then_some(response.digest)
    }

    /// # Errors
    /// When the state could be neither trusted nor rebuilt: the node must not go on with it.
    async fn act(&self, shard: ShardId, index: u64, verdict: Verdict) -> anyhow::Result<()> {
        let sound = match verdict {
            Verdict::Open => return Ok(()),
            Verdict::Agrees => {
                self.0.compared.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            Verdict::Scattered => {
                tracing::error!(%shard, index, "the replicas' states differ, and no majority agrees");
                self.0.differed.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            Verdict::Differs(sound) => sound,
        };
        tracing::error!(%shard, index, ?sound, "this replica's state differs from the majority's; it is rebuilt");
        self.0.differed.fetch_add(1, Ordering::Relaxed);
        let group = &self.replica(shard).group;
        let mut failed = anyhow::anyhow!("nobody has a sound state of {shard}");
        for node in sound {
            if self.leadership(shard).borrow().leader == Some(self.node()) {
                group.transfer_to(node).await;
            }
            match group.rebuild_from(&self.0.transport, node).await {
                Ok(()) => {
                    tracing::warn!(%shard, from = %node, "the state was rebuilt");
                    return Ok(());
                }
                Err(err) => failed = anyhow::anyhow!("{shard}: its state cannot be rebuilt: {err}"),
            }
        }
        Err(failed)
    }
}

fn verdict(
    node: NodeId,
    mine: u64,
    answers: impl Iterator<Item = (NodeId, u64)>,
    nodes: usize,
) -> Verdict {
    let mut by_digest: BTreeMap<u64, BTreeSet<NodeId>> = BTreeMap::new();
    by_digest.entry(mine).or_default().insert(node);
    for (node, digest) in answers {
        by_digest.entry(digest).or_default().insert(node);
    }
    let answered: usize = by_digest.values().map(BTreeSet::len).sum();
    let majority = by_digest.into_iter().find(|(_, who)| who.len() > nodes / 2);
    match majority {
        Some((digest, _)) if digest == mine => Verdict::Agrees,
        Some((_, who)) => Verdict::Differs(who),
        None if answered == nodes => Verdict::Scattered,
        None => Verdict::Open,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_majority_says_who_is_wrong() {
        let on = |answers: &[(u64, u64)]| {
            let answers = answers
                .iter()
                .map(|(node, digest)| (NodeId(*node), *digest));
            verdict(NodeId(1), 7, answers, 3)
        };
        assert_eq!(on(&[]), Verdict::Open);
        assert_eq!(on(&[(2, 7)]), Verdict::Agrees);
        assert_eq!(on(&[(2, 8)]), Verdict::Open);
        assert_eq!(on(&[(2, 8), (3, 7)]), Verdict::Agrees);
        assert_eq!(on(&[(2, 8), (3, 9)]), Verdict::Scattered);
        let others = [NodeId(2), NodeId(3)].into();
        assert_eq!(on(&[(2, 8), (3, 8)]), Verdict::Differs(others));
    }
}
