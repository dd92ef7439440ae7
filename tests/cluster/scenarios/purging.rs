//! Logs that are purged while nodes are away, send or install snapshots, or lose power on the way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use firth::storage::Op;
use firth::types::ShardId;

use super::{SOME, applied, finish, purged_beyond, with_both_loads};
use crate::disk::Then;
use crate::ledger::{Load, Mix, body};
use crate::net::{LONG, Net, Outcome, SOON, Stored, outcome};

/// Elections and more fit in here several times: what has not happened by then does not happen by itself.
const LONG_ENOUGH: Duration = Duration::from_secs(8);

/// A cluster of three under load of which one follower is dead and cannot come back by the log alone.
async fn with_one_left_behind(seed: u64) -> (Arc<Net>, Vec<Load>, u64) {
    let (net, loads) = with_both_loads(seed).await;
    let dead = net.follower().await;
    let marks = applied(&net, dead);
    net.kill(dead).await;
    loads[0].progress(SOME).await;
    purged_beyond(&net, &marks).await;
    (net, loads, dead)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_was_away_longer_than_the_log_catches_up() {
    let (net, loads, dead) = with_one_left_behind(11).await;
    net.restart(dead).await;
    net.wait_serving().await;
    loads[0].progress(SOME).await;
    finish(&net, loads).await;
    let (agreed, _) = net.comparisons();
    assert!(agreed > 0, "the replicas compared their states");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_sends_the_snapshot_dies_half_way_three_times_in_a_row() {
    let (net, loads, dead) = with_one_left_behind(12).await;
    net.restart(dead).await;
    // Ever further into what is sent to it: the first file of a snapshot, then the log behind it.
    for writes in [1, 8, 40] {
        let mut written = net
            .disk(dead)
            .when(writes, Then::Note, |op, _| op == Op::Write);
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
    loads[0].progress(SOME).await;
    finish(&net, loads).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_goes_at_each_step_of_installing_a_snapshot() {
    let (net, loads, dead) = with_one_left_behind(20).await;
    // Each try gets further than the one before; the last one is let through.
    for nth in 1..=8 {
        let step =
            |op, name: &str| op != Op::Read && (name.contains("snapshot") || op == Op::SyncDir);
        let mut gone = net.disk(dead).when(nth, Then::PowerCut, step);
        if net.try_restart(dead).await.is_err() {
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
    loads[0].progress(SOME).await;
    finish(&net, loads).await;
}

/// Power goes at the `nth` operation of each kind on a file of this kind, on one node after the other.
async fn power_goes_at(seed: u64, file: &'static str, steps: &[(Op, usize)]) {
    let (net, loads) = with_both_loads(seed).await;
    for ((op, nth), id) in steps.iter().copied().zip([1, 2, 3].into_iter().cycle()) {
        let mut at = net.disk(id).when(nth, Then::PowerCut, move |done, name| {
            done == op && name.contains(file)
        });
        let gone = tokio::time::timeout(SOON, at.wait_for(|gone| *gone)).await;
        gone.unwrap_or_else(|_| panic!("node {id} never does {op:?} on {file}"))
            .unwrap();
        net.kill(id).await;
        loads[0].progress(SOME).await;
        net.restart(id).await;
        net.wait_serving().await;
    }
    loads[0].progress(SOME).await;
    finish(&net, loads).await;
}

/// The former checkpoint changes its name before the new one does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_goes_while_a_checkpoint_is_stored() {
    let steps = [
        (Op::Create, 2),
        (Op::Write, 2),
        (Op::Sync, 1),
        (Op::Rename, 1),
        (Op::Rename, 2),
        (Op::Rename, 3),
    ];
    power_goes_at(14, "snapshot", &steps).await;
}

/// A freed segment becomes a spare, or goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn power_goes_while_segments_are_freed() {
    let steps = [
        (Op::Rename, 1),
        (Op::Remove, 1),
        (Op::Rename, 2),
        (Op::Remove, 2),
    ];
    power_goes_at(18, ".log", &steps).await;
}

/// The one record of the channel, on every living node.
async fn all_show(net: &Net, channel: &str, record: &Stored) {
    for live in net.living() {
        let found = net.history(live.id, channel).await;
        assert!(
            found == [record.clone()],
            "node {} shows {found:?}",
            live.id
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_long_lived_record_does_not_hold_the_log() {
    let net = Net::start(3, 24).await;
    let channel = Net::channel_of(ShardId(0), "long");
    let (id, body) = ("lone", body("lone", 3000));
    let submitted = net.submit(1, &channel, id, body.clone(), LONG);
    let Outcome::Stored(serial) = outcome(submitted).await else {
        panic!("a healthy cluster stores what is published");
    };
    let id = id.to_owned();
    let lone = Stored { serial, id, body };
    let loads = vec![Load::start(&net, &Mix::passing())];
    purged_beyond(&net, &[serial.index, 0]).await;
    all_show(&net, &channel, &lone).await;
    net.stop(1).await;
    net.restart(1).await;
    net.kill(2).await;
    net.restart(2).await;
    net.wait_serving().await;
    all_show(&net, &channel, &lone).await;
    let marks = applied(&net, 1);
    net.wipe(3).await;
    net.restart_wiped(3).await;
    net.readmit(1, 3).await;
    net.wait_serving().await;
    all_show(&net, &channel, &lone).await;
    // Wherever it was moved to by then, the log let go of that as well.
    purged_beyond(&net, &marks).await;
    all_show(&net, &channel, &lone).await;
    finish(&net, loads).await;
    all_show(&net, &channel, &lone).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_die_at_random_moments_of_checkpoints_and_purges() {
    let (net, loads) = with_both_loads(25).await;
    let until = Instant::now() + Duration::from_secs(20);
    while Instant::now() < until {
        let shard = ShardId(u32::try_from(net.below(2)).unwrap());
        let leader = net.leader(shard).await;
        let nth = usize::try_from(1 + net.below(10)).unwrap();
        let step = |op, name: &str| match op {
            Op::Read => false,
            Op::Rename | Op::Remove | Op::SyncDir => true,
            Op::Create | Op::Write | Op::Sync => name.contains("snapshot"),
        };
        let mut gone = net.disk(leader).when(nth, Then::PowerCut, step);
        // What is not done by then is not waited for: it dies at any moment.
        let _ = tokio::time::timeout(Duration::from_secs(3), gone.wait_for(|gone| *gone)).await;
        net.kill(leader).await;
        loads[0].progress(2).await;
        net.restart(leader).await;
        if net.below(2) == 0 {
            net.wait_serving().await;
        }
    }
    net.wait_serving().await;
    loads[0].progress(SOME).await;
    finish(&net, loads).await;
}
