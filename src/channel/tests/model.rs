//! The shard against a plain reference: lists instead of indexes, one tier, no log to come back from. Beside it a twin
//! whose records are all in memory, and restarts, outlines and rebuilds at any time.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use gathering::{Event, Gathering};
use steps::{Item, Post, Step, step};

mod gathering;
mod steps;

const MIN_MS: u64 = 2 * MINUTE;
const CHANNELS: u8 = 4;

type At = (u64, u16);

#[derive(Clone, Debug)]
struct Record {
    id: (u8, String),
    first: At,
    now: At,
    stamp_ms: u64,
    retention_ms: u64,
    bytes: u64,
    ephemeral: bool,
    presence: bool,
    count: u32,
}

#[derive(Clone, Debug, Default)]
struct Channel {
    records: Vec<Record>,
    head: Option<At>,
    floor: Option<At>,
    forget_ms: u64,
    retention_bytes: u64,
    last_only: bool,
    gathering: Gathering,
}

/// What a shard should be.
#[derive(Debug, Default)]
struct Reference {
    clock_ms: u64,
    applied: u64,
    horizon: u64,
    channels: BTreeMap<String, Channel>,
    forgotten: Option<At>,
    sources: BTreeMap<i32, (u64, i64)>,
    dropped: BTreeSet<At>,
}

/// An outcome, without incarnation.
#[derive(Debug, PartialEq)]
enum Expected {
    Stored,
    Duplicate(Option<At>),
    Fenced,
    Gap,
    Full,
    Unchanged,
    Invalid,
    Moved,
}

fn id_of(publish: &entry::Publish) -> (u8, String) {
    let numbered = publish
        .id
        .starts_with(&format!("{}:", publish.connection_id));
    let kind = match (publish.source.is_some(), numbered) {
        (true, _) => 2,
        (false, true) if !publish.connection_id.is_empty() => 1,
        _ => 0,
    };
    (kind, publish.id.clone())
}

impl Channel {
    fn expire(&mut self, clock_ms: u64) {
        loop {
            let aged = |r: &&Record| r.stamp_ms + MIN_MS <= clock_ms;
            let Some(front) = self.records.first() else {
                return;
            };
            let bytes: u64 = self.records.iter().filter(aged).map(|r| r.bytes).sum();
            let too_much = self.retention_bytes > 0 && bytes > self.retention_bytes;
            let replaced = self.last_only && self.records[1..].iter().any(|r| !r.presence);
            let by_rule = aged(&front) && (too_much || replaced);
            if !by_rule && front.stamp_ms + front.retention_ms.next_multiple_of(1000) > clock_ms {
                return;
            }
            self.floor = Some(front.first);
            self.records.remove(0);
        }
    }
}

impl Reference {
    fn apply(&mut self, index: u64, entry: &entry::Entry) -> Vec<Expected> {
        self.applied = index;
        self.clock_ms = self.clock_ms.max(entry.stamp_ms);
        let outcomes = (0..).zip(&entry.publishes).map(|(position, publish)| {
            let at = (index, position);
            match &publish.moved {
                Some(moved) => {
                    if !self.on_moved(at, publish, moved) {
                        self.dropped.insert(at);
                    }
                    Expected::Moved
                }
                None => {
                    let outcome = self.on_publish(at, publish);
                    if outcome != Expected::Stored {
                        self.dropped.insert(at);
                    }
                    outcome
                }
            }
        });
        let outcomes = outcomes.collect();
        let clock_ms = self.clock_ms;
        for channel in self.channels.values_mut() {
            channel.expire(clock_ms);
        }
        let forgotten = &mut self.forgotten;
        self.channels.retain(|_, channel| {
            let present = !channel.gathering.is_empty();
            let keep = !channel.records.is_empty() || present || channel.forget_ms > clock_ms;
            if !keep {
                *forgotten = (*forgotten).max(channel.head);
            }
            keep
        });
        let horizon = entry.horizon.min(self.live_floor()).min(index - 1);
        self.horizon = self.horizon.max(horizon);
        let horizon = self.horizon;
        self.dropped.retain(|(index, _)| *index > horizon);
        outcomes
    }

