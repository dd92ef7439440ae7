//! The shard against a plain reference, and its promises one by one.
#![cfg(test)]

mod classes;
mod model;
mod moves;
mod presence;
mod tiers;

use std::sync::Arc;

use prost::Message as _;

use super::*;
use crate::types::{ChannelKey, ChannelName, Kinds, Range, Serial};
use crate::wire::entry;

fn key(name: &str) -> ChannelKey {
    ChannelKey {
        app: "app".parse().unwrap(),
        name: ChannelName::parse(name).unwrap(),
    }
}

fn fresh(incarnation: u16) -> Shard {
    let archive = Arc::new(MemoryArchive::default());
    Shard::new(incarnation, Options::default(), archive)
}

fn publish(channel: &str, id: &str) -> entry::Publish {
    entry::Publish {
        app: "app".into(),
        channel: channel.into(),
        id: id.into(),
        count: 1,
        ..Default::default()
    }
}

fn from_kafka(epoch: u64, offset: i64) -> entry::Publish {
    let source = entry::Source {
        bridge: "b".into(),
        topic: "t".into(),
        partition: 0,
        offset,
        epoch,
        after: None,
    };
    entry::Publish {
        source: Some(source),
        ..publish("k", &format!("kafka:{offset}"))
    }
}

fn apply(
    shard: &mut Shard,
    index: u64,
    stamp_ms: u64,
    publishes: Vec<entry::Publish>,
) -> Vec<Outcome> {
    let entry = entry::Entry {
        version: entry::version_of(&publishes),
        stamp_ms,
        publishes,
        ..Default::default()
    };
    let applied = shard.apply(index, entry.encode_to_vec().into()).unwrap();
    shard.check_invariants();
    applied.outcomes
}

fn at(index: u64, position: u16) -> Serial {
    Serial {
        incarnation: 1,
        index,
        position,
    }
}

fn behind(floor: Serial) -> Result<Vec<RecordRef>, ReadError> {
    Err(Behind { floor }.into())
}

const MINUTE: u64 = 60_000;

#[test]
fn a_repeated_publish_is_stored_once_and_answered_with_its_first_serial() {
    let mut shard = fresh(1);
    let twice = vec![
        publish("a", "c:0"),
        publish("a", "c:0"),
        publish("b", "c:0"),
    ];
    let outcomes = apply(&mut shard, 5, 0, twice);
    let first = Outcome::Stored(at(5, 0));
    assert_eq!(
        outcomes,
        [
            first,
            Outcome::Duplicate(Some(at(5, 0))),
            Outcome::Stored(at(5, 2))
        ]
    );
    assert!(shard.is_dropped(5, 1) && !shard.is_dropped(5, 0));
    assert_eq!(shard.seen(&key("a"), "c:0", ""), Some(at(5, 0)));
}

#[test]
fn nobody_takes_a_connections_next_id_by_choosing_it_first() {
    let mut shard = fresh(1);
    let numbered = entry::Publish {
        connection_id: "victim".into(),
        ..publish("a", "victim:7")
    };
    let chosen = publish("a", "victim:7");
    let outcomes = apply(
        &mut shard,
        1,
        0,
        vec![chosen.clone(), numbered.clone(), chosen, numbered],
    );
    let (first, second) = (at(1, 0), at(1, 1));
    assert_eq!(
        outcomes[..2],
        [Outcome::Stored(first), Outcome::Stored(second)]
    );
    assert_eq!(
        outcomes[2..],
        [
            Outcome::Duplicate(Some(first)),
            Outcome::Duplicate(Some(second))
        ]
    );
}

#[test]
fn nobody_takes_a_kafka_records_place_by_foretelling_its_id() {
    let mut shard = fresh(1);
    let forged = publish("k", "kafka:12");
    let outcomes = apply(&mut shard, 1, 0, vec![forged, from_kafka(1, 12)]);
    assert_eq!(
        outcomes,
        [Outcome::Stored(at(1, 0)), Outcome::Stored(at(1, 1))]
    );
}

#[test]
fn a_record_and_its_key_are_gone_after_the_retention_by_stamps() {
    let mut shard = fresh(1);
    apply(&mut shard, 1, 0, vec![publish("a", "x")]);
    apply(&mut shard, 2, 2 * MINUTE - 1, vec![publish("a", "y")]);
    assert_eq!(
        shard
            .after(&key("a"), Serial::default().with(1), 9)
            .unwrap()
            .len(),
        2
    );
    assert!(shard.has_due(2 * MINUTE) && !shard.has_due(2 * MINUTE - 1));
    apply(&mut shard, 3, 2 * MINUTE, vec![]);
    assert_eq!(shard.seen(&key("a"), "x", ""), None);
    assert_eq!(shard.after(&key("a"), at(0, 0), 9), behind(at(1, 0)));
    let left = shard.after(&key("a"), at(1, 0), 9).unwrap();
    assert_eq!((left.len(), left[0].predecessor), (1, Some(at(1, 0))));
}

#[test]
fn a_clock_that_goes_back_does_not_take_stamps_back() {
    let mut shard = fresh(1);
    apply(&mut shard, 1, 1000, vec![publish("a", "x")]);
    apply(&mut shard, 2, 10, vec![publish("a", "y")]);
    let stamps: Vec<u64> = shard
        .range(&key("a"), &Range::ALL, Kinds::Both, 9)
        .unwrap()
        .iter()
        .map(|r| r.stamp_ms)
        .collect();
    assert_eq!(stamps, [1000, 1000]);
}

