//! Who counts what, through changes of leaders, lost tellings and dead nodes.

use proptest::prelude::*;

use super::*;

fn key(name: &str) -> ChannelKey {
    ChannelKey {
        app: "app".parse().unwrap(),
        name: ChannelName::parse(name).unwrap(),
    }
}

fn one() -> Counts {
    Counts {
        connections: 1,
        subscribers: 1,
        ..Counts::default()
    }
}

fn led(node: u64, term: u64) -> Leadership {
    Leadership {
        leader: Some(NodeId(node)),
        term,
    }
}

/// Tells a leader until it knows everything; gives what changed.
fn tell(
    own: &mut Own,
    heard: &mut Heard,
    node: u64,
    term: u64,
    now: Instant,
) -> Vec<OccupancyChange> {
    let mut changes = Vec::new();
    for telling in own.tell(led(9, term)) {
        let speaker = (NodeId(node), node);
        match heard.hear(
            term,
            speaker,
            (telling.number, telling.whole),
            telling.counts,
            now,
        ) {
            Some(more) => changes.extend(more),
            None => {
                own.forget_told();
                return tell(own, heard, node, term, now);
            }
        }
    }
    changes
}

#[tokio::test(start_paused = true)]
async fn counts_of_all_nodes_are_added_up_until_a_node_falls_silent() {
    let (mut first, mut second, mut heard) = (Own::default(), Own::default(), Heard::default());
    let began = Instant::now();
    first.change(&key("a"), Counts::default(), one());
    first.change(&key("a"), Counts::default(), one());
    second.change(&key("a"), Counts::default(), one());
    tell(&mut first, &mut heard, 1, 1, began);
    tell(&mut second, &mut heard, 2, 1, began);
    assert_eq!(heard.counts(&key("a")).subscribers, 3);
    first.change(&key("a"), one(), Counts::default());
    tell(&mut first, &mut heard, 1, 1, began);
    assert_eq!(heard.counts(&key("a")).subscribers, 2);
    let later = began + SILENT_AFTER - Duration::from_millis(1);
    tell(&mut first, &mut heard, 1, 1, later);
    assert_eq!(heard.expire(1, later), []);
    let later = later + Duration::from_millis(1);
    assert_eq!(heard.expire(1, later), []);
    assert_eq!(heard.counts(&key("a")).subscribers, 1);
    // It comes back, and is asked for everything.
    tell(&mut second, &mut heard, 2, 1, later);
    assert_eq!(heard.counts(&key("a")).subscribers, 2);
}

#[tokio::test(start_paused = true)]
async fn channels_open_with_the_first_and_close_with_the_last() {
    let (mut first, mut second, mut heard) = (Own::default(), Own::default(), Heard::default());
    let began = Instant::now();
    first.change(&key("old"), Counts::default(), one());
    assert_eq!(
        tell(&mut first, &mut heard, 1, 1, began),
        [],
        "who led just now cannot tell what is new"
    );
    let now = began + SETTLING;
    first.change(&key("new"), Counts::default(), one());
    assert_eq!(
        tell(&mut first, &mut heard, 1, 1, now),
        [OccupancyChange::Opened(key("new"))]
    );
    second.change(&key("new"), Counts::default(), one());
    assert_eq!(tell(&mut second, &mut heard, 2, 1, now), []);
    first.change(&key("new"), one(), Counts::default());
    assert_eq!(tell(&mut first, &mut heard, 1, 1, now), []);
    // Told anew, nothing is new.
    first.forget_told();
    assert_eq!(tell(&mut first, &mut heard, 1, 1, now), []);
    second.change(&key("new"), one(), Counts::default());
    assert_eq!(
        tell(&mut second, &mut heard, 2, 1, now),
        [OccupancyChange::Closed(key("new"))]
    );
    assert_eq!(
        heard.expire(1, now + SILENT_AFTER),
        [OccupancyChange::Closed(key("old"))]
    );
}

#[tokio::test(start_paused = true)]
async fn who_has_nothing_to_say_is_silent() {
    let mut own = Own::default();
    assert!(own.tell(led(1, 1)).is_empty());
    own.change(&key("a"), Counts::default(), one());
    assert_eq!(own.tell(led(1, 1)).len(), 1);
    // That it is alive.
    assert_eq!(
        own.tell(led(1, 1)),
        [Telling {
            number: 2,
            speaks: true,
            ..Telling::default()
        }]
    );
    own.change(&key("a"), one(), Counts::default());
    assert_eq!(
        own.tell(led(1, 1))[0].counts,
        [(key("a"), Counts::default())]
    );
    let watching = own.watch(&key("b"));
    assert_eq!(own.tell(led(1, 1))[0].asked, [key("b")]);
    own.answered(&key("b"), Metrics::default());
    assert_eq!(*watching.borrow(), Some(Metrics::default()));
    drop(watching);
    assert!(own.tell(led(1, 1)).is_empty());
    // The last thing told may not have arrived.
    own.forget_told();
    assert!(own.tell(led(1, 1))[0].whole);
    assert!(own.tell(led(1, 1)).is_empty());
}

