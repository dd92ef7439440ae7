//! What a crash explains is cut off; what it does not explain is refused.

use super::*;
use crate::storage::frame::{self, Frame, Kind};

const FIRST: &str = "00000001.log";

/// A disk with two acknowledged appends, not closed, and where the last one begins and ends.
fn two_appends() -> (MemoryDisk, usize, usize) {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    append(&group, entries(1, 1..4));
    append(&group, entries(1, 4..5));
    let disk = cut(&disk);
    let end = segment::HEADER + 4 * (frame::HEADER + 100);
    // Without what was zeroed ahead.
    disk.put_bytes(FIRST, disk.bytes(FIRST)[..end].to_vec());
    (disk, end - frame::HEADER - 100, end)
}

#[test]
fn a_last_frame_torn_at_any_byte_is_cut_for_good() {
    let (disk, start, end) = two_appends();
    let whole = disk.bytes(FIRST);
    for at in start..end {
        for fill in [None, Some(0), Some(0xaa)] {
            let mut torn = whole[..at].to_vec();
            torn.resize(
                if fill.is_some() { end + 600 } else { at },
                fill.unwrap_or(0),
            );
            if torn.starts_with(&whole) {
                continue;
            }
            disk.put_bytes(FIRST, torn);
            let log = open(&disk);
            let group = log.group(GroupId(1));
            assert_eq!(all(&group), entries(1, 1..4), "torn at {at}");
            append(&group, entries(2, 4..6));
            log.close().unwrap();
            let group = open(&disk).group(GroupId(1));
            assert_eq!(all(&group), [entries(1, 1..4), entries(2, 4..6)].concat());
            drop(group);
            disk.put_bytes(FIRST, whole.clone());
            wait_unlocked(&disk);
        }
    }
}

/// The log that was dropped without being closed lets go of the directory a moment later.
fn wait_unlocked(disk: &MemoryDisk) {
    while crate::storage::Disk::try_lock(disk, "lock")
        .unwrap()
        .is_none()
    {
        std::thread::yield_now();
    }
}

#[test]
fn a_flip_before_what_was_acknowledged_is_refused() {
    let (disk, start, _) = two_appends();
    let whole = disk.bytes(FIRST);
    for at in 0..start {
        let mut bad = whole.clone();
        bad[at] ^= 0x10;
        disk.put_bytes(FIRST, bad.clone());
        let error = try_open(&disk).unwrap_err();
        let Error::Damaged { file, offset, .. } = &error else {
            panic!("byte {at}: {error}");
        };
        assert!(
            file.ends_with(FIRST) && *offset <= at as u64 && at as u64 - offset < 156,
            "byte {at}: {error}"
        );
        assert_eq!(disk.bytes(FIRST), bad, "changed the evidence");
    }
}

#[test]
fn any_flip_after_a_clean_close_is_refused() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    append(&log.group(GroupId(1)), entries(1, 1..4));
    log.close().unwrap();
    let whole = disk.bytes(FIRST);
    let end = segment::HEADER + 3 * (frame::HEADER + 100);
    for at in 0..end {
        let mut bad = whole.clone();
        bad[at] ^= 0x10;
        disk.put_bytes(FIRST, bad);
        assert!(
            matches!(try_open(&disk).unwrap_err(), Error::Damaged { .. }),
            "byte {at}"
        );
    }
}

#[test]
fn a_batch_may_be_torn_out_of_order() {
    let (disk, _, _) = two_appends();
    let log = open(&disk);
    append(&log.group(GroupId(1)), entries(1, 5..8));
    let mut bytes = cut(&disk).bytes(FIRST);
    // The first of three entries that were synced together did not reach the disk, the others did.
    bytes[segment::HEADER + 4 * 156 + 60] ^= 1;
    let disk = cut(&disk);
    disk.put_bytes(FIRST, bytes);
    assert_eq!(all(&open(&disk).group(GroupId(1))), entries(1, 1..5));
}

#[test]
fn a_hole_in_the_newest_segment_is_refused() {
    let (disk, start, end) = two_appends();
    let mut bytes = disk.bytes(FIRST);
    let incarnation = frame::u64_at(&bytes, 24);
    bytes.truncate(start);
    let gap = entry(1, 6, 100);
    let frame = Frame {
        group: 1,
        id: gap.id,
        payload: &gap.payload,
        ..Frame::bare(Kind::Entry)
    };
    frame.encode(incarnation, start as u64, &mut bytes);
    assert_eq!(bytes.len(), end);
    disk.put_bytes(FIRST, bytes);
    let error = try_open(&disk).unwrap_err();
    for part in ["entry 6 follows entry 3", "admit the node anew"] {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
}

#[test]
fn an_older_segment_is_refused_by_version() {
    let (disk, _, _) = two_appends();
    let mut bytes = disk.bytes(FIRST);
    bytes[8] = 1;
    let sum = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..segment::HEADER]);
    bytes[12..16].copy_from_slice(&sum.to_le_bytes());
    disk.put_bytes(FIRST, bytes);
    let error = try_open(&disk).unwrap_err();
    assert!(
        matches!(&error, Error::OlderVersion { found: 1, supported: segment::VERSION, file } if file.ends_with(FIRST)),
        "{error}"
    );
}

#[test]
fn newer_segments_and_frames_are_refused_by_version() {
    let (disk, start, end) = two_appends();
    let whole = disk.bytes(FIRST);
    let newer = u8::try_from(segment::VERSION + 1).unwrap();
    let mut header = whole.clone();
    header[8] = newer;
    let of_header =
        crc32c::crc32c_append(crc32c::crc32c(&header[..12]), &header[16..segment::HEADER]);
    header[12..16].copy_from_slice(&of_header.to_le_bytes());
    let mut frame = whole;
    frame[start + 8] = frame::VERSION + 1;
    let (head, payload) = frame[start..end].split_at(frame::HEADER);
    let of_frame = [&head[..4], &head[8..]]
        .into_iter()
        .fold(crc32c::crc32c(payload), crc32c::crc32c_append);
    frame[start + 4..start + 8].copy_from_slice(&of_frame.to_le_bytes());
    for (bytes, version) in [(header, newer), (frame, frame::VERSION + 1)] {
        disk.put_bytes(FIRST, bytes);
        let error = try_open(&disk).unwrap_err();
        let Error::NewerVersion {
            file,
            found,
            supported: segment::VERSION,
        } = &error
        else {
            panic!("{error}");
        };
        assert!(
            file.ends_with(FIRST) && *found == u32::from(version),
            "{error}"
        );
    }
}

#[test]
fn remains_of_a_torn_write_do_not_pass_for_records() {
    // Where they would follow the next append, with and without a mark before it.
    for shift in [0, frame::HEADER] {
        let (disk, start, end) = two_appends();
        let mut bytes = disk.bytes(FIRST);
        let incarnation = frame::u64_at(&bytes, 24);
        bytes[start..].fill(0);
        bytes.resize(end + shift, 0);
        let stale = Frame {
            group: 2,
            payload: b"stale",
            ..Frame::bare(Kind::Vote)
        };
        stale.encode(incarnation, start as u64, &mut bytes);
        disk.put_bytes(FIRST, bytes);
        append(&open(&disk).group(GroupId(1)), entries(2, 4..5));
        let log = open(&cut(&disk));
        assert_eq!(log.group(GroupId(2)).vote(), None, "shift {shift}");
        let expected = [entries(1, 1..4), entries(2, 4..5)].concat();
        assert_eq!(all(&log.group(GroupId(1))), expected);
    }
}
