//! Opening: what survives a restart, and which directories are refused.

use super::*;
use crate::storage::identity;
use crate::wire::segment::Identity;

#[test]
fn everything_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let options = || Options {
        dir: dir.path().join("new/log"),
        ..options()
    };
    let log = Log::open(options(), &owner()).unwrap();
    let name = log.directory_id().to_owned();
    let (one, two) = (log.group(GroupId(1)), log.group(GroupId(2)));
    append(&one, entries(1, 0..5));
    append(&two, entries(4, 10..12));
    append(&one, entries(2, 5..6));
    vote(&one, b"vote");
    one.save_committed(Some(id(1, 3))).unwrap();
    purge(&two, id(4, 10));
    log.close().unwrap();
    let late = one.append(entries(2, 6..7), done().0);
    assert_eq!(late.unwrap_err().kind(), io::ErrorKind::BrokenPipe);

    let log = Log::open(options(), &owner()).unwrap();
    assert_eq!(log.directory_id(), name);
    assert_eq!(log.groups(), [GroupId(1), GroupId(2)]);
    let (one, two) = (log.group(GroupId(1)), log.group(GroupId(2)));
    assert_eq!(all(&one), [entries(1, 0..5), entries(2, 5..6)].concat());
    assert_eq!(one.vote().as_deref(), Some(&b"vote"[..]));
    assert_eq!(one.committed(), Some(id(1, 3)));
    assert_eq!(
        (one.first(), one.last(), one.purged()),
        (Some(0), Some(id(2, 5)), None)
    );
    assert_eq!(one.leader_starts(), [id(1, 0), id(2, 5)]);
    assert_eq!(all(&two), entries(4, 11..12));
    assert_eq!((two.first(), two.purged()), (Some(11), Some(id(4, 10))));
    append(&two, entries(5, 12..13));
    log.close().unwrap();
}

#[test]
fn a_directory_is_open_once() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        segment_bytes: 4096,
        ..Options::new(dir.path())
    };
    let log = Log::open(options.clone(), &owner()).unwrap();
    let second = Log::open(options.clone(), &owner());
    assert!(matches!(second, Err(Error::Locked { dir }) if dir == options.dir));
    log.close().unwrap();
    Log::open(options, &owner()).unwrap().close().unwrap();
}

#[test]
fn another_owners_directory_is_refused() {
    let disk = MemoryDisk::default();
    open(&disk).close().unwrap();
    for (cluster_id, node) in [("other", 7), ("test", 8)] {
        let cluster_id = cluster_id.to_owned();
        let error = Log::open_on(
            Arc::new(disk.clone()),
            options(),
            &Owner { cluster_id, node },
        )
        .unwrap_err();
        assert!(matches!(error, Error::WrongOwner { .. }), "{error}");
        let text = error.to_string();
        for part in ["log/identity", "node 7", "`test`", &format!("node {node}")] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
    open(&disk).close().unwrap();
}

#[test]
fn a_newer_directory_is_refused() {
    let disk = MemoryDisk::default();
    let identity = Identity {
        version: 9,
        cluster_id: "test".to_owned(),
        node: 7,
        directory_id: "x".to_owned(),
    };
    identity::write(&disk, &identity).unwrap();
    let error = try_open(&disk).unwrap_err();
    assert!(
        matches!(
            error,
            Error::NewerVersion {
                found: 9,
                supported: 1,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("log/identity"), "{error}");
}

#[test]
fn a_damaged_or_lost_identity_is_refused() {
    let disk = MemoryDisk::default();
    open(&disk).close().unwrap();
    let good = disk.bytes("identity");
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        disk.put_bytes("identity", bad);
        assert!(
            matches!(try_open(&disk).unwrap_err(), Error::Damaged { .. }),
            "byte {at}"
        );
    }
    disk.put_bytes("identity", good);
    open(&disk).close().unwrap();
    crate::storage::Disk::remove(&disk, "identity").unwrap();
    assert!(matches!(
        try_open(&disk).unwrap_err(),
        Error::NoIdentity { .. }
    ));
}
