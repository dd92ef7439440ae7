//! Who is present, one promise at a time.

use super::*;

const DAY_MS: u64 = 24 * 60 * MINUTE;
const ENTER: u32 = 2;
const LEAVE: u32 = 3;

fn by(node: u64) -> Attendant {
    Attendant {
        node,
        boot: 70 + node,
    }
}

/// Events of connection `id` begins with, or of `c` where they are not the connection's own.
fn events(id: &str, node: u64, events: &[(u32, &str)]) -> entry::Publish {
    let numbered = id.split_once(':').filter(|(before, _)| *before != "left");
    let change = |(action, client_id): &(u32, &str)| entry::Change {
        action: *action,
        client_id: (*client_id).into(),
        connection_id: numbered.map_or_else(|| "c".into(), |_| String::new()),
    };
    let message = |(action, client_id): &(u32, &str)| entry::Message {
        presence_action: *action,
        client_id: Some((*client_id).into()),
        ..Default::default()
    };
    let body = entry::Body {
        version: entry::VERSION,
        messages: events.iter().map(message).collect(),
    };
    let Attendant { node, boot } = by(node);
    entry::Publish {
        connection_id: numbered.map_or_else(String::new, |(before, _)| before.into()),
        count: u32::try_from(events.len()).unwrap(),
        body: body.encode_to_vec().into(),
        presence: Some(entry::Presence {
            changes: events.iter().map(change).collect(),
            node,
            boot,
            ..Default::default()
        }),
        ..publish("a", id)
    }
}

fn with(mut publish: entry::Publish, change: impl FnOnce(&mut entry::Presence)) -> entry::Publish {
    change(publish.presence.as_mut().unwrap());
    publish
}

/// What `node` proposes for members of `c` that do not come back.
fn left(id: &str, node: u64, clients: &[&str]) -> entry::Publish {
    let leaves: Vec<_> = clients.iter().map(|client| (LEAVE, *client)).collect();
    with(events(id, node, &leaves), |it| it.if_attended = true)
}

fn attend(connection_id: &str, node: u64) -> entry::Publish {
    let publish = events("", node, &[]);
    let connection_id = connection_id.into();
    entry::Publish {
        connection_id,
        ..publish
    }
}

fn present(shard: &Shard) -> Vec<String> {
    let members = shard.members(&key("a")).into_iter();
    members
        .map(|member| format!("{}@{}", member.client_id, member.connection_id))
        .collect()
}

fn one(shard: &mut Shard, index: u64, publish: entry::Publish) -> Outcome {
    let outcomes = apply(shard, index, index, vec![publish]);
    outcomes[0]
}

#[test]
fn members_come_and_go_with_records_and_are_listed_by_client() {
    let mut shard = fresh(1);
    let both = events("c:0", 1, &[(ENTER, "zoe"), (ENTER, "ann")]);
    assert_eq!(one(&mut shard, 1, both.clone()), Outcome::Stored(at(1, 0)));
    one(&mut shard, 2, events("b:0", 1, &[(ENTER, "ann")]));
    assert_eq!(present(&shard), ["ann@b", "ann@c", "zoe@c"]);
    let ann = &shard.members(&key("a"))[1];
    assert_eq!((ann.id.as_str(), ann.offset), ("c:0", 1));
    assert_eq!((ann.serial, ann.stamp_ms), (at(1, 0), 1));
    let event = entry::Message::decode(ann.event.clone()).unwrap();
    assert_eq!(event.client_id.as_deref(), Some("ann"));
    let again = one(&mut shard, 3, both);
    assert_eq!(again, Outcome::Duplicate(Some(at(1, 0))));
    one(&mut shard, 4, events("c:1", 1, &[(LEAVE, "ann")]));
    assert_eq!(present(&shard), ["ann@b", "zoe@c"]);
    let nobody = one(&mut shard, 5, events("c:2", 1, &[(LEAVE, "ann")]));
    assert_eq!(nobody, Outcome::Unchanged);
    let serials = |kinds| {
        let refs = shard.range(&key("a"), &Range::ALL, kinds, 9).unwrap();
        refs.iter().map(|r| r.serial.index).collect::<Vec<_>>()
    };
    assert_eq!(serials(Kinds::Presence), [4, 2, 1]);
    assert!(serials(Kinds::Messages).is_empty());
}

#[test]
fn a_publish_that_would_bring_in_too_many_brings_in_nobody() {
    let mut shard = fresh(1);
    let limited =
        |id: &str, names: &[(u32, &str)]| with(events(id, 1, names), |it| it.members_max = 2);
    one(&mut shard, 1, limited("c:0", &[(ENTER, "ann")]));
    let two_more = limited("d:0", &[(ENTER, "bob"), (ENTER, "cid")]);
    assert_eq!(one(&mut shard, 2, two_more), Outcome::Full);
    assert_eq!(present(&shard), ["ann@c"]);
    assert!(shard.is_dropped(2, 0));
    let known = limited("d:1", &[(ENTER, "bob"), (4, "bob")]);
    assert_eq!(one(&mut shard, 3, known), Outcome::Stored(at(3, 0)));
    assert_eq!(
        one(&mut shard, 4, limited("e:0", &[(ENTER, "e")])),
        Outcome::Full
    );
    assert_eq!(
        shard.attended(by(1), 9).len(),
        2,
        "who was refused is attended by nobody"
    );
    let update = limited("c:1", &[(4, "ann")]);
    assert_eq!(one(&mut shard, 5, update), Outcome::Stored(at(5, 0)));
}

