//! Group commit, and what happens when the disk refuses.

use super::*;
use crate::storage::Op;

/// Blocks the disk's syncs while it is shut; says when one has come.
struct Gate {
    arrived: Receiver<()>,
    open: Sender<io::Result<()>>,
}

fn gate(disk: &MemoryDisk) -> Gate {
    let (arrived_tx, arrived) = channel();
    let (open, open_rx) = channel();
    let (arrived_tx, open_rx) = (Mutex::new(arrived_tx), Mutex::new(open_rx));
    disk.on_op(move |op, _| match op {
        Op::Sync => {
            arrived_tx.lock().unwrap().send(()).unwrap();
            open_rx.lock().unwrap().recv().unwrap()
        }
        _ => Ok(()),
    });
    Gate { arrived, open }
}

#[test]
fn appends_that_gather_during_a_sync_share_the_next() {
    let disk = MemoryDisk::default();
    let options = Options {
        segment_bytes: 1 << 20,
        ..options()
    };
    let log = Log::open_on(Arc::new(disk.clone()), options, &owner()).unwrap();
    let before = log.stats();
    let gate = gate(&disk);
    let (first, first_outcome) = done();
    log.group(GroupId(0))
        .append(entries(1, 1..2), first)
        .unwrap();
    gate.arrived.recv().unwrap();

    let (order_tx, order_rx) = channel();
    for n in 1..=100 {
        let order_tx = order_tx.clone();
        let group = log.group(GroupId(n % 16));
        let index = group.last().map_or(1, |last| last.index + 1);
        let done: Done = Box::new(move |result| order_tx.send((n, result.is_ok())).unwrap());
        group.append(entries(1, index..index + 1), done).unwrap();
        assert_eq!(group.last(), Some(id(1, index)), "readable at once");
        assert_eq!(
            group.read(index..index + 1, 1).unwrap(),
            entries(1, index..index + 1)
        );
    }
    assert_eq!(log.stats().waiting_bytes, 101 * 156);
    assert!(
        order_rx.try_recv().is_err(),
        "nothing may be acknowledged before its sync"
    );
    gate.open.send(Ok(())).unwrap();
    gate.arrived.recv().unwrap();
    first_outcome.recv().unwrap().unwrap();
    assert!(order_rx.try_recv().is_err());
    gate.open.send(Ok(())).unwrap();
    let order: Vec<_> = (0..100).map(|_| order_rx.recv().unwrap()).collect();
    assert_eq!(order, (1..=100).map(|n| (n, true)).collect::<Vec<_>>());
    let after = log.stats();
    assert_eq!(
        after.syncs - before.syncs,
        2,
        "one for the first, one for all others"
    );
    assert_eq!(after.batches - before.batches, 2);
    assert_eq!((after.frames, after.waiting_bytes), (101, 0));
    gate.open.send(Ok(())).unwrap();
    gate.open.send(Ok(())).unwrap();
    log.close().unwrap();
}

#[test]
fn committed_marks_cost_no_sync() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    append(&group, entries(1, 1..3));
    let before = log.stats();
    for _ in 0..100 {
        group.save_committed(Some(id(1, 1))).unwrap();
    }
    group.save_committed(Some(id(1, 2))).unwrap();
    append(&group, entries(1, 3..4));
    let after = log.stats();
    assert_eq!(
        (after.syncs - before.syncs, after.frames - before.frames),
        (1, 2)
    );
    assert_eq!(
        open(&cut(&disk)).group(GroupId(1)).committed(),
        Some(id(1, 2))
    );
}

#[test]
fn a_failed_sync_or_write_poisons_the_log() {
    for failing in [Op::Sync, Op::Write] {
        let disk = MemoryDisk::default();
        let log = open(&disk);
        let group = log.group(GroupId(1));
        append(&group, entries(1, 1..2));
        let (reached_tx, reached) = channel();
        let (go_tx, go_rx) = channel::<()>();
        let (reached_tx, go_rx) = (Mutex::new(reached_tx), Mutex::new(go_rx));
        disk.on_op(move |op, _| {
            if op != failing {
                return Ok(());
            }
            reached_tx.lock().unwrap().send(()).unwrap();
            go_rx.lock().unwrap().recv().unwrap();
            Err(io::Error::other("the medium is gone"))
        });
        let (written, written_outcome) = done();
        group.append(entries(1, 2..3), written).unwrap();
        reached.recv().unwrap();
        let (waiting, waiting_outcome) = done();
        log.group(GroupId(2))
            .save_vote(Bytes::from_static(b"v"), waiting);
        go_tx.send(()).unwrap();
        for outcome in [written_outcome, waiting_outcome] {
            let error = outcome.recv().unwrap().unwrap_err();
            assert!(error.to_string().contains("the medium is gone"), "{error}");
        }
        // The disk is well again; the log may not act as if nothing had happened.
        disk.on_op(|_, _| Ok(()));
        let (late, late_outcome) = done();
        assert!(group.append(entries(1, 3..4), late).is_err());
        assert!(late_outcome.recv().unwrap().is_err());
        let (late, late_outcome) = done();
        group.purge(id(1, 1), late);
        assert!(late_outcome.recv().unwrap().is_err());
        assert!(group.save_committed(None).is_err());
        assert!(group.truncate_after(None).is_err());
        assert!(log.close().is_err());
        assert_eq!(log.stats().waiting_bytes, 0);
        let again = open(&cut(&disk));
        assert_eq!(all(&again.group(GroupId(1))), entries(1, 1..2));
    }
}

#[test]
fn a_panicking_callback_fails_the_log_and_leaves_nobody_waiting() {
    let disk = MemoryDisk::default();
    let log = open(&disk);
    let group = log.group(GroupId(1));
    let gate = gate(&disk);
    group
        .append(
            entries(1, 1..2),
            Box::new(|_| panic!("as the test wants it")),
        )
        .unwrap();
    gate.arrived.recv().unwrap();
    let (waiting, outcome) = done();
    group.append(entries(1, 2..3), waiting).unwrap();
    gate.open.send(Ok(())).unwrap();
    assert!(outcome.recv().unwrap().is_err());
    assert!(log.close().is_err());
}
