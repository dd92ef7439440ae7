//! Nodes that lose what they had: the disk, bytes of it, or their mind.

use std::time::Duration;

use firth::storage::Op;
use firth::types::ShardId;

use super::{SOME, finish, kept, with_both_loads};
use crate::disk::Then;
use crate::ledger::{Load, Mix, body};
use crate::net::{LONG, Net, Outcome, SOON, outcome, shards, until};

const EIO: i32 = 5;
/// A healthy cluster elects several times in here.
const LONG_ENOUGH: Duration = Duration::from_secs(5);

/// Whether anybody acknowledges a publish within a time in which a healthy cluster elects twice.
async fn anybody_acknowledges(net: &Net, through: u64) -> bool {
    let proofs = shards().map(async |shard| {
        let channel = Net::channel_of(shard, "proof");
        let submitted = net.submit(through, &channel, &channel, body(&channel, 100), LONG);
        let published = tokio::time::timeout(LONG_ENOUGH, outcome(submitted)).await;
        matches!(published, Ok(Outcome::Stored(_)))
    });
    let acked = futures_util::future::join_all(proofs).await;
    acked.contains(&true)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_an_emptied_disk_votes_only_after_it_was_admitted_again() {
    let (net, loads) = with_both_loads(13).await;
    // Node 1 gives birth to clusters: it must not do that again.
    let (wiped, other, third) = (1, 2, 3);
    net.wipe(wiped).await;
    loads[0].progress(SOME).await;
    finish(&net, loads).await;
    net.restart_wiped(wiped).await;
    // Alone with a node that lacks everything, one that has everything is no majority.
    net.kill(other).await;
    assert!(
        !anybody_acknowledges(&net, third).await,
        "the empty node voted"
    );
    net.restart(other).await;
    // Also when everybody else starts anew, and looks around for votes.
    net.kill(third).await;
    assert!(
        !anybody_acknowledges(&net, other).await,
        "the empty node voted"
    );
    net.restart(third).await;
    let later = Mix {
        prefix: "later",
        ..Mix::default()
    };
    let loads = vec![Load::start(&net, &later)];
    loads[0].progress(SOME).await;
    assert!(net.live(wiped).is_none(), "it took part unasked");
    net.readmit(other, wiped).await;
    net.wait_serving().await;
    net.kill(third).await;
    loads[0].progress(SOME).await;
    net.restart(third).await;
    net.wait_serving().await;
    finish(&net, loads).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_fails_says_so_and_others_lead() {
    let net = Net::start(3, 21).await;
    let loads = vec![Load::start(&net, &Mix::default())];
    loads[0].progress(SOME).await;
    let failing = net.leader(ShardId(0)).await;
    net.disk(failing)
        .when(1, Then::Fail(EIO), |op, _| op == Op::Sync);
    let said = net.failure(failing).await;
    // Another node leads both shards while this one still lies there.
    until("others to lead", SOON, async || {
        let living = net.living();
        let led = |shard| {
            living
                .iter()
                .any(|live| live.id != failing && live.leads(shard))
        };
        shards().all(led).then_some(())
    })
    .await;
    // What it still takes in, it does not acknowledge on its own.
    net.kill(failing).await;
    loads[0].progress(SOME).await;
    net.restart(failing).await;
    net.wait_serving().await;
    loads[0].progress(SOME).await;
    finish(&net, loads).await;
    assert!(!said.is_empty());
}

/// The node's segment files, oldest first.
fn segments(net: &Net, id: u64) -> Vec<String> {
    let names = firth::storage::Disk::list(net.disk(id).memory()).unwrap();
    let mut segments: Vec<String> = names
        .into_iter()
        .filter(|name| name.ends_with(".log"))
        .collect();
    segments.sort();
    segments
}

/// Flips a bit about the middle of a segment that is not the newest one, and names it.
fn damage(net: &Net, id: u64) -> String {
    let disk = net.disk(id);
    let segments = segments(net, id);
    assert!(segments.len() > 3, "the log has rolled: {segments:?}");
    let sealed = &segments[segments.len() / 2];
    // A segment that ended early has nothing in its middle, and nobody looks there.
    let bytes = disk.memory().bytes(sealed);
    let until_middle = &bytes[..bytes.len() / 2];
    let written = until_middle.iter().rposition(|byte| *byte != 0);
    let at = written.expect("something was written") as u64;
    disk.memory().flip_bit(sealed, 8 * at + 4);
    sealed.clone()
}

/// A log of several segments of which nothing goes.
async fn with_a_long_log(seed: u64) -> (std::sync::Arc<Net>, Vec<Load>) {
    let net = Net::start(3, seed).await;
    let rolling = Mix {
        body_max: 6000,
        ..Mix::default()
    };
    let loads = vec![Load::start(&net, &rolling), Load::start(&net, &kept())];
    loads[0].progress(3 * SOME).await;
    (net, loads)
}

/// Has the node look at its whole log. `false` when the damaged segment was freed before it came to that.
async fn finds(net: &Net, id: u64, damaged: &str) -> bool {
    let log = net.live(id).expect("it lives").log;
    let scrubbed = tokio::task::spawn_blocking(move || log.scrub_now());
    let scrubbed = scrubbed.await.unwrap().unwrap();
    let there = segments(net, id).iter().any(|name| name == damaged);
    assert!(
        scrubbed.unreadable > 0 || !there,
        "damage of {damaged} was not found: {scrubbed:?}"
    );
    scrubbed.unreadable > 0
}

/// Damages the log of a node that lives, until it has found it.
async fn damage_live(net: &Net, id: u64) {
    while !finds(net, id, &damage(net, id)).await {}
}

async fn is_mended(net: &Net, id: u64) {
    let log = net.live(id).expect("it lives").log;
    let what = format!("node {id} to have all of its log");
    until(&what, SOON, async || (log.stats().holes == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_an_old_segment_is_found_and_fetched_from_peers() {
    let (net, loads) = with_a_long_log(22).await;
    for leads in [false, true] {
        let victim = match leads {
            true => net.leader(ShardId(0)).await,
            false => net.follower().await,
        };
        loop {
            net.kill(victim).await;
            let damaged = damage(&net, victim);
            net.restart(victim).await;
            net.wait_serving().await;
            if finds(&net, victim, &damaged).await {
                break;
            }
        }
        is_mended(&net, victim).await;
        loads[0].progress(SOME).await;
    }
    finish(&net, loads).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bit_that_flips_under_a_running_node_is_found_and_mended() {
    let (net, loads) = with_a_long_log(23).await;
    let victim = net.follower().await;
    let log = net.live(victim).expect("it lives").log;
    // Alone, it finds the damage and cannot mend it.
    let others = net.ids().into_iter().filter(|id| *id != victim);
    others.for_each(|other| net.cut(victim, other));
    // What is hit first may be an entry that nobody needs any more.
    while log.stats().holes == 0 {
        damage_live(&net, victim).await;
    }
    net.heal();
    is_mended(&net, victim).await;
    loads[0].progress(SOME).await;
    // A leader too, which publishers ask for everything meanwhile.
    let leader = net.leader(ShardId(0)).await;
    damage_live(&net, leader).await;
    is_mended(&net, leader).await;
    loads[0].progress(SOME).await;
    finish(&net, loads).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_state_differs_is_found_and_rebuilt() {
    for purged in [true, false] {
        let (net, mut loads) = match purged {
            true => with_both_loads(26).await,
            false => (Net::start(3, 27).await, Vec::new()),
        };
        if purged {
            super::purged_beyond(&net, &[0, 0]).await;
        }
        let shard = ShardId(0);
        let channel = Net::channel_of(shard, "twice");
        let forgetful = net.leader(shard).await;
        let publish = async |n: usize| {
            let id = format!("twice-{n}");
            let body = body(&id, 100);
            let mut at = forgetful;
            until("an acknowledgement", SOON, async || {
                let stored = outcome(net.submit(at, &channel, &id, body.clone(), LONG)).await;
                at = 1 + at % 3;
                stored.serial()
            })
            .await
        };
        // More than memory holds, so that the first are in the archive.
        let mut serials = Vec::new();
        for n in 0..150 {
            serials.push(publish(n).await);
        }
        net.disk(forgetful).archives().forget_keys(true);
        // Leading, it takes this for new; the others know better.
        publish(0).await;
        net.disk(forgetful).archives().forget_keys(false);
        until("the difference to be found", SOON, async || {
            (net.comparisons().1 > 0).then_some(())
        })
        .await;
        let failed = net
            .live(forgetful)
            .expect("it lives")
            .failure
            .borrow()
            .clone();
        assert_eq!(failed, None);
        until("it to be as the others", SOON, async || {
            let shown = net.history(forgetful, &channel).await;
            let shown: Vec<_> = shown.into_iter().map(|record| record.serial).collect();
            (shown == serials).then_some(())
        })
        .await;
        net.forgive_differences();
        let later = Mix {
            prefix: "later",
            ..kept()
        };
        loads.push(Load::start(&net, &later));
        loads[loads.len() - 1].progress(2).await;
        finish(&net, loads).await;
    }
}
