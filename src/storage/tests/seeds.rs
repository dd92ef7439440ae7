//! Seeded runs of the log on a disk that fails, forgets and loses power, against an oracle: what was acknowledged is
//! there, in order and with its bytes; what was never handed in is not; and a crash alone never makes a log unreadable.
//!
//! `FIRTH_SEEDS` is the number of seeds (2,000 unless given), `FIRTH_SEEDS_SECONDS` the time after which no new one begins (14
//! unless either is given), `FIRTH_SEEDS_FROM` the first one. `FIRTH_SEED` repeats one seed, a hundred times: the same seed
//! always hands in the same changes and meets the same faults, operation by operation of each kind, but how the log's two
//! threads batch and interleave is up to the scheduler. In every third run the workload waits after each change, so that only
//! the making of spare files is left to chance.

mod damage;
mod oracle;
mod workload;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Fewer than this many seeds within the time bound prove too little: then the test fails.
const SEEDS_MIN: u64 = 500;
const WORKERS: usize = 3;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number")),
    )
}

/// Runs `one` for every seed that the environment asks for, on several threads, and stops at the first failure.
fn for_each_seed(test: &str, one: fn(u64)) {
    let repeat = |seed: u64| {
        format!(
            "FIRTH_SEED={seed} cargo test --release --lib storage::tests::seeds::{test} -- --nocapture"
        )
    };
    if let Some(seed) = number("FIRTH_SEED") {
        (0..100).for_each(|_| one(seed));
        return;
    }
    let asked = number("FIRTH_SEEDS");
    let from = number("FIRTH_SEEDS_FROM").unwrap_or(0);
    let end = from + asked.unwrap_or(2_000);
    let bound = match (number("FIRTH_SEEDS_SECONDS"), asked) {
        (None, Some(_)) => Duration::MAX,
        (seconds, _) => Duration::from_secs(seconds.unwrap_or(14)),
    };
    let (next, ran, began) = (AtomicU64::new(from), AtomicU64::new(0), Instant::now());
    let failed: Mutex<Option<(u64, String)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while began.elapsed() < bound && failed.lock().unwrap().is_none() {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        break;
                    }
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| one(seed))) {
                        let what = panic.downcast_ref::<String>().cloned();
                        let what = what
                            .or_else(|| panic.downcast_ref().map(|text: &&str| (*text).to_owned()));
                        failed
                            .lock()
                            .unwrap()
                            .get_or_insert((seed, what.unwrap_or_default()));
                    }
                    ran.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let (ran, seconds) = (ran.into_inner(), began.elapsed().as_secs_f32());
    println!("{test}: {ran} seeds of {from}..{end} in {seconds:.1} s");
    if let Some((seed, what)) = failed.into_inner().unwrap() {
        panic!(
            "seed {seed} failed, after {ran} seeds: {what}\n  repeat it: {}",
            repeat(seed)
        );
    }
    let min = SEEDS_MIN.min(end - from);
    assert!(
        ran >= min,
        "only {ran} seeds in {seconds:.1} s, at least {min} are needed"
    );
}

#[test]
fn what_was_acknowledged_outlives_every_fault() {
    for_each_seed("what_was_acknowledged_outlives_every_fault", workload::run);
}

#[test]
fn damage_is_told_and_never_read() {
    for_each_seed("damage_is_told_and_never_read", damage::run);
}