    fn on_publish(&mut self, at: At, publish: &entry::Publish) -> Expected {
        if let Some(source) = &publish.source {
            let fresh = (source.epoch, i64::MIN);
            let (epoch, offset) = self.sources.entry(source.partition).or_insert(fresh);
            if source.epoch < *epoch {
                return Expected::Fenced;
            }
            *epoch = source.epoch;
            if source.offset <= *offset {
                return Expected::Duplicate(None);
            }
            if source.after.is_some_and(|after| *offset < after) {
                return Expected::Gap;
            }
            *offset = source.offset;
        }
        let floor = self.forgotten;
        let id = id_of(publish);
        let known = self.channels.get(&publish.channel);
        let mut gathering = known.map(|channel| channel.gathering.clone());
        let mut gathering = gathering.take().unwrap_or_default();
        let repeated = known.and_then(|channel| channel.records.iter().find(|r| r.id == id));
        match &publish.presence {
            Some(asked) if asked.changes.is_empty() => {
                gathering.attend(publish, asked);
                let channel = self.channels.get_mut(&publish.channel);
                channel
                    .into_iter()
                    .for_each(|it| it.gathering = gathering.clone());
                return Expected::Unchanged;
            }
            Some(asked) if repeated.is_none() => {
                if let Err(refused) = gathering.change(at, self.clock_ms, publish, asked) {
                    return refused;
                }
            }
            _ => {}
        }
        let channel = self.channels.entry(publish.channel.clone());
        let channel = channel.or_insert(Channel {
            floor,
            ..Channel::default()
        });
        if let Some(first) = channel.records.iter().find(|record| record.id == id) {
            return Expected::Duplicate(Some(first.first));
        }
        let retention_ms = match publish.ephemeral {
            true => MIN_MS,
            false => publish.retention_ms.max(MIN_MS),
        };
        channel.head = Some(at);
        channel.forget_ms = self.clock_ms + retention_ms.next_multiple_of(1000) + 24 * 60 * MINUTE;
        channel.retention_bytes = publish.retention_bytes;
        channel.last_only = publish.last_only;
        channel.gathering = gathering;
        channel.records.push(Record {
            id,
            first: at,
            now: at,
            stamp_ms: self.clock_ms,
            retention_ms,
            bytes: publish.body.len() as u64,
            ephemeral: publish.ephemeral,
            presence: publish.presence.is_some(),
            count: publish.count,
        });
        Expected::Stored
    }

    fn on_moved(&mut self, at: At, publish: &entry::Publish, moved: &entry::Moved) -> bool {
        let records = self.channels.get_mut(&publish.channel);
        let first = (moved.index, u16::try_from(moved.position).unwrap());
        let mut records = records.into_iter().flat_map(|channel| &mut channel.records);
        let record = records.find(|record| {
            record.first == first
                && record.stamp_ms == moved.stamp_ms
                && record.id == id_of(publish)
        });
        record.map(|record| record.now = at).is_some()
    }

    fn records(&self) -> impl Iterator<Item = &Record> {
        self.channels.values().flat_map(|channel| &channel.records)
    }

    fn live_floor(&self) -> u64 {
        let first = self.records().map(|record| record.now.0).min();
        first.map_or(self.applied, |first| first - 1)
    }
}

struct World {
    shard: Shard,
    archive: Arc<MemoryArchive>,
    options: Options,
    twin: Shard,
    reference: Reference,
    /// `None`: an entry without publishes.
    log: BTreeMap<u64, Option<entry::Entry>>,
    /// The last durable checkpoint.
    saved: bytes::Bytes,
    proposer_ms: u64,
}

