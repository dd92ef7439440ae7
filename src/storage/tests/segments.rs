//! Segments: rolling over, freeing, recycling.

use super::*;
use crate::storage::{Disk, Op};

fn files(disk: &MemoryDisk, suffix: &str) -> usize {
    let names = disk.list().unwrap();
    names.iter().filter(|name| name.ends_with(suffix)).count()
}

fn spares(disk: &MemoryDisk) -> usize {
    let names = disk.list().unwrap();
    names
        .iter()
        .filter(|name| name.starts_with("spare-"))
        .count()
}

#[test]
fn a_full_segment_is_followed_by_another() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let (one, two) = (log.group(GroupId(1)), log.group(GroupId(2)));
    vote(&two, b"v2");
    for index in 1..100 {
        append(&one, entries(1, index..index + 1));
    }
    // One batch that fills several segments, and an entry larger than a segment.
    append(&one, entries(1, 100..200));
    append(&one, vec![entry(1, 200, 10_000)]);
    append(&one, entries(2, 201..202));
    let expected = [
        entries(1, 1..200),
        vec![entry(1, 200, 10_000)],
        entries(2, 201..202),
    ]
    .concat();
    assert_eq!(all(&one), expected);
    assert!(log.stats().segments > 8, "{:?}", log.stats());
    let after = open(&cut(&disk));
    assert_eq!(all(&after.group(GroupId(1))), expected);
    assert_eq!(after.group(GroupId(2)).vote().as_deref(), Some(&b"v2"[..]));
}

#[test]
fn segments_go_when_nothing_lives_in_them_and_are_used_again() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let (one, idle) = (log.group(GroupId(1)), log.group(GroupId(2)));
    append(&idle, entries(1, 1..2));
    vote(&idle, b"idle");
    idle.save_committed(Some(id(1, 1))).unwrap();
    for round in 0..50_u64 {
        let first = round * 20 + 1;
        append(&one, entries(round, first..first + 20));
        purge(&one, id(round, first + 14));
        let segments = log.stats().segments;
        assert!(segments <= 5, "{segments} segments in round {round}");
    }
    log.close().unwrap();
    // The first one still holds the idle group's only entry.
    assert!(disk.list().unwrap().contains(&"00000001.log".to_owned()));
    assert!(
        files(&disk, ".log") <= 5 && spares(&disk) <= 2,
        "{:?}",
        disk.list()
    );
    for disk in [cut(&disk), disk.power_cut(|| true)] {
        let log = open(&disk);
        let (one, idle) = (log.group(GroupId(1)), log.group(GroupId(2)));
        assert_eq!(all(&one), entries(49, 996..1001));
        assert_eq!(one.purged(), Some(id(49, 995)));
        assert_eq!(
            (all(&idle), idle.vote().unwrap()),
            (entries(1, 1..2), Bytes::from_static(b"idle"))
        );
        assert_eq!(idle.committed(), Some(id(1, 1)));
        log.close().unwrap();
    }
}

#[test]
fn a_truncation_outlives_the_segment_it_was_written_in() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let (one, filler) = (log.group(GroupId(1)), log.group(GroupId(2)));
    append(&one, entries(1, 1..11));
    append(&filler, entries(1, 1..20));
    one.truncate_after(Some(5)).unwrap();
    append(&filler, entries(1, 20..60));
    purge(&filler, id(1, 58));
    log.close().unwrap();
    assert!(
        !disk.list().unwrap().contains(&"00000002.log".to_owned()),
        "{:?}",
        disk.list()
    );
    let log = open(&disk);
    assert_eq!(all(&log.group(GroupId(1))), entries(1, 1..6));
    append(&log.group(GroupId(1)), entries(2, 6..7));
    log.close().unwrap();
    assert_eq!(
        all(&open(&disk).group(GroupId(1))),
        [entries(1, 1..6), entries(2, 6..7)].concat()
    );
}