#[test]
fn who_is_let_go_leaves_once_and_only_while_nobody_else_attends_it() {
    let mut shard = fresh(1);
    one(
        &mut shard,
        1,
        events("c:0", 1, &[(ENTER, "ann"), (ENTER, "bob")]),
    );
    assert_eq!(one(&mut shard, 2, attend("c", 2)), Outcome::Unchanged);
    assert_eq!(shard.attendants().collect::<Vec<_>>(), [by(2)]);
    let late = one(&mut shard, 3, left("left:0", 1, &["ann", "bob"]));
    assert_eq!(late, Outcome::Unchanged, "node 2 attends it now");
    assert_eq!(present(&shard).len(), 2);
    let mut other = with(left("left:1", 2, &["ann"]), |it| it.boot += 1);
    assert_eq!(
        one(&mut shard, 4, other.clone()),
        Outcome::Unchanged,
        "another boot"
    );
    other = left("left:2", 2, &["ann"]);
    assert_eq!(one(&mut shard, 5, other), Outcome::Stored(at(5, 0)));
    let rest = one(&mut shard, 6, left("left:3", 2, &["ann", "bob"]));
    assert_eq!(rest, Outcome::Stored(at(6, 0)));
    assert_eq!(shard.attendants().count(), 0);
    let again = one(&mut shard, 7, left("left:4", 2, &["ann", "bob"]));
    assert_eq!(again, Outcome::Unchanged, "a second one finds nobody");
}

#[test]
fn nobody_attends_a_connection_without_members() {
    let mut shard = fresh(1);
    one(&mut shard, 1, attend("c", 1));
    assert_eq!((shard.sizes(), shard.attendants().count()), ((0, 0), 0));
    one(&mut shard, 2, events("c:0", 1, &[(ENTER, "ann")]));
    one(&mut shard, 3, attend("d", 2));
    let if_attended = with(attend("c", 2), |it| it.if_attended = true);
    one(&mut shard, 4, if_attended);
    assert_eq!(shard.attendants().collect::<Vec<_>>(), [by(1)]);
    one(&mut shard, 5, events("c:1", 2, &[(4, "ann")]));
    assert_eq!(
        shard.attendants().collect::<Vec<_>>(),
        [by(2)],
        "who is heard from"
    );
    one(&mut shard, 6, events("c:2", 2, &[(ENTER, "bob")]));
    // Late, from where the connection was before.
    one(&mut shard, 7, events("c:3", 1, &[(LEAVE, "ann")]));
    let attends = shard.attendants().collect::<Vec<_>>();
    assert_eq!(attends, [by(2)], "who leaves is nowhere");
}

/// A lane sends what has no answer again, in order: what changed nothing the first time must not change what its
/// successors did.
#[test]
fn a_repeated_event_does_not_undo_its_successors() {
    let mut shard = fresh(1);
    let leave = events("c:5", 1, &[(LEAVE, "ann")]);
    let enter = events("c:6", 1, &[(ENTER, "ann")]);
    assert_eq!(one(&mut shard, 1, leave.clone()), Outcome::Unchanged);
    assert_eq!(one(&mut shard, 2, enter.clone()), Outcome::Stored(at(2, 0)));
    assert_eq!(one(&mut shard, 3, leave), Outcome::Unchanged);
    assert_eq!(
        one(&mut shard, 4, enter),
        Outcome::Duplicate(Some(at(2, 0)))
    );
    assert_eq!(present(&shard), ["ann@c"]);
    let next = events("c:7", 1, &[(LEAVE, "ann")]);
    assert_eq!(one(&mut shard, 5, next), Outcome::Stored(at(5, 0)));
}

#[test]
fn what_no_proposer_sends_changes_nothing() {
    let good = events("c:0", 1, &[(ENTER, "ann")]);
    let bad = [
        events("c:0", 1, &[(1, "ann")]),
        events("c:0", 1, &[(ENTER, "")]),
        with(good.clone(), |it| it.if_attended = true),
        with(good.clone(), |it| it.changes.clear()),
        with(good.clone(), |it| it.changes.push(it.changes[0].clone())),
        entry::Publish {
            count: 2,
            ..good.clone()
        },
        entry::Publish {
            body: vec![0xff].into(),
            ..good.clone()
        },
        entry::Publish {
            connection_id: String::new(),
            ..good.clone()
        },
        entry::Publish {
            source: from_kafka(1, 5).source,
            ..good
        },
    ];
    for (index, publish) in (1..).zip(bad) {
        let mut shard = fresh(1);
        let before = shard.digest();
        let outcomes = apply(&mut shard, index, 0, vec![publish]);
        // No events at all: nothing but a wish to attend.
        let expected = if index == 4 {
            Outcome::Unchanged
        } else {
            Outcome::Invalid
        };
        assert_eq!(outcomes, [expected], "{index}");
        assert_eq!((shard.sizes(), shard.attendants().count()), ((0, 0), 0));
        assert_ne!(before, shard.digest(), "it is dropped");
    }
}