impl World {
    fn new(records_max: usize) -> Self {
        let archive = Arc::new(MemoryArchive::default());
        let options = Options { records_max };
        let shard = Shard::new(1, options, archive.clone());
        Self {
            saved: shard.encode(),
            shard,
            archive,
            options,
            twin: fresh(1),
            reference: Reference::default(),
            log: BTreeMap::new(),
            proposer_ms: 1_000_000,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Entry {
                clock_ms,
                back_ms,
                items,
                horizon,
                check,
            } => {
                self.proposer_ms += clock_ms;
                let publishes = items.into_iter().filter_map(|item| self.publish(item));
                let entry = entry::Entry {
                    version: entry::VERSION_MAX,
                    stamp_ms: self.proposer_ms - back_ms,
                    publishes: publishes.collect(),
                    horizon: match horizon {
                        0 => 0,
                        1 => self.shard.live_floor(),
                        2 => u64::MAX,
                        _ => self.shard.applied() / 2,
                    },
                    check,
                };
                self.apply(entry);
            }
            Step::Skip => {
                let index = self.shard.applied() + 1;
                self.log.insert(index, None);
                self.shard.skip(index);
                self.twin.skip(index);
                self.reference.applied = index;
            }
            Step::Checkpoint => self.checkpoint(),
            Step::Restart => {
                self.shard = self.decode(self.saved.clone());
                self.catch_up();
            }
            Step::Rebuild(max, after, how) => self.rebuild(max, after, how),
        }
    }

    fn apply(&mut self, entry: entry::Entry) {
        let index = self.shard.applied() + 1;
        let payload: bytes::Bytes = entry.encode_to_vec().into();
        let applied = self.shard.apply(index, payload.clone()).unwrap();
        let twin = self.twin.apply(index, payload).unwrap();
        let expected = self.reference.apply(index, &entry);
        let outcomes = (0..)
            .zip(expected)
            .map(|(position, expected)| match expected {
                Expected::Stored => Outcome::Stored(at(index, position)),
                Expected::Duplicate(first) => Outcome::Duplicate(first.map(|(i, p)| at(i, p))),
                Expected::Fenced => Outcome::Fenced,
                Expected::Gap => Outcome::Gap,
                Expected::Full => Outcome::Full,
                Expected::Unchanged => Outcome::Unchanged,
                Expected::Invalid => Outcome::Invalid,
                Expected::Moved => Outcome::Moved,
            });
        assert_eq!(applied.outcomes, outcomes.collect::<Vec<_>>());
        assert_eq!(applied.outcomes, twin.outcomes);
        let events = |applied: &Applied| {
            applied
                .events
                .iter()
                .map(|event| event.record)
                .collect::<Vec<_>>()
        };
        assert_eq!(events(&applied), events(&twin));
        if entry.check {
            assert_eq!(
                self.shard.checks().last(),
                Some(&(index, self.shard.digest()))
            );
        }
        self.log.insert(index, Some(entry));
    }

    fn publish(&self, item: Item) -> Option<entry::Publish> {
        match item {
            Item::Post(post) => Some(post.publish()),
            Item::Move(n, how) => {
                let records: Vec<&Record> = self.reference.records().collect();
                let record = records.get(n % records.len().max(1))?;
                let (index, position) = record.now;
                let entry = self.log[&index].as_ref().unwrap();
                let mut publish = entry.publishes[usize::from(position)].clone();
                let moved = self.shard.movable(index, position, &publish);
                let mut moved = moved.expect("a retained record can be moved");
                assert_eq!(
                    (moved.index, moved.position),
                    (record.first.0, u32::from(record.first.1))
                );
                match how {
                    // A record that is none, or another one.
                    0 => moved.index += 1,
                    1 => moved.stamp_ms += 1,
                    2 => publish.id.push('x'),
                    3 => moved.position += 1,
                    _ => {}
                }
                publish.moved = Some(moved);
                Some(publish)
            }
        }
    }

    fn checkpoint(&mut self) {
        self.saved = self.shard.encode();
        self.archive.seal().unwrap();
        self.shard.checkpointed(self.shard.applied()).unwrap();
        self.archive.settle().unwrap();
        let copy = self.decode(self.saved.clone());
        assert_eq!(copy.digest(), self.shard.digest());
        copy.check_invariants();
    }