#[test]
fn a_segment_is_freed_only_after_the_purge_is_durable() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    append(&group, entries(1, 1..60));
    let (before, images) = (log.stats().segments, Arc::new(Mutex::new(Vec::new())));
    let (kept, watched) = (images.clone(), disk.clone());
    disk.on_op(move |op, _| {
        if matches!(op, Op::Remove | Op::Rename) {
            kept.lock().unwrap().push(cut(&watched));
        }
        Ok(())
    });
    purge(&group, id(1, 58));
    log.close().unwrap();
    let images = std::mem::take(&mut *images.lock().unwrap());
    assert!(!images.is_empty() && log.stats().segments < before);
    for image in images {
        assert_eq!(open(&image).group(GroupId(1)).purged(), Some(id(1, 58)));
    }
}

#[test]
fn readers_never_see_what_a_file_is_used_for_next() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        dir: dir.path().to_owned(),
        tail_bytes: 0,
        ..options()
    };
    let log = Log::open(options, &owner()).unwrap();
    let group = log.group(GroupId(1));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let group = group.clone();
            scope.spawn(move || {
                let mut reads = 0;
                while group.last().is_none_or(|last| last.index < 3000) {
                    for found in group.read(0..u64::MAX, 4000).unwrap() {
                        assert_eq!(found, entry(found.id.term, found.id.index, 100));
                        reads += 1;
                    }
                }
                assert!(reads > 0);
            });
        }
        for round in 0..150 {
            let first = round * 20 + 1;
            append(&group, entries(round, first..first + 20));
            purge(&group, id(round, first + 10));
        }
    });
    log.close().unwrap();
    assert_eq!(all(&group), entries(149, 2992..3001));
}

/// Appends and purges until files have been used again and again.
fn churn(group: &GroupLog, rounds: std::ops::Range<u64>) {
    for round in rounds {
        let first = round * 20 + 1;
        append(group, entries(round, first..first + 20));
        purge(group, id(round, first + 19));
    }
}

#[test]
fn a_file_that_somebody_reads_is_not_written_anew() {
    let disk = MemoryDisk::default();
    let options = Options {
        tail_bytes: 0,
        ..options()
    };
    let log = Log::open_on(Arc::new(disk.clone()), options, &owner()).unwrap();
    let group = log.group(GroupId(1));
    append(&group, entries(0, 1..21));
    let (reading_tx, reading) = channel();
    let (go_tx, go_rx) = channel::<()>();
    let (reading_tx, go_rx) = (Mutex::new(reading_tx), Mutex::new(go_rx));
    disk.on_op(move |op, _| {
        if op == Op::Read {
            reading_tx.lock().unwrap().send(()).unwrap();
            go_rx.lock().unwrap().recv().unwrap();
        }
        Ok(())
    });
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| group.read(1..2, 0));
        reading.recv().unwrap();
        churn(&group, 1..50);
        go_tx.send(()).unwrap();
        assert_eq!(reader.join().unwrap().unwrap(), entries(0, 1..2));
    });
}

#[test]
fn power_may_fail_whenever_a_file_changes_its_name() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    let images = Arc::new(Mutex::new(Vec::new()));
    let (kept, watched) = (images.clone(), disk.clone());
    disk.on_op(move |op, _| {
        if matches!(op, Op::Rename | Op::Remove | Op::SyncDir) {
            // The list is locked first, so that the images stand in order.
            kept.lock().unwrap().push(cut(&watched));
        }
        Ok(())
    });
    churn(&group, 0..30);
    log.close().unwrap();
    let images = std::mem::take(&mut *images.lock().unwrap());
    assert!(images.len() > 30);
    let mut purged = 0;
    for image in images {
        let found = open(&image)
            .group(GroupId(1))
            .purged()
            .map_or(0, |id| id.index);
        assert!(
            found >= purged,
            "{found} after {purged}: what was durable is gone"
        );
        purged = found;
    }
}