#[test]
fn a_member_outlives_its_record_and_keeps_the_channel() {
    let mut shard = fresh(1);
    one(&mut shard, 1, events("c:0", 1, &[(ENTER, "ann")]));
    apply(&mut shard, 2, 40 * DAY_MS, vec![]);
    assert_eq!((shard.sizes(), shard.live_floor()), ((1, 0), 2));
    assert!(!shard.has_due(u64::MAX - 1), "time alone changes nothing");
    assert_eq!(present(&shard), ["ann@c"]);
    let lone = |bytes| {
        let archive = Arc::new(MemoryArchive::default());
        Shard::decode_outline(bytes, Options::default(), archive).unwrap()
    };
    let copy = lone(shard.outline());
    assert_eq!(
        (present(&copy), copy.digest()),
        (present(&shard), shard.digest())
    );
    assert_eq!(copy.attended(by(1), 9), shard.attended(by(1), 9));
    let leave = events("c:1", 1, &[(LEAVE, "ann")]);
    let entry = [(3, 40 * DAY_MS, vec![leave]), (4, 42 * DAY_MS, vec![])];
    for (index, stamp_ms, publishes) in entry {
        apply(&mut shard, index, stamp_ms, publishes);
    }
    assert_eq!(shard.sizes(), (0, 0), "the last one switches off the light");
}

#[test]
fn presence_never_takes_the_last_messages_place() {
    let mut shard = fresh(1);
    let last_only = |publish| entry::Publish {
        last_only: true,
        retention_ms: DAY_MS,
        ..publish
    };
    one(&mut shard, 1, last_only(publish("a", "old")));
    one(
        &mut shard,
        2,
        last_only(events("c:0", 1, &[(ENTER, "ann")])),
    );
    one(&mut shard, 3, last_only(publish("a", "new")));
    one(&mut shard, 4, last_only(events("c:1", 1, &[(4, "ann")])));
    assert!(shard.has_due(1 + 2 * MINUTE));
    apply(&mut shard, 5, 10 * MINUTE, vec![]);
    let refs = shard.range(&key("a"), &Range::ALL, Kinds::Both, 9).unwrap();
    let left: Vec<_> = refs.iter().map(|r| (r.serial.index, r.presence)).collect();
    assert_eq!(left, [(4, true), (3, false)]);
    assert!(!shard.has_due(3 + DAY_MS - 1) && shard.has_due(3 + DAY_MS));
}

#[test]
fn a_rewind_counts_messages_only() {
    let mut shard = fresh(1);
    for index in 1..=3 {
        let ephemeral = entry::Publish {
            ephemeral: true,
            ..publish("a", &format!("gone{index}"))
        };
        let enter = events(&format!("c:{index}"), 1, &[(ENTER, "ann")]);
        let publishes = vec![publish("a", &format!("{index}")), enter, ephemeral];
        apply(&mut shard, index, index * 1000, publishes);
    }
    let rewind = |count, since_ms| shard.rewind(&key("a"), count, since_ms).unwrap();
    assert_eq!(rewind(1, 0), Some(at(2, u16::MAX)));
    assert_eq!(rewind(2, 0), Some(at(1, u16::MAX)));
    assert_eq!(rewind(9, 0), Some(at(0, u16::MAX)));
    assert_eq!(rewind(9, 2000), Some(at(1, u16::MAX)));
    assert_eq!((rewind(0, 0), rewind(9, 3001)), (None, None));
    assert_eq!(shard.rewind(&key("b"), 1, 0), Ok(None));
    let behind = shard.after(&key("a"), rewind(9, 0).unwrap(), 99).unwrap();
    assert_eq!(behind.len(), 9, "a reader from there has no gap");
}

/// As for a checkpoint without members: another layout is another version.
#[test]
fn the_bytes_of_members_are_frozen() {
    let mut shard = fresh(3);
    one(&mut shard, 1, publish("a", "x"));
    one(&mut shard, 2, events("c:0", 1, &[(ENTER, "ann")]));
    let hex: String = (shard.encode().iter())
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!((hex.as_str(), shard.digest()), (FROZEN, FROZEN_DIGEST));
}

const FROZEN_DIGEST: u64 = 8_966_935_330_056_559_530;
const FROZEN: &str = "\
    080310031802227e0a036170701201611a0208022a1c0a020801100120012a103c7e9bc930dc93f01fa69985ef242d9f\
    30782a200a020802100220012a1057598f642bb5d6122ba791a9387fef643078380b500130c2e1a0295a2b0a02080112\
    1c0a01631203616e6e1a02080220022a03633a303a073203616e6e40021a070a0163100118474002";