#[test]
fn an_empty_channel_still_knows_where_it_ended_and_is_forgotten_in_the_end() {
    let mut shard = fresh(1);
    apply(&mut shard, 1, 0, vec![publish("a", "x")]);
    apply(&mut shard, 2, 3 * MINUTE, vec![]);
    assert!(
        shard.after(&key("a"), at(0, 0), 9).is_err(),
        "its record is gone"
    );
    assert!(
        shard.after(&key("b"), at(0, 0), 9).is_ok(),
        "nothing was there to miss"
    );
    apply(&mut shard, 3, 3 * MINUTE + 86_400_000, vec![]);
    assert_eq!(shard.sizes(), (0, 0));
    assert!(
        shard.after(&key("a"), at(0, 0), 9).is_err(),
        "a serial that old proves nothing"
    );
    assert!(shard.after(&key("a"), at(1, 0), 9).is_ok());
    apply(
        &mut shard,
        4,
        3 * MINUTE + 86_400_001,
        vec![publish("a", "y")],
    );
    let found = shard.after(&key("a"), at(0, 0), 9);
    assert_eq!(found, behind(at(1, 0)), "coming back hides nothing");
    let found = shard.after(&key("a"), at(1, 0), 9).unwrap();
    assert_eq!(found[0].predecessor, Some(at(1, 0)));
}

#[test]
fn a_serial_of_another_incarnation_proves_nothing() {
    let shard = fresh(2);
    assert!(shard.after(&key("a"), at(9, 0), 1).is_err());
}

#[test]
fn kafka_replays_are_dropped_and_replaced_owners_refused() {
    let mut shard = fresh(1);
    let records = vec![from_kafka(1, 10), from_kafka(1, 12), from_kafka(1, 12)];
    let outcomes = apply(&mut shard, 1, 0, records);
    assert_eq!(outcomes[2], Outcome::Duplicate(None));
    let records = vec![from_kafka(2, 11), from_kafka(2, 13), from_kafka(1, 14)];
    let outcomes = apply(&mut shard, 2, 0, records);
    assert_eq!(
        outcomes,
        [
            Outcome::Duplicate(None),
            Outcome::Stored(at(2, 1)),
            Outcome::Fenced
        ]
    );
}

#[test]
fn a_refused_kafka_record_is_not_overtaken_by_its_successor() {
    let mut shard = fresh(1);
    let following = |offset, after| {
        let mut publish = from_kafka(1, offset);
        publish.source.as_mut().unwrap().after = Some(after);
        publish
    };
    apply(&mut shard, 1, 0, vec![from_kafka(1, 10)]);
    let outcomes = apply(&mut shard, 2, 0, vec![following(14, 12)]);
    assert_eq!(outcomes, [Outcome::Gap], "12 was refused at the door");
    let outcomes = apply(&mut shard, 3, 0, vec![following(12, 10), following(14, 12)]);
    assert_eq!(
        outcomes,
        [Outcome::Stored(at(3, 0)), Outcome::Stored(at(3, 1))]
    );
}

#[test]
fn a_range_is_inclusive_and_read_from_either_end() {
    let mut shard = fresh(1);
    for index in 1..=5 {
        apply(
            &mut shard,
            index,
            index * 10,
            vec![publish("a", &format!("{index}"))],
        );
    }
    let read = |range: Range, limit| {
        let refs = shard
            .range(&key("a"), &range, Kinds::Both, limit)
            .unwrap()
            .into_iter();
        refs.map(|r| r.serial.index).collect::<Vec<u64>>()
    };
    assert_eq!(read(Range::ALL, 2), [5, 4]);
    assert_eq!(
        read(
            Range {
                newest_first: false,
                ..Range::ALL
            },
            2
        ),
        [1, 2]
    );
    assert_eq!(
        read(
            Range {
                from: Some(at(2, 0)),
                to: Some(at(4, 0)),
                ..Range::ALL
            },
            9
        ),
        [4, 3, 2]
    );
    assert_eq!(
        read(
            Range {
                start_ms: 20,
                end_ms: 30,
                ..Range::ALL
            },
            9
        ),
        [3, 2]
    );
    assert!(
        read(
            Range {
                start_ms: 31,
                end_ms: 30,
                ..Range::ALL
            },
            9
        )
        .is_empty()
    );
}

#[test]
fn a_newer_entry_stops_the_replica_untouched() {
    let mut shard = fresh(1);
    let entry = entry::Entry {
        version: entry::VERSION_MAX + 1,
        ..Default::default()
    };
    let before = (shard.encode(), shard.digest());
    let err = shard.apply(1, entry.encode_to_vec().into()).unwrap_err();
    assert_eq!(
        err,
        Error::NewerVersion {
            index: 1,
            found: entry::VERSION_MAX + 1
        }
    );
    assert!(shard.apply(1, vec![0xff; 3].into()).is_err());
    assert_eq!((shard.encode(), shard.digest()), before);
}

impl Serial {
    fn with(self, incarnation: u16) -> Self {
        Self {
            incarnation,
            ..self
        }
    }
}
