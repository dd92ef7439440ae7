//! What sealed segments lose becomes holes, and only that; what a peer has closes them again.

use std::ops::Range;

use super::*;
use crate::storage::frame::{self, Kind};
use crate::storage::{Damaged, Disk, Op};

/// Entries 1 to 120 of group 1 in segments of 4 KiB, with those of group 2 between them, closed.
struct Fixture {
    disk: MemoryDisk,
    expected: Vec<Entry>,
}

fn fixture() -> Fixture {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let (one, two) = (log.group(GroupId(1)), log.group(GroupId(2)));
    for index in 1..121 {
        append(&one, entries(index / 50 + 1, index..index + 1));
        append(&two, vec![entry(1, index, 10)]);
    }
    vote(&one, b"vote");
    log.close().unwrap();
    let expected = all(&one);
    Fixture { disk, expected }
}

/// Where the frames of a segment begin, of which kind they are, and of what group and index.
fn frames(disk: &MemoryDisk, name: &str) -> Vec<(usize, Kind, u32, u64, usize)> {
    let bytes = disk.bytes(name);
    let incarnation = frame::u64_at(&bytes, 24);
    let mut frames = Vec::new();
    let mut at = segment::HEADER;
    while let Ok((frame, _)) = frame::decode(&bytes[at..], incarnation) {
        frames.push((at, frame.kind, frame.group, frame.id.index, frame.size()));
        at += frame.size();
        if frame.kind == Kind::Seal {
            break;
        }
    }
    frames
}

fn flip(disk: &MemoryDisk, name: &str, at: usize) {
    let mut bytes = disk.bytes(name);
    bytes[at] ^= 0x20;
    disk.put_bytes(name, bytes);
}

/// Reads each entry alone: those that can be read are right, the others are the holes.
fn unreadable(group: &GroupLog, expected: &[Entry]) -> Vec<u64> {
    let mut lost = Vec::new();
    for entry in expected {
        let index = entry.id.index;
        assert_eq!(group.id(index), Some(entry.id), "the id of {index}");
        match group.read(index..index + 1, 0) {
            Ok(found) => assert_eq!(found, std::slice::from_ref(entry)),
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                let damaged: &Damaged = error.get_ref().unwrap().downcast_ref().unwrap();
                assert!(
                    damaged.group == GroupId(1) && damaged.range.contains(&index),
                    "{damaged}"
                );
                lost.push(index);
            }
        }
    }
    assert_eq!(
        group.holes().into_iter().flatten().collect::<Vec<_>>(),
        lost
    );
    lost
}

fn repair(group: &GroupLog, entries: Vec<Entry>) {
    let (done, outcome) = done();
    group.repair(entries, done);
    outcome.recv().unwrap().unwrap();
}

/// Repairs everything, and sees that it lasts.
fn heal(disk: &MemoryDisk, log: Log, expected: &[Entry], lost: &[u64]) {
    let group = log.group(GroupId(1));
    let missing = |entry: &&Entry| lost.contains(&entry.id.index);
    repair(&group, expected.iter().filter(missing).cloned().collect());
    assert_eq!((group.holes(), all(&group)), (vec![], expected.to_vec()));
    let reopened = open(&cut(disk));
    let group = reopened.group(GroupId(1));
    assert_eq!((group.holes(), all(&group)), (vec![], expected.to_vec()));
    assert_eq!(group.vote().as_deref(), Some(&b"vote"[..]));
    log.close().unwrap();
}

#[test]
fn damage_of_any_frame_of_a_sealed_segment_loses_only_its_entry() {
    let Fixture { disk, expected } = fixture();
    let name = "00000002.log";
    let listed = frames(&disk, name);
    for kind in [
        Kind::Index,
        Kind::Directory,
        Kind::Seal,
        Kind::Span,
        Kind::Entry,
    ] {
        assert!(listed.iter().any(|frame| frame.1 == kind), "no {kind:?}");
    }
    for (at, kind, group, index, size) in listed {
        for byte in [at + 16, at + size - 1] {
            // The directory too: then every frame is read at start.
            for also in [None, Some(disk.bytes(name).len() - 10)] {
                let disk = cut(&disk);
                flip(&disk, name, byte);
                also.into_iter().for_each(|also| flip(&disk, name, also));
                let log = open(&disk);
                let lost = unreadable(&log.group(GroupId(1)), &expected);
                let ours = kind == Kind::Entry && group == 1;
                let what = format!("{kind:?} at {at}, byte {byte}, {also:?}");
                assert_eq!(lost, Vec::from_iter(ours.then_some(index)), "{what}");
                heal(&disk, log, &expected, &lost);
            }
        }
    }
}

