//! Opening reads directories, reading reads indexes, and memory of both is bounded.

use super::crash::Random;
use super::*;
use crate::storage::{Disk, Op};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A closed log with this many sealed segments at least.
fn filled(segments: usize) -> (MemoryDisk, Vec<Entry>) {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    let mut expected = Vec::new();
    while log.stats().segments <= segments {
        let next = expected.len() as u64 + 1;
        let new = entries(next / 100 + 1, next..next + 10);
        append(&group, new.clone());
        expected.extend(new);
    }
    log.close().unwrap();
    (disk, expected)
}

#[test]
fn opening_reads_little_of_each_sealed_segment() {
    let (disk, expected) = filled(50);
    let reads = Arc::new(AtomicUsize::new(0));
    let counter = reads.clone();
    disk.on_op(move |op, _| {
        counter.fetch_add(usize::from(op == Op::Read), Ordering::SeqCst);
        Ok(())
    });
    let log = open(&disk);
    let count = reads.swap(0, Ordering::SeqCst);
    assert!((50..=3 * 50 + 10).contains(&count), "{count} reads to open");
    let group = log.group(GroupId(1));
    let last = expected.last().unwrap().id;
    assert_eq!((group.first(), group.last()), (Some(1), Some(last)));
    for entry in &expected {
        assert_eq!(group.id(entry.id.index), Some(entry.id));
    }
    assert_eq!(group.bytes(), 100 * expected.len() as u64);
    assert_eq!(group.newer_segments(), log.stats().segments - 1);
    assert_eq!(reads.swap(0, Ordering::SeqCst), 0, "none of these reads");
    assert_eq!(all(&group), expected);
    let count = reads.swap(0, Ordering::SeqCst);
    assert!(
        (100..=110).contains(&count),
        "{count}: an index and a run of entries each"
    );
    assert_eq!(all(&group), expected);
    let count = reads.swap(0, Ordering::SeqCst);
    assert!(
        (50..=55).contains(&count),
        "{count}: indexes are remembered"
    );
}

#[test]
fn indexes_in_memory_are_bounded() {
    let (disk, expected) = filled(20);
    let options = Options {
        index_bytes: 0,
        ..options()
    };
    let log = Log::open_on(Arc::new(disk), options, &owner()).unwrap();
    assert_eq!(all(&log.group(GroupId(1))), expected);
    assert_eq!(all(&log.group(GroupId(1))), expected);
}

#[test]
fn bytes_and_segments_follow_purges_and_truncations() {
    let (disk, expected) = filled(10);
    let log = open(&disk);
    let group = log.group(GroupId(1));
    let count = expected.len() as u64;
    let segments = log.stats().segments;
    let on_disk = log.stats().bytes_on_disk;
    assert!(on_disk >= 3500 * segments as u64, "{on_disk}");
    let mut left = segments;
    for upto in (1..count - 3).step_by(7) {
        purge(&group, expected[usize::try_from(upto).unwrap() - 1].id);
        assert_eq!(group.bytes(), (count - upto) * 100, "purged to {upto}");
        assert!(log.stats().segments <= left);
        left = log.stats().segments;
        assert_eq!(group.newer_segments(), left - 1);
    }
    assert!(left < 3 && log.stats().bytes_on_disk < on_disk / 3);
    group.truncate_after(Some(count - 2)).unwrap();
    let first = group.first().unwrap();
    assert_eq!(group.bytes(), (count - 1 - first) * 100);
    group.truncate_after(None).unwrap();
    assert_eq!((group.bytes(), group.newer_segments()), (0, 0));
}

#[test]
fn power_may_fail_at_every_step_of_sealing() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    append(&group, entries(1, 1..20));
    let images = Arc::new(Mutex::new(Vec::new()));
    let (kept, watched) = (images.clone(), disk.clone());
    let mut random = Random::new(5);
    let random = Mutex::new(move || random.below(2) == 0);
    disk.on_op(move |op, _| {
        if op != Op::Read {
            let mut random = random.lock().unwrap();
            for _ in 0..4 {
                kept.lock().unwrap().push(watched.power_cut(&mut *random));
            }
        }
        Ok(())
    });
    append(&group, entries(1, 20..40));
    disk.on_op(|_, _| Ok(()));
    assert!(log.stats().segments > 1);
    let images = std::mem::take(&mut *images.lock().unwrap());
    assert!(images.len() > 30);
    for (number, image) in images.into_iter().enumerate() {
        let log = open(&image);
        let group = log.group(GroupId(1));
        let found = group.last().unwrap().index + 1;
        assert!(
            found >= 20 && group.holes().is_empty(),
            "image {number}: {found}"
        );
        assert_eq!(all(&group), entries(1, 1..found), "image {number}");
        // It goes on from there, and seals.
        append(&group, entries(2, found..90));
        log.close().unwrap();
        let group = open(&image).group(GroupId(1));
        assert_eq!(
            all(&group),
            [entries(1, 1..found), entries(2, found..90)].concat()
        );
    }
}

#[test]
fn a_full_disk_acknowledges_nothing_and_still_reads() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    append(&group, entries(1, 1..20));
    log.health().unwrap();
    disk.on_op(|op, name| {
        match op == Op::Create || (op == Op::Write && name.contains("spare")) || name == "next.tmp"
        {
            true => Err(io::Error::from(io::ErrorKind::StorageFull)),
            false => Ok(()),
        }
    });
    let mut next = 20;
    let error = loop {
        let (done, outcome) = done();
        if let Err(error) = group.append(entries(1, next..next + 5), done) {
            break error;
        }
        match outcome.recv().unwrap() {
            Ok(()) => next += 5,
            Err(error) => break error,
        }
        assert!(next < 500, "it never became full");
    };
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(log.health().unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(
        group.read(1..next, usize::MAX).unwrap(),
        entries(1, 1..next)
    );
    let image = cut(&disk);
    image.on_op(|_, _| Ok(()));
    assert_eq!(
        open(&image)
            .group(GroupId(1))
            .read(1..next, usize::MAX)
            .unwrap(),
        entries(1, 1..next)
    );
    assert!(disk.list().unwrap().contains(&"00000001.log".to_owned()));
}