#[tokio::test(start_paused = true)]
async fn channels_are_listed_in_order_by_prefix() {
    let (mut own, mut heard) = (Own::default(), Heard::default());
    for name in ["b:2", "a", "b:1", "c", "b:3"] {
        own.change(&key(name), Counts::default(), one());
    }
    tell(&mut own, &mut heard, 1, 1, Instant::now());
    let listed = |prefix: &str, after: Option<&str>, limit| {
        let after = after.map(|name| ChannelName::parse(name).unwrap());
        let names = heard.channels(&key("a").app, prefix, after.as_ref(), limit);
        names
            .iter()
            .map(|name| name.as_str().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(listed("", None, 9), ["a", "b:1", "b:2", "b:3", "c"]);
    assert_eq!(listed("b:", None, 2), ["b:1", "b:2"]);
    assert_eq!(listed("b:", Some("b:2"), 2), ["b:3"]);
    assert!(
        heard
            .channels(&"other".parse().unwrap(), "", None, 9)
            .is_empty()
    );
}

#[tokio::test(start_paused = true)]
async fn what_arrives_late_is_not_heard() {
    let (mut own, mut heard, now) = (Own::default(), Heard::default(), Instant::now());
    own.change(&key("a"), Counts::default(), one());
    let late = own.tell(led(9, 1)).remove(0);
    own.change(&key("a"), one(), Counts::default());
    // Nobody knows whether it arrived, so everything is told again; then it does arrive.
    own.forget_told();
    tell(&mut own, &mut heard, 1, 1, now);
    let changes = heard.hear(
        1,
        (NodeId(1), 1),
        (late.number, late.whole),
        late.counts,
        now,
    );
    assert_eq!(changes, Some(vec![]));
    assert_eq!(heard.counts(&key("a")), Counts::default());
}

#[derive(Clone, Debug)]
enum Step {
    /// An attachment on this node comes or goes.
    Change(u8, u8, bool),
    Tell(u8),
    /// What the node tells is lost.
    Lose(u8),
    Lead,
    Reboot(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..3_u8, 0..4_u8, any::<bool>()).prop_map(|(node, channel, comes)| Step::Change(node, channel, comes)),
        4 => (0..3_u8).prop_map(Step::Tell),
        1 => (0..3_u8).prop_map(Step::Lose),
        1 => Just(Step::Lead),
        1 => (0..3_u8).prop_map(Step::Reboot),
    ]
}

proptest! {
    /// Whatever was lost, and whoever leads: when every node has told once more, the sums are right.
    #[test]
    fn sums_are_right_once_everybody_told(steps in prop::collection::vec(step(), 0..80)) {
        let now = Instant::now();
        let mut owns: Vec<Own> = (0..3).map(|_| Own::default()).collect();
        let mut boots = [0_u64, 1, 2];
        let mut attached: BTreeMap<(u8, u8), u32> = BTreeMap::new();
        let (mut heard, mut term) = (Heard::default(), 1);
        let name = |channel: u8| key(["a", "b", "c", "d"][usize::from(channel)]);
        let tell = |own: &mut Own, heard: &mut Heard, node: u8, boot: u64, term: u64| {
            for _ in 0..2 {
                let mut unknown = false;
                for telling in own.tell(led(9, term)) {
                    let speaker = (NodeId(u64::from(node)), boot);
                    unknown |= heard.hear(term, speaker, (telling.number, telling.whole), telling.counts, now).is_none();
                }
                if unknown {
                    own.forget_told();
                }
            }
        };
        let mut next_boot = 3;
        for step in steps {
            match step {
                Step::Change(node, channel, comes) => {
                    let count = attached.entry((node, channel)).or_default();
                    let own = &mut owns[usize::from(node)];
                    if comes {
                        *count += 1;
                        own.change(&name(channel), Counts::default(), one());
                    } else if *count > 0 {
                        *count -= 1;
                        own.change(&name(channel), one(), Counts::default());
                    }
                }
                Step::Tell(node) => {
                    tell(&mut owns[usize::from(node)], &mut heard, node, boots[usize::from(node)], term);
                }
                Step::Lose(node) => {
                    let own = &mut owns[usize::from(node)];
                    drop(own.tell(led(9, term)));
                    own.forget_told();
                }
                Step::Lead => term += 1,
                Step::Reboot(node) => {
                    owns[usize::from(node)] = Own::default();
                    boots[usize::from(node)] = next_boot;
                    next_boot += 1;
                    attached.retain(|(of, _), _| *of != node);
                    // A process that has nothing to say is expired; here at once.
                    heard.hear(term, (NodeId(u64::from(node)), next_boot), (1, true), [], now);
                }
            }
        }
        for node in 0..3 {
            tell(&mut owns[usize::from(node)], &mut heard, node, boots[usize::from(node)], term);
        }
        for channel in 0..4 {
            let expected: u32 = (0..3).filter_map(|node| attached.get(&(node, channel))).sum();
            prop_assert_eq!(heard.counts(&name(channel)).subscribers, expected, "channel {}", channel);
        }
    }
}