#[test]
fn the_header_may_be_lost_and_the_end_with_it() {
    let Fixture { disk, expected } = fixture();
    let name = "00000002.log";
    let end = disk.bytes(name).len();
    for at in (0..segment::HEADER).filter(|at| !(40..64).contains(at) || *at == 50) {
        let disk = cut(&disk);
        flip(&disk, name, at);
        let log = open(&disk);
        assert_eq!(
            unreadable(&log.group(GroupId(1)), &expected),
            [] as [u64; 0],
            "byte {at}"
        );
        log.close().unwrap();
        flip(&disk, name, end - 10);
        let log = open(&disk);
        assert_eq!(
            unreadable(&log.group(GroupId(1)), &expected),
            [] as [u64; 0],
            "byte {at}"
        );
        log.close().unwrap();
    }
}

/// The group's entries in the segment.
fn held_by(disk: &MemoryDisk, name: &str, group: u32) -> Vec<u64> {
    let frames = frames(disk, name).into_iter();
    let ours = frames.filter(|frame| frame.1 == Kind::Entry && frame.2 == group);
    ours.map(|frame| frame.3).collect()
}

fn held(disk: &MemoryDisk, name: &str) -> Vec<u64> {
    held_by(disk, name, 1)
}

#[test]
fn missing_or_ruined_segments_are_holes() {
    let Fixture { disk, expected } = fixture();
    let names = ["00000001.log", "00000002.log", "00000004.log"];
    let held: Vec<u64> = names.iter().flat_map(|name| held(&disk, name)).collect();
    assert!(held.len() > 30);
    let others: usize = names.iter().map(|name| held_by(&disk, name, 2).len()).sum();
    for ruin in [false, true] {
        let disk = cut(&disk);
        for name in names {
            match ruin {
                true => disk.put_bytes(name, vec![0x55; disk.bytes(name).len()]),
                false => disk.remove(name).unwrap(),
            }
        }
        let log = open(&disk);
        let group = log.group(GroupId(1));
        assert_eq!(unreadable(&group, &expected), held);
        assert_eq!(log.stats().holes, (held.len() + others) as u64);
        let starts: Vec<_> = group.leader_starts().iter().map(|id| id.index).collect();
        assert_eq!(starts, [1, 50, 100]);
        heal(&disk, log, &expected, &held);
    }
}

#[test]
fn what_was_overwritten_does_not_come_back_when_its_successor_is_lost() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let (one, two) = (log.group(GroupId(1)), log.group(GroupId(2)));
    append(&one, entries(1, 1..11));
    append(&two, entries(1, 1..20));
    one.truncate_after(Some(5)).unwrap();
    append(&one, entries(2, 6..9));
    append(&two, entries(1, 20..60));
    log.close().unwrap();
    assert_eq!(held(&disk, "00000002.log"), [6, 7, 8]);
    disk.remove("00000002.log").unwrap();
    let log = open(&disk);
    let one = log.group(GroupId(1));
    let holes: Vec<_> = one.holes().into_iter().flatten().collect();
    assert_eq!((holes, one.last()), (vec![6, 7, 8], Some(id(2, 8))));
    assert_eq!(one.read(1..6, usize::MAX).unwrap(), entries(1, 1..6));
    assert!(one.read(6..7, 0).is_err());
}

