//! What the bridge promises, one promise per test.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use firth::bridge::{Bridge, BridgeStatus, Options, State};
use firth::tasks::Tasks;
use firth::wire::control;
use rdkafka::producer::{BaseProducer, Producer as _};

use crate::kafka::{self, Kafka, Pair, Read};
use crate::memory::{Cluster, Node};

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn bridge(id: &str, servers: &str, inbound: bool, outbound: bool) -> control::Bridge {
    control::Bridge {
        id: id.into(),
        app: "app".into(),
        bootstrap_servers: servers.into(),
        inbound,
        outbound,
    }
}

fn options() -> Options {
    Options {
        discovery_ms: 300,
        floor_ms: 50,
        fenced_pause_ms: 1000,
        ..Default::default()
    }
}

fn start(node: &Arc<Node>, options: Options) -> (Bridge, Tasks) {
    let (tasks, _) = Tasks::root();
    (Bridge::start(node.clone(), options, &tasks), tasks)
}

/// Waits until `holds`; says what it saw last when it never does.
pub(crate) async fn until(what: &str, bridges: &[&Bridge], mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        if Instant::now() > deadline {
            let status: Vec<Vec<BridgeStatus>> = bridges.iter().map(|b| b.status()).collect();
            panic!("not in time: {what}\n{status:#?}");
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn by_key(read: &[Read]) -> BTreeMap<Option<String>, Vec<String>> {
    let mut keys: BTreeMap<Option<String>, Vec<String>> = BTreeMap::new();
    for record in read {
        keys.entry(record.key.clone())
            .or_default()
            .push(record.text());
    }
    keys
}

#[tokio::test(flavor = "multi_thread")]
async fn records_arrive_once_and_in_key_order_whoever_owns_them() {
    const KEYS: usize = 7;
    const RECORDS: usize = 3000;
    let kafka = kafka::shared();
    kafka.create_topic("in-order", 3);
    let produce = |range: std::ops::Range<usize>| {
        let records: Vec<(String, String)> = range
            .map(|n| (format!("k/{}", n % KEYS), format!("{n}")))
            .collect();
        let records = records
            .iter()
            .map(|(k, v)| (Some(k.as_bytes()), Some(v.as_bytes())));
        kafka.produce("in-order", records);
    };
    produce(0..RECORDS / 2);
    // An aborted transaction leaves records that were never there, and offsets that nothing has.
    let aborted: BaseProducer = (kafka.config())
        .set("transactional.id", "somebody")
        .create()
        .unwrap();
    aborted.init_transactions(PATIENCE).unwrap();
    aborted.begin_transaction().unwrap();
    kafka::send(
        &aborted,
        "in-order",
        (0..50).map(|_| (Some(&b"k/0"[..]), Some(&b"never"[..]))),
    );
    aborted.flush(PATIENCE).unwrap();
    aborted.abort_transaction(PATIENCE).unwrap();

    let cluster = Cluster::new("in-order", bridge("b", &kafka.servers(), true, false));
    cluster.faults.store(97, Ordering::Relaxed);
    let (first, second) = (cluster.node(), cluster.node());
    first.own_all_slots(1);
    let (first_bridge, _first_tasks) = start(&first, options());
    until("some records", &[&first_bridge], || {
        cluster.count("in-order") > RECORDS / 4
    })
    .await;
    // The first owner does not hear that it is over.
    second.own_all_slots(2);
    let (second_bridge, _second_tasks) = start(&second, options());
    produce(RECORDS / 2..RECORDS);
    let bridges = [&first_bridge, &second_bridge];
    until("all records", &bridges, || {
        cluster.count("in-order") >= RECORDS
    })
    .await;
    for key in 0..KEYS {
        let expected: Vec<String> = (key..RECORDS)
            .step_by(KEYS)
            .map(|n| n.to_string())
            .collect();
        let channel = cluster.channel(&format!("/in-order/k/{key}"));
        let channel: Vec<String> = (channel.into_iter())
            .map(|data| String::from_utf8(data.unwrap().to_vec()).unwrap())
            .collect();
        assert_eq!(channel, expected, "key {key}");
    }
    let fenced = |status: Vec<BridgeStatus>| {
        status[0]
            .inbound
            .iter()
            .filter(|p| p.topic == "in-order")
            .any(|p| p.state == State::Fenced)
    };
    until("the former owner to notice", &bridges, || {
        fenced(first_bridge.status())
    })
    .await;
    // Some records are stored and their answers were lost: the floors follow when they have been tried again.
    let read = kafka.read_committed("in-order");
    let ends: BTreeMap<i32, i64> = read.iter().map(|r| (r.partition, r.offset + 1)).collect();
    until("durable floors at the end", &bridges, || {
        ends.iter()
            .all(|(p, end)| cluster.floor("in-order", *p) == Some(*end))
    })
    .await;
    let stopping = Instant::now();
    first_bridge.stop().await;
    second_bridge.stop().await;
    assert!(stopping.elapsed() < Duration::from_secs(10));
    // A third owner starts at the floors and finds nothing new.
    let third = cluster.node();
    third.own_all_slots(3);
    let (third_bridge, _third_tasks) = start(&third, options());
    kafka.produce("in-order", [(Some(&b"last"[..]), Some(&b"x"[..]))]);
    until("the last record", &[&third_bridge], || {
        !cluster.channel("/in-order/last").is_empty()
    })
    .await;
    let replayed: u64 = (third_bridge.status()[0].inbound.iter())
        .filter(|p| p.topic == "in-order")
        .map(|p| p.duplicates)
        .sum();
    assert_eq!((cluster.count("in-order"), replayed), (RECORDS + 1, 0));
    third_bridge.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_every_kind_arrive_and_what_has_no_place_blocks_its_partition_only() {
    let kafka = kafka::shared();
    kafka.create_topic("kinds", 1);
    kafka.create_topic("kinds-bad", 1);
    let records: [Pair<'_>; 4] = [
        (Some(b"k"), Some(b"text")),
        (Some(b"k"), Some(&[0xff, 0x00])),
        (Some(b"k"), None),
        (None, Some(b"no key")),
    ];
    kafka.produce("kinds", records);
    kafka.produce(
        "kinds-bad",
        [
            (Some(&b"k"[..]), Some(&b"before"[..])),
            (Some(&[0xff][..]), Some(&b"bad"[..])),
            (Some(&b"k"[..]), Some(&b"after"[..])),
        ],
    );
    let cluster = Cluster::new("kinds", bridge("b", &kafka.servers(), true, false));
    let node = cluster.node();
    node.own_all_slots(1);
    let (bridge, _tasks) = start(&node, options());
    let blocked = || {
        let status = bridge.status();
        let bad = status
            .first()?
            .inbound
            .iter()
            .find(|p| p.topic == "kinds-bad")?;
        matches!(bad.state, State::Blocked(_)).then(|| bad.clone())
    };
    until("a blocked partition", &[&bridge], || blocked().is_some()).await;
    until("the others", &[&bridge], || {
        cluster.channel("/kinds").len() == 1
    })
    .await;
    until("the others", &[&bridge], || {
        cluster.channel("/kinds/k").len() == 3
    })
    .await;
    let kinds = cluster.channel("/kinds/k");
    let expected: [Option<&[u8]>; 3] = [Some(b"text"), Some(&[0xff, 0]), None];
    assert_eq!(
        kinds.iter().map(|d| d.as_deref()).collect::<Vec<_>>(),
        expected
    );
    assert_eq!(
        cluster.channel("/kinds-bad/k").len(),
        1,
        "nothing after the bad one"
    );
    let blocked = blocked().unwrap();
    assert_eq!(
        blocked.state.to_string(),
        "blocked: record at offset 1: key is not UTF-8"
    );
    assert_eq!(blocked.floor, Some(1));
    until("a durable floor", &[&bridge], || {
        cluster.floor("kinds-bad", 0) == Some(1)
    })
    .await;
    bridge.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_leave_once_and_in_order_whoever_leads() {
    const CHANNELS: usize = 5;
    const MESSAGES: usize = 3000;
    let kafka = kafka::shared();
    let cluster = Cluster::new("out-order", bridge("b", &kafka.servers(), false, true));
    let publish = |range: std::ops::Range<usize>| {
        for n in range {
            let channel = match n % CHANNELS {
                0 => "/out-order".to_owned(),
                key => format!("/out-order/k/{key}"),
            };
            cluster.client_publish(&channel, &format!("id-{n}"), &n.to_string());
            cluster.client_publish("elsewhere", &format!("id-{n}"), "not for kafka");
        }
    };
    let (first, second) = (cluster.node(), cluster.node());
    first.lead_all_shards(1);
    let (first_bridge, _first_tasks) = start(&first, options());
    publish(0..MESSAGES / 3);
    let exported = |bridge: &Bridge| -> u64 {
        bridge
            .status()
            .iter()
            .flat_map(|b| &b.outbound)
            .map(|s| s.records)
            .sum()
    };
    until("some messages", &[&first_bridge], || {
        exported(&first_bridge) > 10
    })
    .await;
    publish(MESSAGES / 3..MESSAGES * 2 / 3);
    // The first leader does not hear that it is over.
    second.lead_all_shards(2);
    let (second_bridge, _second_tasks) = start(&second, options());
    publish(MESSAGES * 2 / 3..MESSAGES);
    let bridges = [&first_bridge, &second_bridge];
    let caught_up = |bridge: &Bridge| {
        let status = bridge.status();
        let shards = status.first().map_or(&[][..], |b| &b.outbound);
        shards.len() == 4 && shards.iter().all(|s| s.lag == 0)
    };
    until("one leader to have it all", &bridges, || {
        caught_up(&first_bridge) || caught_up(&second_bridge)
    })
    .await;
    first.retire();
    until("the second to have it all", &bridges, || {
        caught_up(&second_bridge)
    })
    .await;
    let read = kafka.read_committed("out-order");
    let mut expected: BTreeMap<Option<String>, Vec<String>> = BTreeMap::new();
    for n in 0..MESSAGES {
        let key = (n % CHANNELS > 0).then(|| format!("k/{}", n % CHANNELS));
        expected.entry(key).or_default().push(n.to_string());
    }
    let read_keys = by_key(&read);
    for (key, expected) in expected {
        let found = &read_keys[&key];
        let differs = found.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(
            (found.len(), differs),
            (expected.len(), None),
            "key {key:?}: {found:?}"
        );
    }
    let sample = &read.iter().find(|r| r.text() == "7").unwrap().headers;
    assert_eq!(
        (sample["firth-id"].as_str(), sample["firth-origin"].as_str()),
        ("id-7:0", "out-order")
    );
    let stopping = Instant::now();
    first_bridge.stop().await;
    second_bridge.stop().await;
    assert!(stopping.elapsed() < Duration::from_secs(10));
    assert!(
        read.iter()
            .filter(|r| r.key.is_none())
            .all(|r| r.partition == 0)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_left_open_by_a_dead_leader_is_undone_before_its_successor_reads_the_cursor()
{
    let kafka = kafka::shared();
    let cluster = Cluster::new("zombie", bridge("b", &kafka.servers(), false, true));
    let shard = crate::memory::shard_of("app", "/zombie/k").0;
    let node = cluster.node();
    cluster.client_publish("/zombie/k", "a", "1");
    node.lead_all_shards(1);
    let (bridge, _tasks) = start(&node, options());
    let exported = |bridge: &Bridge| -> u64 {
        bridge
            .status()
            .iter()
            .flat_map(|b| &b.outbound)
            .map(|s| s.records)
            .sum()
    };
    until("the first message", &[&bridge], || exported(&bridge) == 1).await;
    bridge.stop().await;
    // Another holder of the transactional id dies with records and a cursor in flight.
    let dead: BaseProducer = (kafka.config())
        .set("transactional.id", format!("firth-zombie-b-{shard}"))
        .create()
        .unwrap();
    dead.init_transactions(PATIENCE).unwrap();
    dead.begin_transaction().unwrap();
    kafka::send(&dead, "zombie", [(Some(&b"k"[..]), Some(&b"ghost"[..]))]);
    let cursor = br#"{"version":1,"incarnation":1,"index":99}"#;
    let record: rdkafka::producer::BaseRecord<'_, [u8], [u8]> =
        rdkafka::producer::BaseRecord::to("firth-cursors-zombie-b")
            .partition(i32::try_from(shard).unwrap())
            .payload(&cursor[..]);
    dead.send(record).map_err(|(err, _)| err).unwrap();
    dead.flush(PATIENCE).unwrap();
    cluster.client_publish("/zombie/k", "b", "2");
    let (bridge, _tasks) = start(&node, options());
    until("the second message", &[&bridge], || exported(&bridge) == 1).await;
    let read: Vec<String> = kafka
        .read_committed("zombie")
        .iter()
        .map(Read::text)
        .collect();
    assert_eq!(read, ["1", "2"]);
    assert!(
        dead.commit_transaction(Duration::from_secs(5)).is_err(),
        "fenced"
    );
    bridge.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_channel_mirrored_both_ways_does_not_echo_and_an_idle_one_is_quick() {
    let kafka = kafka::shared();
    kafka.create_topic("echo", 2);
    let cluster = Cluster::new("echo", bridge("b", &kafka.servers(), true, true));
    let node = cluster.node();
    node.own_all_slots(1);
    node.lead_all_shards(1);
    let (bridge, _tasks) = start(&node, options());
    cluster.client_publish("/echo/k", "warm", "from firth 0");
    kafka.produce("echo", [(Some(&b"k"[..]), Some(&b"from kafka 0"[..]))]);
    let part = |f: fn(&BridgeStatus) -> u64| bridge.status().first().map_or(0, f);
    let records = || part(|b| b.outbound.iter().map(|s| s.records).sum());
    let skipped = || {
        part(|b| {
            b.inbound
                .iter()
                .filter(|p| p.topic == "echo")
                .map(|p| p.skipped)
                .sum()
        })
    };
    until("both ways", &[&bridge], || {
        records() == 1 && cluster.channel("/echo/k").len() == 2
    })
    .await;
    let (mut out, mut back) = (Vec::new(), Vec::new());
    for n in 1..=20 {
        let begin = Instant::now();
        cluster.client_publish("/echo/k", &format!("id-{n}"), &format!("from firth {n}"));
        until("a commit", &[&bridge], || records() > n).await;
        out.push(begin.elapsed());
        until("an echo that is skipped", &[&bridge], || skipped() > n).await;
        back.push(begin.elapsed());
        let value = format!("from kafka {n}");
        kafka.produce("echo", [(Some(&b"k"[..]), Some(value.as_bytes()))]);
    }
    until("all of it", &[&bridge], || {
        cluster.channel("/echo/k").len() == 42
    })
    .await;
    until("all of it", &[&bridge], || {
        skipped() == 21 && records() == 21
    })
    .await;
    out.sort();
    back.sort();
    println!("committed: median {:?}, longest {:?}", out[10], out[19]);
    println!("read back: median {:?}, longest {:?}", back[10], back[19]);
    assert!(out[10] < Duration::from_millis(500), "{out:?}");
    bridge.stop().await;
    assert_eq!(kafka.read_committed("echo").len(), 42);
    assert_eq!(cluster.channel("/echo/k").len(), 42);
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_may_come_late_and_go_away() {
    let port = kafka::free_port();
    let cluster = Cluster::new(
        "late",
        bridge("b", &format!("127.0.0.1:{port}"), true, true),
    );
    let node = cluster.node();
    node.own_all_slots(1);
    node.lead_all_shards(1);
    let options = Options {
        request_timeout_ms: 1000,
        ..options()
    };
    let (bridge, _tasks) = start(&node, options);
    let publish = |range: std::ops::Range<usize>| {
        for n in range {
            cluster.client_publish("/late/k", &format!("id-{n}"), &n.to_string());
        }
    };
    publish(0..100);
    let state = || bridge.status().first().map(|b| b.state.clone());
    until("a state", &[&bridge], || state() == Some(State::Connecting)).await;
    let mut kafka = Kafka::start_at(port);
    let lag = || -> u64 {
        let status = bridge.status();
        let shards = status.first().map_or(&[][..], |b| &b.outbound);
        shards.iter().map(|s| s.lag).sum::<u64>() + 4 - shards.len() as u64
    };
    until("a late kafka", &[&bridge], || lag() == 0).await;
    // A commit is answered before its markers are written. A lone broker that dies between the two can leave them out for
    // ever when it is back: it leads, resigns and leads its partitions again, and the transaction stays open.
    until("the markers of the commit", &[&bridge], || {
        let read = |topic| kafka.read_committed(topic).len();
        read("late") == 100 && read("firth-cursors-late-b") > 0
    })
    .await;
    kafka.kill();
    publish(100..200);
    until("a lost kafka to be seen", &[&bridge], || {
        matches!(state(), Some(State::Lagging(_)))
    })
    .await;
    kafka.run();
    kafka.produce("late-in", [(Some(&b"k"[..]), Some(&b"v"[..]))]);
    until("a kafka that came back", &[&bridge], || {
        lag() == 0 && cluster.channel("/late-in/k").len() == 1
    })
    .await;
    until("a good state", &[&bridge], || {
        state() == Some(State::Running)
    })
    .await;
    let read: Vec<String> = kafka
        .read_committed("late")
        .iter()
        .map(Read::text)
        .collect();
    let expected: Vec<String> = (0..200).map(|n| n.to_string()).collect();
    assert_eq!(read, expected);
    kafka.kill();
    let stopping = Instant::now();
    bridge.stop().await;
    assert!(
        stopping.elapsed() < Duration::from_secs(20),
        "also without kafka"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kafka_let_go_of_is_passed_over_and_a_topic_made_anew_is_not() {
    let kafka = kafka::shared();
    let value = |n: usize| n.to_string();
    let produce = |range: std::ops::Range<usize>| {
        let values: Vec<String> = range.map(value).collect();
        kafka.produce(
            "anew",
            values.iter().map(|v| (Some(&b"k"[..]), Some(v.as_bytes()))),
        );
    };
    kafka.create_topic("anew", 1);
    let cluster = Cluster::new("anew", bridge("b", &kafka.servers(), true, false));
    let node = cluster.node();
    node.own_all_slots(1);
    produce(0..10);
    let (first, _tasks) = start(&node, options());
    until("the beginning", &[&first], || {
        cluster.floor("anew", 0) == Some(10)
    })
    .await;
    first.stop().await;
    // While no bridge runs, retention takes what it has not seen.
    produce(10..20);
    kafka.expire("anew", 0, 15);
    let (second, _tasks) = start(&node, options());
    until("the rest", &[&second], || {
        cluster.floor("anew", 0) == Some(20)
    })
    .await;
    let channel = cluster.channel("/anew/k");
    let expected: Vec<String> = (0..10).chain(15..20).map(value).collect();
    let channel: Vec<&[u8]> = channel.iter().map(|d| &d.as_ref().unwrap()[..]).collect();
    assert_eq!(
        channel,
        expected.iter().map(String::as_bytes).collect::<Vec<_>>()
    );
    kafka.delete_topic("anew");
    let shown = || {
        let status = second.status();
        status[0]
            .inbound
            .iter()
            .find(|p| p.topic == "anew")
            .cloned()
    };
    until("the topic to be gone", &[&second], || shown().is_none()).await;
    kafka.create_topic("anew", 1);
    produce(0..3);
    until("the new topic to be blocked", &[&second], || {
        shown().is_some_and(|p| matches!(p.state, State::Blocked(_)))
    })
    .await;
    assert_eq!(cluster.count("anew"), 15);
    second.stop().await;
}
