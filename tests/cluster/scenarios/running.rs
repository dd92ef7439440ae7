//! Nodes that die, stop and stall while others publish.

use firth::storage::Op;

use super::SOME;
use crate::disk::Then;
use crate::ledger::{Load, Mix};
use crate::net::{Net, SOON, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_after_the_other_dies_or_stops_and_comes_back_under_load() {
    let net = Net::start(3, 1).await;
    let load = Load::start(&net, &Mix::default());
    load.progress(SOME).await;
    for round in 0..2 {
        for id in net.ids() {
            // Each node once this way, once the other.
            match (round + id) % 2 {
                0 => net.kill(id).await,
                _ => net.stop(id).await,
            }
            load.progress(SOME).await;
            net.restart(id).await;
            net.wait_serving().await;
            load.progress(SOME).await;
        }
    }
    let ledger = load.finish().await;
    net.agree().await;
    ledger.verify(&net).await;
    assert_eq!(
        net.check_nodes(),
        0,
        "no record was heard of without its predecessor"
    );
    assert!(net.living()[0].log.stats().segments > 3, "the log rolled");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_lose_power_at_once_under_load() {
    let net = Net::start(3, 2).await;
    let load = Load::start(&net, &Mix::default());
    for _ in 0..2 {
        load.progress(SOME).await;
        futures_util::future::join_all(net.ids().into_iter().map(|id| net.kill(id))).await;
        net.restart_all(&net.ids()).await;
        net.wait_serving().await;
    }
    load.progress(SOME).await;
    let ledger = load.finish().await;
    net.agree().await;
    ledger.verify(&net).await;
    net.check_nodes();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_node_loses_power_again_and_again() {
    let net = Net::start(1, 3).await;
    let load = Load::start(&net, &Mix::default());
    for _ in 0..4 {
        load.progress(SOME).await;
        net.kill(1).await;
        net.restart(1).await;
        net.wait_serving().await;
    }
    let ledger = load.finish().await;
    ledger.verify(&net).await;
    net.check_nodes();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_of_five_nodes_may_be_dead() {
    let net = Net::start(5, 4).await;
    let load = Load::start(&net, &Mix::default());
    for dead in [[1, 2], [4, 1]] {
        load.progress(SOME).await;
        for id in dead {
            net.kill(id).await;
        }
        load.progress(SOME).await;
        for id in dead {
            net.restart(id).await;
        }
        net.wait_serving().await;
    }
    let ledger = load.finish().await;
    net.agree().await;
    ledger.verify(&net).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_catches_up_and_nobody_waits_for_it() {
    let net = Net::start(3, 5).await;
    let load = Load::start(&net, &Mix::default());
    for id in net.ids() {
        let others: Vec<u64> = net.ids().into_iter().filter(|other| *other != id).collect();
        for other in &others {
            net.cut(id, *other);
        }
        load.progress(SOME).await;
        net.heal();
        until("everybody to reach everybody", SOON, async || {
            let whole = net
                .ids()
                .into_iter()
                .all(|id| net.reached_from(id).len() == 2);
            whole.then_some(())
        })
        .await;
        load.progress(SOME).await;
    }
    let ledger = load.finish().await;
    net.agree().await;
    ledger.verify(&net).await;
    assert_eq!(net.check_nodes(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_whose_disk_stands_still_holds_nobody_up() {
    let net = Net::start(3, 6).await;
    let load = Load::start(&net, &Mix::default());
    load.progress(SOME).await;
    let slow = net.follower().await;
    let disk = net.disk(slow);
    let mut stands_still = disk.when(1, Then::Block, |op, _| op == Op::Sync);
    let stood = tokio::time::timeout(SOON, stands_still.wait_for(|fired| *fired)).await;
    stood.expect("every node syncs under load").unwrap();
    let syncs = net.live(slow).unwrap().log.stats().syncs;
    for _ in 0..4 {
        load.progress(2 * SOME).await;
        for live in net.living().iter().filter(|live| live.id != slow) {
            let waiting = live.log.stats().waiting_bytes;
            assert!(waiting < 4 << 20, "node {}: {waiting} bytes wait", live.id);
        }
    }
    assert_eq!(
        net.live(slow).unwrap().log.stats().syncs,
        syncs,
        "it stood still"
    );
    disk.release();
    let ledger = load.finish().await;
    net.agree().await;
    ledger.verify(&net).await;
    assert_eq!(net.check_nodes(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_goes_while_segments_change_names() {
    let net = Net::start(3, 7).await;
    let big = Mix {
        body_max: 8 << 10,
        ..Mix::default()
    };
    let load = Load::start(&net, &big);
    for (nth, id, op) in [(1, 1, Op::Create), (2, 2, Op::Rename), (3, 3, Op::SyncDir)] {
        let mut gone = net
            .disk(id)
            .when(nth, Then::PowerCut, move |done, _| done == op);
        let fired = tokio::time::timeout(SOON, gone.wait_for(|gone| *gone)).await;
        fired
            .unwrap_or_else(|_| panic!("node {id} never does {op:?}"))
            .unwrap();
        net.kill(id).await;
        load.progress(SOME).await;
        net.restart(id).await;
        net.wait_serving().await;
    }
    let ledger = load.finish().await;
    net.agree().await;
    ledger.verify(&net).await;
}