    fn decode(&self, bytes: bytes::Bytes) -> Shard {
        let archive: Arc<MemoryArchive> = self.archive.clone();
        let shard = Shard::decode(bytes.clone(), self.options, archive).unwrap();
        assert_eq!(shard.encode(), bytes);
        shard
    }

    fn rebuild(&mut self, max: u8, after: usize, how: u8) {
        self.options.records_max = max.into();
        self.archive = Arc::new(MemoryArchive::default());
        self.shard = self.outlined(&self.shard.outline());
        let mut steps = self.shard.decided() - self.shard.applied();
        steps = steps.min(after as u64);
        let through = self.shard.applied() + steps;
        self.catch_up_to(through);
        match how {
            0 => {
                let bytes = self.shard.encode();
                let copy = self.decode(bytes);
                // The archive learns of what comes after the checkpoint, and the node stops.
                self.catch_up();
                self.shard = copy;
                self.shard.check_invariants();
            }
            1 => self.shard = self.outlined(&self.shard.outline()),
            _ => {}
        }
        self.catch_up();
        self.checkpoint();
    }

    fn outlined(&self, outline: &bytes::Bytes) -> Shard {
        let archive = self.archive.clone();
        let shard = Shard::decode_outline(outline.clone(), self.options, archive).unwrap();
        assert_eq!(shard.outline(), outline);
        shard.check_invariants();
        shard
    }

    fn catch_up(&mut self) {
        self.catch_up_to(self.reference.applied);
    }

    fn catch_up_to(&mut self, through: u64) {
        if through <= self.shard.applied() {
            return;
        }
        let entries = self.log.range(self.shard.applied() + 1..=through);
        for (index, entry) in entries {
            assert!(
                *index > self.shard.horizon(),
                "the log up to the horizon is not needed"
            );
            let Some(entry) = entry else {
                self.shard.skip(*index);
                continue;
            };
            let rebuilding = self.shard.is_rebuilding();
            if rebuilding {
                let refused = self.shard.after(&key("c0"), at(0, 0), 1);
                assert_eq!(refused, Err(ReadError::Rebuilding));
            }
            let applied = self
                .shard
                .apply(*index, entry.encode_to_vec().into())
                .unwrap();
            self.shard.check_invariants();
            for event in applied.events {
                assert!(event.publish.moved.is_none());
                assert_eq!(event.record.serial.index, *index);
            }
        }
    }

    fn agree(&self, cursors: &[At], limit: usize) {
        let (shard, reference) = (&self.shard, &self.reference);
        shard.check_invariants();
        self.twin.check_invariants();
        assert_eq!(shard.digest(), self.twin.digest());
        assert_eq!(canonical(shard), canonical(&self.twin));
        assert_eq!(shard.outline(), self.twin.outline());
        assert_eq!(shard.applied(), reference.applied);
        assert_eq!(shard.live_floor(), reference.live_floor());
        assert_eq!(shard.horizon(), reference.horizon);
        let bytes: u64 = reference.records().map(|record| record.bytes).sum();
        assert_eq!(shard.live_bytes(), bytes);
        for index in reference.horizon + 1..=reference.applied {
            for position in 0..6 {
                let dropped = reference.dropped.contains(&(index, position));
                assert_eq!(shard.is_dropped(index, position), dropped);
            }
        }
        for n in 0..CHANNELS {
            let name = format!("c{n}");
            let channel = reference.channels.get(&name).cloned();
            let known = channel.is_some();
            let channel = channel.unwrap_or_else(|| Channel {
                floor: reference.forgotten,
                ..Channel::default()
            });
            assert_eq!(shard.head(&key(&name)), channel.head.map(|(i, p)| at(i, p)));
            for cursor in cursors
                .iter()
                .copied()
                .chain(channel.floor)
                .chain(channel.head)
            {
                self.agree_after(&name, &channel, cursor, limit);
            }
            for (from, to) in cursors.iter().zip(cursors.iter().skip(1)) {
                self.agree_range(&name, &channel, *from, *to, limit);
            }
            assert_eq!(shard.channels.contains_key(&key(&name)), known);
            assert_eq!(shard.members(&key(&name)), channel.gathering.members());
            for (cursor, count) in cursors.iter().zip(0..) {
                self.agree_rewind(&name, &channel, count, cursor.0 * 3000);
            }
        }
        self.agree_attended();
    }

