//! Purged logs, snapshots, emptied disks and damage: each is switched on by taking its `ignore` away when the code that
//! it names is there.
//!
//! Retention is real time here, two minutes at least, and nothing shorter can be configured: scenarios that need a purge
//! wait for it, with publishers at work, and take about three minutes each.

use std::sync::Arc;
use std::time::Duration;

use firth::storage::Op;
use firth::types::ShardId;

use crate::disk::Then;
use crate::ledger::{Ledger, Load, Mix, body};
use crate::net::{Net, Outcome, SOON, shards, until};

const SOME: usize = 24;
/// The shortest retention, the ticks that make it advance, and a purge.
const PURGED_IN: Duration = Duration::from_secs(240);
const EIO: i32 = 5;
/// Elections and more fit in here several times: what has not happened by then does not happen by itself.
const LONG_ENOUGH: Duration = Duration::from_secs(8);

/// Records that nobody may lose however much is purged around them.
fn kept() -> Mix {
    Mix {
        prefix: "kept",
        channels: 2,
        burst: 1,
        pause: Duration::from_millis(500),
        retention: Duration::from_secs(24 * 3600),
        ..Mix::default()
    }
}

/// Waits until every living node has purged beyond `marks`, an index per shard.
async fn purged_beyond(net: &Net, marks: &[u64]) {
    until("the log to be purged", PURGED_IN, async || {
        let living = net.living();
        let mut all = living.iter().flat_map(|live| {
            shards()
                .zip(marks)
                .map(|(shard, mark)| live.purged(shard) > *mark)
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

async fn finish(net: &Net, loads: Vec<Load>) {
    let mut ledgers: Vec<Ledger> = Vec::new();
    for load in loads {
        ledgers.push(load.finish().await);
    }
    net.agree().await;
    for ledger in &ledgers {
        assert!(ledger.acked() > 0);
        ledger.verify(net).await;
    }
    net.check_events();
}

/// A cluster of three under load of which one follower is dead and cannot come back by the log alone.
async fn with_one_left_behind(seed: u64) -> (Arc<Net>, Vec<Load>, u64) {
    let net = Net::start(3, seed).await;
    let loads = vec![
        Load::start(&net, &kept()),
        Load::start(&net, &Mix::default()),
    ];
    loads[1].progress(SOME).await;
    let dead = net.follower().await;
    let marks = applied(&net, dead);
    net.kill(dead).await;
    loads[1].progress(SOME).await;
    purged_beyond(&net, &marks).await;
    (net, loads, dead)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs retention that purges, and snapshots"]
async fn a_follower_that_was_away_longer_than_the_log_catches_up() {
    let (net, loads, dead) = with_one_left_behind(11).await;
    net.restart(dead).await;
    net.wait_serving().await;
    loads[1].progress(SOME).await;
    finish(&net, loads).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs retention that purges, and snapshots"]
async fn whoever_sends_the_snapshot_dies_half_way_three_times_in_a_row() {
    let (net, loads, dead) = with_one_left_behind(12).await;
    net.restart(dead).await;
    // Ever further into what is sent to it: the first file of a snapshot, then the log behind it.
    for writes in [1, 8, 40] {
        let written = net
            .disk(dead)
            .when(writes, Then::Note, |op, _| op == Op::Write);
        let mut written = written;
        let some = tokio::time::timeout(SOON, written.wait_for(|written| *written)).await;
        some.expect("something is sent to it").unwrap();
        let sender = net.leader(ShardId(0)).await;
        if sender == dead {
            continue;
        }
        net.kill(sender).await;
        net.restart(sender).await;
    }
    net.wait_serving().await;
    loads[1].progress(SOME).await;
    finish(&net, loads).await;
}

/// What an operator does when a node lost its disk and is to vote again: the control command for it.
///
/// # Errors
/// Always, until the control group has such a command: then it is one line here, `cluster.command(...)`.
fn readmit(net: &Net, through: u64, node: u64) -> Result<(), String> {
    let live = net.live(through).ok_or("the node to ask is dead")?;
    let nodes = live.cluster.nodes().len();
    Err(format!(
        "{nodes} nodes know no command to admit node {node} again"
    ))
}

/// Whether anybody acknowledges a publish within a time in which a healthy cluster elects twice.
async fn anybody_acknowledges(net: &Net, through: u64) -> bool {
    for shard in shards() {
        let channel = Net::channel_of(shard, "proof");
        let published = net.publish(through, &channel, &channel, body(&channel, 100));
        if let Ok(Outcome::Stored(_)) = tokio::time::timeout(LONG_ENOUGH, published).await {
            return true;
        }
    }
    false
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs nodes that prove their log before they vote, and re-admission"]
async fn a_node_with_an_emptied_disk_votes_only_after_it_was_admitted_again() {
    let net = Net::start(3, 13).await;
    let loads = vec![
        Load::start(&net, &kept()),
        Load::start(&net, &Mix::default()),
    ];
    loads[1].progress(SOME).await;
    // Node 1 gives birth to clusters: it must not do that again.
    let (wiped, other, third) = (1, 2, 3);
    net.wipe(wiped).await;
    loads[1].progress(SOME).await;
    finish(&net, loads).await;
    net.restart(wiped).await;
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
    let loads = vec![Load::start(
        &net,
        &Mix {
            prefix: "later",
            ..Mix::default()
        },
    )];
    loads[0].progress(SOME).await;
    readmit(&net, other, wiped).unwrap();
    net.wait_serving().await;
    net.kill(third).await;
    loads[0].progress(SOME).await;
    net.restart(third).await;
    net.wait_serving().await;
    finish(&net, loads).await;
}

/// Power goes at the `nth` operation of this kind on a file of this kind, on each node in turn.
async fn power_goes_at(seed: u64, op: Op, file: &'static str, nths: &[usize]) {
    let net = Net::start(3, seed).await;
    let loads = vec![
        Load::start(&net, &kept()),
        Load::start(&net, &Mix::default()),
    ];
    for (nth, id) in nths.iter().zip([1, 2, 3].into_iter().cycle()) {
        let at = net.disk(id).when(*nth, Then::PowerCut, move |done, name| {
            done == op && name.contains(file)
        });
        let mut at = at;
        let gone = tokio::time::timeout(PURGED_IN, at.wait_for(|gone| *gone)).await;
        gone.unwrap_or_else(|_| panic!("node {id} never does {op:?} on {file}"))
            .unwrap();
        net.kill(id).await;
        loads[1].progress(SOME).await;
        net.restart(id).await;
        net.wait_serving().await;
    }
    loads[1].progress(SOME).await;
    finish(&net, loads).await;
}

/// The name of a file changes before the directory is synced, so both sides of that are tried.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs checkpoints that are stored as the log goes"]
async fn power_goes_while_a_checkpoint_is_stored() {
    for (seed, op) in [
        (14, Op::Create),
        (15, Op::Write),
        (16, Op::Sync),
        (17, Op::Rename),
    ] {
        power_goes_at(seed, op, "snapshot", &[1, 2, 3]).await;
    }
}

/// The first operation after the snapshot has its name, which is the directory's sync, and those after that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs retention that purges"]
async fn power_goes_while_segments_are_freed() {
    // A freed segment becomes a spare, or goes.
    for (seed, op) in [(18, Op::Rename), (19, Op::Remove)] {
        power_goes_at(seed, op, ".log", &[1, 2, 4]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs retention that purges, and snapshots"]
async fn power_goes_at_each_step_of_installing_a_snapshot() {
    let (net, loads, dead) = with_one_left_behind(20).await;
    // Each try gets further than the one before; the last one is let through.
    for nth in 1..=12 {
        let step =
            |op, name: &str| op != Op::Read && (name.contains("snapshot") || op == Op::SyncDir);
        let mut gone = net.disk(dead).when(nth, Then::PowerCut, step);
        if net.try_restart(dead).await.is_err() {
            net.kill(dead).await;
            continue;
        }
        let cut = tokio::time::timeout(LONG_ENOUGH, gone.wait_for(|gone| *gone)).await;
        net.kill(dead).await;
        if cut.is_err() {
            break;
        }
    }
    net.restart(dead).await;
    net.wait_serving().await;
    loads[1].progress(SOME).await;
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

/// A byte in the middle of a segment that is not the newest one.
fn damage(net: &Net, id: u64) -> String {
    let disk = net.disk(id);
    let names = firth::storage::Disk::list(disk.memory()).unwrap();
    let mut segments: Vec<String> = names
        .into_iter()
        .filter(|name| name.ends_with(".log"))
        .collect();
    segments.sort();
    assert!(segments.len() > 3, "the log has rolled: {segments:?}");
    let sealed = segments[segments.len() / 2].clone();
    let mut bytes = disk.memory().bytes(&sealed);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    disk.memory().put_bytes(&sealed, bytes);
    sealed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a log that opens with damage and fetches from peers what it lacks"]
async fn a_flipped_byte_in_an_old_segment_is_found_and_fetched_from_peers() {
    let net = Net::start(3, 22).await;
    let rolling = Mix {
        body_max: 6000,
        ..Mix::default()
    };
    let loads = vec![Load::start(&net, &kept()), Load::start(&net, &rolling)];
    loads[1].progress(4 * SOME).await;
    for leads in [false, true] {
        let victim = match leads {
            true => net.leader(ShardId(0)).await,
            false => net.follower().await,
        };
        net.kill(victim).await;
        damage(&net, victim);
        net.restart(victim).await;
        net.wait_serving().await;
        loads[1].progress(SOME).await;
    }
    finish(&net, loads).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs a scrub that finds damage in a node that runs"]
async fn a_byte_that_flips_under_a_running_node_is_found_and_mended() {
    let net = Net::start(3, 23).await;
    let rolling = Mix {
        body_max: 6000,
        ..Mix::default()
    };
    let loads = vec![Load::start(&net, &rolling)];
    loads[0].progress(4 * SOME).await;
    let victim = net.follower().await;
    let segment = damage(&net, victim);
    let damaged = net.disk(victim).memory().bytes(&segment);
    until("the damage to be found", PURGED_IN, async || {
        (net.disk(victim).memory().bytes(&segment) != damaged).then_some(())
    })
    .await;
    finish(&net, loads).await;
}
