//! Moved records, the horizon they give free, and what comes back from an outline.

use super::*;

const DAY_MS: u64 = 24 * 60 * MINUTE;

fn lasting(id: &str) -> entry::Publish {
    entry::Publish {
        retention_ms: DAY_MS,
        ..publish("a", id)
    }
}

fn with_horizon(stamp_ms: u64, horizon: u64, publishes: Vec<entry::Publish>) -> bytes::Bytes {
    let entry = entry::Entry {
        version: entry::VERSION,
        stamp_ms,
        publishes,
        horizon,
        ..Default::default()
    };
    entry.encode_to_vec().into()
}

/// A record at 1 that lasts, one at 2 that does not; then 1 is moved to 4.
fn moved() -> (Shard, Vec<bytes::Bytes>) {
    let mut shard = fresh(1);
    let old = lasting("old");
    let mut log = vec![
        with_horizon(0, 0, vec![old.clone()]),
        with_horizon(0, 0, vec![publish("b", "x"), publish("b", "x")]),
        with_horizon(2 * MINUTE, u64::MAX, vec![]),
    ];
    for (index, payload) in (1..).zip(&log) {
        shard.apply(index, payload.clone()).unwrap();
    }
    assert_eq!((shard.horizon(), shard.live_floor()), (0, 0), "1 is needed");
    let again = entry::Publish {
        moved: shard.movable(1, 0, &old),
        ..old.clone()
    };
    assert_eq!(shard.movable(2, 0, &publish("b", "x")), None, "it is over");
    log.push(with_horizon(
        2 * MINUTE,
        u64::MAX,
        vec![again.clone(), lasting("new")],
    ));
    let applied = shard.apply(4, log[3].clone()).unwrap();
    assert_eq!(
        applied.outcomes,
        [Outcome::Moved, Outcome::Stored(at(4, 1))]
    );
    assert_eq!(applied.events.len(), 1, "nobody hears of a move");
    assert_eq!(shard.movable(1, 0, &old), None, "it lies elsewhere now");
    assert!(shard.movable(4, 0, &again).is_some());
    shard.check_invariants();
    (shard, log)
}

#[test]
fn a_moved_record_keeps_its_serial_and_frees_its_place() {
    let (shard, _) = moved();
    let found = shard.after(&key("a"), at(0, 0), 9).unwrap();
    let place = |index, position| Place { index, position };
    let places: Vec<_> = found.iter().map(|r| (r.serial, r.place)).collect();
    assert_eq!(places, [(at(1, 0), place(4, 0)), (at(4, 1), place(4, 1))]);
    assert_eq!(found[1].predecessor, Some(at(1, 0)));
    assert_eq!(shard.seen(&key("a"), "old", ""), Some(at(1, 0)));
    assert_eq!((shard.horizon(), shard.live_floor()), (3, 3));
    assert!(!shard.is_dropped(2, 1), "nobody reads that any more");
}

#[test]
fn an_outline_and_the_log_above_the_horizon_are_enough() {
    let (shard, log) = moved();
    let archive = Arc::new(MemoryArchive::default());
    let mut copy = Shard::decode_outline(shard.encode(), Options::default(), archive).unwrap();
    assert_eq!(
        (copy.applied(), copy.decided(), copy.sizes()),
        (3, 4, (2, 0))
    );
    assert!(copy.is_rebuilding());
    let refused = copy.range(&key("a"), &Range::ALL, Kinds::Both, 9);
    assert_eq!(refused, Err(ReadError::Rebuilding));
    let applied = copy.apply(4, log[3].clone()).unwrap();
    assert_eq!(
        applied.outcomes,
        [Outcome::Moved, Outcome::Stored(at(4, 1))]
    );
    assert_eq!(applied.events.len(), 1);
    assert!(!copy.is_rebuilding());
    copy.check_invariants();
    assert_eq!(copy.encode(), shard.encode());
    assert_eq!(copy.digest(), shard.digest());
}

#[test]
fn records_stamped_before_the_clock_come_back_with_the_clocks_stamp() {
    let mut shard = fresh(1);
    let log = [
        with_horizon(9000, 0, vec![publish("b", "x")]),
        with_horizon(9000 + 2 * MINUTE, 1, vec![]),
        with_horizon(5000, 1, vec![publish("a", "late")]),
    ];
    for (index, payload) in (1..).zip(&log) {
        shard.apply(index, payload.clone()).unwrap();
    }
    shard.apply(4, with_horizon(5000, 2, vec![])).unwrap();
    assert_eq!(shard.horizon(), 2);
    let archive = Arc::new(MemoryArchive::default());
    let mut copy = Shard::decode_outline(shard.outline(), Options::default(), archive).unwrap();
    copy.apply(3, log[2].clone()).unwrap();
    copy.skip(4);
    assert_eq!(copy.encode(), shard.encode());
    let stamp_ms = copy.after(&key("a"), at(2, 0), 1).unwrap()[0].stamp_ms;
    assert_eq!(stamp_ms, 9000 + 2 * MINUTE);
}

#[test]
fn replicas_that_differ_have_different_digests() {
    let (one, _) = moved();
    let (mut other, _) = moved();
    assert_eq!(one.digest(), other.digest());
    let cold = |shard: &mut Shard| {
        let index = shard.channels.get_mut(&key("a")).unwrap();
        let record = index.get(
            Place {
                index: 1,
                position: 0,
            },
            &*shard.archive,
        );
        let now = Place {
            index: 4,
            position: 7,
        };
        index.move_to(&record.unwrap().unwrap(), now, &mut shard.ledger);
    };
    cold(&mut other);
    assert_ne!(one.digest(), other.digest());
}