    fn agree_attended(&self) {
        let mut found = Vec::new();
        for by in self.shard.attendants() {
            let attended = self.shard.attended(by, 99);
            assert!(!attended.is_empty(), "who attends nobody is forgotten");
            found.extend(attended.into_iter().map(|it| (by, it)));
        }
        let channels = self.reference.channels.iter();
        let expected = channels.flat_map(|(name, channel)| {
            let attended = channel.gathering.attended();
            attended.map(|(by, connection_id, members)| {
                let key = key(name);
                (
                    by,
                    Attended {
                        key,
                        connection_id,
                        members,
                    },
                )
            })
        });
        let mut expected: Vec<_> = expected.collect();
        expected.sort_by_key(|(by, it)| (*by, it.key.clone(), it.connection_id.clone()));
        assert_eq!(found, expected);
    }

    /// Milliseconds before the clock.
    fn agree_rewind(&self, name: &str, channel: &Channel, count: usize, within_ms: u64) {
        let since_ms = self.reference.clock_ms.saturating_sub(within_ms);
        let messages = channel
            .records
            .iter()
            .filter(|record| !record.ephemeral && !record.presence && record.stamp_ms >= since_ms);
        let oldest = messages.rev().take(count).last();
        let expected = oldest.map(|record| match record.first {
            (index, 0) => at(index - 1, u16::MAX),
            (index, position) => at(index, position - 1),
        });
        let found = self.shard.rewind(&key(name), count, since_ms);
        assert_eq!(found.unwrap(), expected);
    }

    fn agree_after(&self, name: &str, channel: &Channel, cursor: At, limit: usize) {
        let found = self.shard.after(&key(name), at(cursor.0, cursor.1), limit);
        if let Some((i, p)) = channel.floor.filter(|floor| cursor < *floor) {
            assert_eq!(found, behind(at(i, p)));
            return;
        }
        let expected = refs(channel).into_iter();
        let expected = expected.filter(|r| r.serial > at(cursor.0, cursor.1));
        assert_eq!(found.unwrap(), expected.take(limit).collect::<Vec<_>>());
    }

    fn agree_range(&self, name: &str, channel: &Channel, from: At, to: At, limit: usize) {
        let stamps: Vec<u64> = channel
            .records
            .iter()
            .map(|record| record.stamp_ms)
            .collect();
        let stamp = |n: u64| {
            stamps
                .get(usize::try_from(n).unwrap() % stamps.len().max(1))
                .copied()
                .unwrap_or(n)
        };
        for newest_first in [false, true] {
            for (start_ms, end_ms) in [
                (0, u64::MAX),
                (stamp(from.0), stamp(to.0)),
                (0, stamp(to.0).saturating_sub(1)),
            ] {
                let range = Range {
                    from: (from.1.is_multiple_of(2)).then(|| at(from.0, from.1)),
                    to: (to.1.is_multiple_of(2)).then(|| at(to.0, to.1)),
                    start_ms,
                    end_ms,
                    newest_first,
                };
                for kinds in [Kinds::Messages, Kinds::Presence, Kinds::Both] {
                    let mut expected: Vec<RecordRef> = refs(channel)
                        .into_iter()
                        .zip(&channel.records)
                        .filter(|(r, record)| {
                            !record.ephemeral
                                && kinds.include(record.presence)
                                && range.from.is_none_or(|from| r.serial >= from)
                                && range.to.is_none_or(|to| r.serial <= to)
                                && (start_ms..=end_ms).contains(&r.stamp_ms)
                        })
                        .map(|(r, _)| r)
                        .collect();
                    if newest_first {
                        expected.reverse();
                    }
                    expected.truncate(limit);
                    let found = self.shard.range(&key(name), &range, kinds, limit).unwrap();
                    assert_eq!(found, expected, "{range:?} {kinds:?}");
                }
            }
        }
    }
}