#[test]
fn only_what_is_missing_can_be_repaired() {
    let Fixture { disk, .. } = fixture();
    disk.remove("00000002.log").unwrap();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    let hole = group.holes()[0].clone();
    let wrong_id = entry(7, hole.start, 100);
    for wrong in [entry(1, 1, 100), wrong_id, entry(9, 500, 100)] {
        let (done, outcome) = done();
        group.repair(vec![entry(1, hole.start, 100), wrong], done);
        assert_eq!(
            outcome.recv().unwrap().unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
    assert_eq!(group.holes(), std::slice::from_ref(&hole));
    // In part, and never wider than the hole.
    repair(&group, vec![entry(1, hole.start, 100)]);
    let left: Vec<_> = group.holes().into_iter().flatten().collect();
    assert_eq!(left, Vec::from_iter(hole.start + 1..hole.end));
    assert_eq!(
        group.read(1..hole.start + 1, usize::MAX).unwrap(),
        entries(1, 1..hole.start + 1)
    );
}

#[test]
fn repairs_survive_sealing_and_freeing() {
    let Fixture { disk, mut expected } = fixture();
    disk.remove("00000001.log").unwrap();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    let lost: Range<u64> = group.holes()[0].clone();
    let of = |range: Range<u64>| {
        let inside = expected
            .iter()
            .filter(move |entry| range.contains(&entry.id.index));
        inside.cloned().collect::<Vec<_>>()
    };
    // In two pieces, with enough between them that they are sealed in different segments.
    repair(&group, of(lost.start..lost.start + 3));
    append(&group, entries(3, 121..160));
    expected.extend(entries(3, 121..160));
    let of = |range: Range<u64>| {
        let inside = expected
            .iter()
            .filter(move |entry| range.contains(&entry.id.index));
        inside.cloned().collect::<Vec<_>>()
    };
    repair(&group, of(lost.start + 3..lost.end));
    append(&group, entries(3, 160..200));
    expected.extend(entries(3, 160..200));
    assert_eq!((group.holes(), all(&group)), (vec![], expected.clone()));
    log.close().unwrap();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    assert_eq!((group.holes(), all(&group)), (vec![], expected.clone()));
    // What is left of the segments goes when nothing of it is needed, replacements included.
    let last = expected.last().unwrap().id;
    purge(
        &group,
        LogId {
            index: last.index - 1,
            ..last
        },
    );
    purge(&log.group(GroupId(2)), id(1, 119));
    assert!(
        log.stats().segments <= 3 && log.stats().holes == 0,
        "{:?}",
        log.stats()
    );
    log.close().unwrap();
    let log = open(&disk);
    assert_eq!(all(&log.group(GroupId(1))), expected[expected.len() - 1..]);
}

#[test]
fn a_reader_that_meets_damage_tells_and_does_not_meet_it_twice() {
    let Fixture { disk, expected } = fixture();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    log.on_damage(Box::new(move |group, range| {
        tell.lock().unwrap().push((group, range))
    }));
    let (at, _, _, index, _) = frames(&disk, "00000003.log")
        .into_iter()
        .find(|frame| frame.1 == Kind::Entry && frame.2 == 1)
        .unwrap();
    let file = Disk::open(&disk, "00000003.log").unwrap();
    file.write_at(b"rot", at as u64 + 70).unwrap();
    for _ in 0..3 {
        assert!(group.read(1..121, usize::MAX).is_err());
    }
    assert_eq!(*told.lock().unwrap(), [(GroupId(1), index..index + 1)]);
    assert_eq!(unreadable(&group, &expected), [index]);
    heal(&disk, log, &expected, &[index]);
}

#[test]
fn a_disk_that_refuses_to_read_a_place_has_lost_it() {
    let Fixture { disk, expected } = fixture();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    disk.on_op(|op, name| match op == Op::Read && name == "00000002.log" {
        true => Err(io::Error::other("bad sector")),
        false => Ok(()),
    });
    let held = held(&cut(&disk), "00000002.log");
    assert_eq!(unreadable(&group, &expected), held);
    disk.on_op(|_, _| Ok(()));
    heal(&disk, log, &expected, &held);
}

#[test]
fn scrubbing_finds_what_nobody_has_read() {
    let Fixture { disk, expected } = fixture();
    let log = open(&disk);
    let clean = log.scrub_now().unwrap();
    assert_eq!((clean.unreadable, clean.holes), (0, 0));
    assert_eq!(clean.segments, log.stats().segments - 1);
    assert!(clean.bytes >= clean.segments as u64 * 3000, "{clean:?}");
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    log.on_damage(Box::new(move |group, range| {
        tell.lock().unwrap().push((group, range))
    }));
    let frames = frames(&disk, "00000002.log");
    let mut lost = Vec::new();
    for (at, kind, group, index, size) in frames {
        let file = Disk::open(&disk, "00000002.log").unwrap();
        let mut byte = [0];
        file.read_at(&mut byte, (at + size - 1) as u64).unwrap();
        file.write_at(&[byte[0] ^ 1], (at + size - 1) as u64)
            .unwrap();
        let found = log.scrub_now().unwrap();
        if kind == Kind::Entry {
            lost.push((GroupId(group), index..index + 1));
        }
        assert_eq!(
            found.holes,
            u64::from(kind == Kind::Entry),
            "{kind:?} at {at}"
        );
        assert!(found.unreadable > 0);
        assert_eq!(*told.lock().unwrap(), lost);
        file.write_at(&byte, (at + size - 1) as u64).unwrap();
    }
    assert_eq!(log.stats().holes, lost.len() as u64);
    assert_eq!(log.stats().scrub_rounds, 1 + frames_of(&disk) as u64);
    let held = held(&cut(&disk), "00000002.log");
    assert_eq!(unreadable(&log.group(GroupId(1)), &expected), held);
    heal(&disk, log, &expected, &held);
}

fn frames_of(disk: &MemoryDisk) -> usize {
    frames(disk, "00000002.log").len()
}
