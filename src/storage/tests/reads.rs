//! Reading: from memory, from disk, and past what was cut away.

use super::*;
use crate::storage::Op;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts reads of the disk.
fn count_reads(disk: &MemoryDisk) -> Arc<AtomicUsize> {
    let reads = Arc::new(AtomicUsize::new(0));
    let counter = reads.clone();
    disk.on_op(move |op, _| {
        counter.fetch_add(usize::from(op == Op::Read), Ordering::SeqCst);
        Ok(())
    });
    reads
}

#[test]
fn recent_entries_come_from_memory_and_old_ones_from_disk() {
    let disk = MemoryDisk::default();
    let options = Options {
        tail_bytes: 1000,
        ..options()
    };
    let log = Log::open_on(Arc::new(disk.clone()), options, &owner()).unwrap();
    let group = log.group(GroupId(1));
    let reads = count_reads(&disk);
    append(&group, entries(1, 1..101));
    // The tail is trimmed before the callback is told.
    assert_eq!(
        group.read(91..101, usize::MAX).unwrap(),
        entries(1, 91..101)
    );
    assert_eq!(reads.load(Ordering::SeqCst), 0);
    assert_eq!(
        group.read(81..101, usize::MAX).unwrap(),
        entries(1, 81..101)
    );
    // One of the indexes and one of the entries, for each segment that they are in.
    let count = reads.load(Ordering::SeqCst);
    assert!((1..=4).contains(&count), "{count} reads");
    assert_eq!(all(&group), entries(1, 1..101));
}

#[test]
fn a_read_stops_at_its_limit_but_gives_one_entry() {
    let disk = MemoryDisk::default();
    let group = open(&disk).group(GroupId(1));
    append(&group, entries(1, 5..10));
    let read = |range, bytes| group.read(range, bytes).unwrap().len();
    assert_eq!(
        (read(5..10, 0), read(5..10, 299), read(5..10, 300)),
        (1, 2, 3)
    );
    assert_eq!(
        (
            read(0..6, 999),
            read(9..99, 999),
            read(10..99, 9),
            read(7..7, 9)
        ),
        (1, 1, 0, 0)
    );
}

#[test]
fn a_rotten_entry_is_an_error_that_says_where() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    append(&log.group(GroupId(1)), entries(1, 1..4));
    log.close().unwrap();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    let name = "00000001.log";
    let file = crate::storage::Disk::open(&disk, name).unwrap();
    let second = segment::HEADER as u64 + 156;
    file.write_at(b"rot", second + 60).unwrap();
    assert_eq!(group.read(1..2, 0).unwrap(), entries(1, 1..2));
    let error = group.read(1..4, 1000).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let text = error.to_string();
    for part in [name, &format!("byte {second}"), "entry 2", "group 1"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn truncated_entries_vanish_at_once_and_stay_away() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    append(&group, entries(1, 1..10));
    // None of these wait for the disk in between.
    group.truncate_after(Some(4)).unwrap();
    assert_eq!(group.last(), Some(id(1, 4)));
    assert_eq!(all(&group), entries(1, 1..5));
    group.append(entries(2, 5..7), done().0).unwrap();
    assert_eq!(all(&group), [entries(1, 1..5), entries(2, 5..7)].concat());
    group.truncate_after(Some(5)).unwrap();
    append(&group, entries(3, 6..9));
    let expected = [entries(1, 1..5), entries(2, 5..6), entries(3, 6..9)].concat();
    assert_eq!(all(&group), expected);
    assert_eq!(all(&open(&cut(&disk)).group(GroupId(1))), expected);
    group.truncate_after(None).unwrap();
    assert_eq!((group.last(), group.first()), (None, None));
    log.close().unwrap();
    assert_eq!(all(&open(&disk).group(GroupId(1))), []);
}

#[test]
fn what_would_leave_a_hole_or_overwrite_is_refused() {
    let disk = MemoryDisk::default();
    let group = open(&disk).group(GroupId(1));
    append(&group, entries(1, 3..6));
    for wrong in [
        entries(1, 7..8),
        entries(1, 5..6),
        [entries(1, 6..7), entries(1, 8..9)].concat(),
    ] {
        let (done, outcome) = done();
        assert_eq!(
            group.append(wrong, done).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert!(outcome.recv().unwrap().is_err());
    }
    assert_eq!(all(&group), entries(1, 3..6));
    purge(&group, id(1, 4));
    assert!(group.truncate_after(Some(3)).is_err());
    group.truncate_after(Some(4)).unwrap();
    assert_eq!((group.last(), group.first()), (Some(id(1, 4)), None));
    append(&group, entries(2, 5..6));
    // A snapshot from elsewhere: purge beyond the end, and go on behind it.
    purge(&group, id(2, 20));
    assert_eq!((group.last(), group.first()), (Some(id(2, 20)), None));
    assert!(group.append(entries(2, 6..7), done().0).is_err());
    append(&group, entries(2, 21..23));
    purge(&group, id(1, 4));
    assert_eq!(group.purged(), Some(id(2, 20)));
    assert_eq!(
        all(&open(&cut(&disk)).group(GroupId(1))),
        entries(2, 21..23)
    );
}