fn refs(channel: &Channel) -> Vec<RecordRef> {
    let mut before = channel.floor;
    let refs = channel.records.iter().map(|record| RecordRef {
        serial: at(record.first.0, record.first.1),
        place: Place {
            index: record.now.0,
            position: record.now.1,
        },
        predecessor: before.replace(record.first).map(|(i, p)| at(i, p)),
        stamp_ms: record.stamp_ms,
        count: record.count,
        presence: record.presence,
    });
    refs.collect()
}

/// The state as bytes, all records in memory.
pub(super) fn canonical(shard: &Shard) -> Vec<u8> {
    let mut wire = crate::wire::checkpoint::Shard::decode(shard.encode()).unwrap();
    for (channel, index) in wire.channels.iter_mut().zip(shard.channels.values()) {
        let all = index.page(&*shard.archive, Place::MIN, Place::MAX, false, usize::MAX);
        channel.records = all.unwrap().iter().map(checkpoint::record_out).collect();
        channel.archived = None;
    }
    wire.archive = None;
    wire.encode_to_vec()
}

impl Post {
    fn publish(self) -> entry::Publish {
        let source = (self.kind == 2 && self.presence.is_none()).then(|| entry::Source {
            bridge: "b".into(),
            topic: "t".into(),
            partition: i32::from(self.channel % 2),
            offset: self.offset,
            epoch: self.epoch,
            after: self.after,
        });
        let connection_id = if self.kind == 1 { "conn" } else { "" };
        let (retention_ms, retention_bytes, last_only, ephemeral) = match self.class {
            0 => (0, 0, false, true),
            1 => (0, 40, false, false),
            2 => (24 * 60 * MINUTE, 90, false, false),
            3 => (24 * 60 * MINUTE, 0, true, false),
            4 => (300_500, 0, false, false),
            5 => (24 * 60 * MINUTE, 60, true, true),
            6 => (24 * 60 * MINUTE, 0, false, false),
            _ => (0, 0, false, false),
        };
        let message = entry::Publish {
            connection_id: connection_id.into(),
            source,
            body: vec![0; self.bytes].into(),
            retention_ms,
            retention_bytes,
            last_only,
            ephemeral,
            ..publish(&format!("c{}", self.channel), &format!("conn:{}", self.id))
        };
        let Some(asked) = self.presence else {
            return message;
        };
        let connection_id = ["conn", "x", "y"][usize::from(self.kind)];
        let numbered = if self.bytes < 45 {
            connection_id
        } else {
            "own"
        };
        let body = entry::Body {
            version: entry::VERSION,
            messages: asked.events.iter().map(Event::message).collect(),
        };
        entry::Publish {
            id: format!("{numbered}:{}", self.id),
            connection_id: connection_id.into(),
            count: u32::try_from(asked.events.len()).unwrap(),
            body: body.encode_to_vec().into(),
            presence: Some(entry::Presence {
                changes: asked.events.iter().map(Event::change).collect(),
                node: asked.node,
                boot: 7,
                if_attended: asked.if_attended,
                members_max: asked.members_max,
            }),
            ..message
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(300)
    ))]
    #[test]
    fn behaves_like_the_reference(
        records_max in 0..9_usize,
        steps in prop::collection::vec((step(), prop::collection::vec((0..40_u64, 0..5_u16), 3), 1..9_usize), 1..40),
    ) {
        let mut world = World::new(records_max);
        for (step, cursors, limit) in steps {
            world.step(step);
            world.agree(&cursors, limit);
        }
    }
}
