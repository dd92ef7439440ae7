//! The retention classes one by one.

use super::*;

const DAY_MS: u64 = 24 * 60 * MINUTE;

fn indexes(shard: &Shard, name: &str) -> Vec<u64> {
    let oldest_first = Range {
        newest_first: false,
        ..Range::ALL
    };
    let refs = shard
        .range(&key(name), &oldest_first, Kinds::Both, 99)
        .unwrap();
    refs.iter().map(|r| r.serial.index).collect()
}

#[test]
fn bytes_are_limited_only_beyond_the_shortest_time() {
    let mut shard = fresh(1);
    for index in 1..=4 {
        let publish = entry::Publish {
            body: vec![0; 10].into(),
            retention_ms: DAY_MS,
            retention_bytes: 25,
            ..publish("a", &index.to_string())
        };
        apply(&mut shard, index, index * 1000, vec![publish]);
    }
    let third_ages_ms = 3000 + 2 * MINUTE;
    apply(&mut shard, 5, third_ages_ms - 1, vec![]);
    assert_eq!(indexes(&shard, "a"), [1, 2, 3, 4]);
    assert!(shard.has_due(third_ages_ms) && !shard.has_due(third_ages_ms - 1));
    apply(&mut shard, 6, third_ages_ms, vec![]);
    assert_eq!(indexes(&shard, "a"), [2, 3, 4], "30 bytes would be past it");
    apply(&mut shard, 7, 4000 + 2 * MINUTE, vec![]);
    assert_eq!(indexes(&shard, "a"), [3, 4]);
    assert_eq!(shard.live_bytes(), 20);
}

#[test]
fn only_the_last_message_outlives_the_shortest_time() {
    let mut shard = fresh(1);
    for index in 1..=3 {
        let publish = entry::Publish {
            retention_ms: DAY_MS,
            last_only: true,
            ..publish("a", &index.to_string())
        };
        apply(&mut shard, index, index * 1000, vec![publish]);
    }
    assert!(!shard.has_due(1000 + 2 * MINUTE - 1));
    apply(&mut shard, 4, 1000 + 2 * MINUTE, vec![]);
    assert_eq!(indexes(&shard, "a"), [2, 3]);
    assert!(shard.has_due(2000 + 2 * MINUTE) && !shard.has_due(2000 + 2 * MINUTE - 1));
    apply(&mut shard, 5, DAY_MS + 2999, vec![]);
    assert_eq!(indexes(&shard, "a"), [3]);
    apply(&mut shard, 6, DAY_MS + 3000, vec![]);
    assert!(indexes(&shard, "a").is_empty());
}

#[test]
fn an_ephemeral_record_is_resumed_over_but_no_history() {
    let mut shard = fresh(1);
    let ephemeral = entry::Publish {
        ephemeral: true,
        retention_ms: DAY_MS,
        ..publish("a", "2")
    };
    apply(&mut shard, 1, 0, vec![publish("a", "1")]);
    apply(&mut shard, 2, 0, vec![ephemeral]);
    apply(&mut shard, 3, 0, vec![publish("a", "3")]);
    assert_eq!(indexes(&shard, "a"), [1, 3]);
    let resumed = shard.after(&key("a"), at(1, 0), 9).unwrap();
    assert_eq!(resumed.len(), 2);
    let newest = shard.range(&key("a"), &Range::ALL, Kinds::Both, 1).unwrap();
    assert_eq!(newest[0].predecessor, Some(at(2, 0)), "the link shows it");
    apply(&mut shard, 4, 2 * MINUTE, vec![]);
    assert_eq!(shard.sizes(), (1, 0), "it asked for a day in vain");
}

#[test]
fn a_rule_that_gets_stricter_counts_at_once() {
    let mut shard = fresh(1);
    for index in 1..=3 {
        let publish = entry::Publish {
            body: vec![0; 10].into(),
            retention_ms: DAY_MS,
            ..publish("a", &index.to_string())
        };
        apply(&mut shard, index, 0, vec![publish]);
    }
    let strict = entry::Publish {
        retention_bytes: 10,
        ..publish("a", "4")
    };
    apply(&mut shard, 4, 2 * MINUTE, vec![strict]);
    assert_eq!(indexes(&shard, "a"), [3, 4]);
}
