//! One run with damage: bits of acknowledged data are turned over on the medium. No wrong byte may be read, and what is
//! missing must be told: by a refusal to open, or by an error when it is asked for.

use std::sync::Arc;

use super::oracle::{State, check};
use super::workload::{GROUPS, Run};
use crate::storage::tests::owner;
use crate::storage::{Disk, GroupLog, Log, Options};
use crate::types::GroupId;

pub(super) fn run(seed: u64) {
    let mut run = Run::new(seed);
    for _ in 0..run.random.below(3) {
        let (log, groups) = run.start();
        run.work(&groups);
        run.end(log);
    }
    // A last life that ends well: everything is durable, and the log says so at its end.
    let (log, groups) = run.start();
    let expected: Vec<_> = groups
        .iter()
        .enumerate()
        .map(|(n, group)| State::of(group, n, |id| run.history.size(n, id)))
        .collect();
    log.close().unwrap();
    let disk = run.disk.after_kill();
    let mut names: Vec<_> = disk
        .list()
        .unwrap()
        .into_iter()
        .filter(|name| name.ends_with(".log"))
        .collect();
    names.sort();
    let open = |tail_bytes| {
        let options = Options {
            segment_bytes: 4096,
            tail_bytes,
            ..Options::new("log")
        };
        Log::open_on(Arc::new(disk.clone()), options, &owner())
    };
    // Half of the runs are damaged under a log that is open and reads.
    let reading = run.random.below(2) == 0;
    let opened = reading.then(|| open(0).unwrap());
    // The end of the newest one is vouched for by a single record: two bits there may look like a torn write.
    let newest = names.last().cloned().unwrap();
    let mut at_end = false;
    for _ in 0..1 + run.random.below(3) {
        let name = &names[usize::try_from(run.random.below(names.len() as u64)).unwrap()];
        if *name == newest && std::mem::replace(&mut at_end, true) {
            continue;
        }
        let bits = disk.bytes(name).len() as u64 * 8;
        disk.flip_bit(name, run.random.below(bits));
    }
    if let Some(log) = opened {
        verify(&log, &expected, run.seed());
        // Its own last words may go where the damage is.
        drop(log.close());
        return;
    }
    // Refused: told at once.
    if let Ok(log) = open(1 << 20) {
        verify(&log, &expected, run.seed());
        log.close().unwrap();
    }
}

/// Every entry that should be there is there or an error, one by one and all at once.
fn verify(log: &Log, expected: &[State], seed: u64) {
    for (n, expected) in expected.iter().enumerate().take(GROUPS) {
        let group: GroupLog = log.group(GroupId(u32::try_from(n).unwrap()));
        assert_eq!(group.vote(), expected.vote, "seed {seed}, group {n}: vote");
        assert_eq!(
            group.purged(),
            expected.purged,
            "seed {seed}, group {n}: purge mark"
        );
        for (index, (id, size)) in &expected.entries {
            // Told.
            let Ok(found) = group.read(*index..*index + 1, usize::MAX) else {
                continue;
            };
            let [found] = &found[..] else {
                panic!("group {n}: entry {id:?} is missing, and nothing says so");
            };
            check(found, n);
            assert_eq!((found.id, found.payload.len()), (*id, *size), "group {n}");
        }
        if let Ok(all) = group.read(0..u64::MAX, usize::MAX) {
            assert_eq!(
                all.len(),
                expected.entries.len(),
                "group {n}: entries, all at once"
            );
        }
    }
}
