//! What clusters are put through.

mod losing;
mod presence;
mod purging;
mod running;

use std::sync::Arc;
use std::time::Duration;

use crate::ledger::{Ledger, Load, Mix};
use crate::net::{LONG, Net, SOON, shards, until};

/// Acknowledgements for each publisher that show that all goes on.
const SOME: usize = 24;

/// Records that nobody may lose however much is purged around them.
fn kept() -> Mix {
    Mix {
        prefix: "kept",
        channels: 2,
        burst: 1,
        pause: Duration::from_millis(200),
        retention: LONG,
        ..Mix::default()
    }
}

/// A cluster of three under load: records that stay, and records that soon go.
async fn with_both_loads(seed: u64) -> (Arc<Net>, Vec<Load>) {
    let net = Net::start(3, seed).await;
    let passing = Load::start(&net, &Mix::passing());
    let loads = vec![passing, Load::start(&net, &kept())];
    loads[0].progress(SOME).await;
    (net, loads)
}

/// Waits until every living node has purged beyond `marks`, an index per shard.
async fn purged_beyond(net: &Net, marks: &[u64]) {
    let what = format!("the log to be purged beyond {marks:?}: {}", net.describe());
    until(&what, SOON, async || {
        let living = net.living();
        let mut all = living.iter().flat_map(|live| {
            let marks = shards().zip(marks);
            marks.map(|(shard, mark)| live.purged(shard) > *mark)
        });
        all.all(|beyond| beyond).then_some(())
    })
    .await;
}

/// Newest applied index of each shard on a node.
fn applied(net: &Net, id: u64) -> Vec<u64> {
    let live = net.live(id).expect("it lives");
    shards()
        .map(|shard| *live.cluster.applied(shard).borrow())
        .collect()
}

/// Ends the loads and checks everything. The records whose predecessor some node never heard of.
async fn finish(net: &Net, loads: Vec<Load>) -> usize {
    let mut ledgers: Vec<Ledger> = Vec::new();
    for load in loads {
        ledgers.push(load.finish().await);
    }
    net.agree().await;
    for ledger in &ledgers {
        assert!(ledger.acked() > 0);
        ledger.verify(net).await;
    }
    net.check_nodes()
}
