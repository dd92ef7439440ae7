//! Two and three nodes in one process: what arrives, in which order, and what is said when it does not.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use prost::Message as _;
use tempfile::TempDir;
use tokio::sync::{Notify, oneshot};
use tokio::task::spawn;
use tokio::time::timeout;

use super::*;

const LOCAL: &str = "127.0.0.1:0";
const SOON: Duration = Duration::from_secs(20);
const ECHO: Service = Service(7);
const STUCK: Service = Service(8);
const COUNT: Service = Service(9);
const SHARD: GroupId = GroupId(3);

/// Certificates of one authority.
struct Certs(TempDir);

impl Certs {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        certs::create_ca(dir.path()).unwrap();
        Self(dir)
    }

    fn node(&self, cluster_id: &str, node: u64) -> PathBuf {
        let dir = self.0.path().join(format!("{cluster_id}-{node}"));
        if !dir.exists() {
            certs::create_node(&dir, self.0.path(), cluster_id, NodeId(node), &[]).unwrap();
        }
        dir
    }

    fn options(&self, node: u64) -> Options {
        let certs = self.node("test", node);
        Options::new(
            LOCAL.parse().unwrap(),
            NodeId(node),
            "test",
            certs,
            BTreeMap::new(),
        )
    }
}

fn start(options: Options) -> (Transport, Tasks) {
    let tasks = Tasks::root().0;
    let transport = Transport::start(options, &tasks).unwrap();
    transport.register(ECHO, Arc::new(|_, _, body| async move { Ok(body) }));
    let stuck = |_, _, _| std::future::pending::<Result<Bytes, String>>();
    transport.register(STUCK, Arc::new(stuck));
    transport.register_stream(ECHO, Arc::new(echo_frames));
    (transport, tasks)
}

async fn echo_frames(_: NodeId, _: GroupId, mut tx: FrameTx, mut rx: FrameRx) {
    while let Some(Ok(body)) = rx.next().await {
        if tx.send(body).await.is_err() {
            return;
        }
    }
}

fn meet(a: &Transport, b: &Transport) {
    a.set_peer(b.node(), Some(b.local_address().to_string()));
    b.set_peer(a.node(), Some(a.local_address().to_string()));
}

/// Nodes 1 to `n` that know each other.
fn cluster(n: u64) -> (Certs, Vec<(Transport, Tasks)>) {
    let certs = Certs::new();
    let nodes: Vec<_> = (1..=n).map(|id| start(certs.options(id))).collect();
    for (i, (a, _)) in nodes.iter().enumerate() {
        nodes[i + 1..].iter().for_each(|(b, _)| meet(a, b));
    }
    (certs, nodes)
}

async fn ask(
    from: &Transport,
    to: u64,
    service: Service,
    body: &'static [u8],
) -> Result<Bytes, CallError> {
    let body = Bytes::from_static(body);
    from.call(NodeId(to), Lane::Raft, service, SHARD, body.into(), SOON)
        .await
}

async fn wait_connected(from: &Transport, to: u64, up: bool) {
    let mut reachable = from.reachable();
    let changed = reachable.wait_for(|nodes| nodes.contains(&NodeId(to)) == up);
    timeout(SOON, changed).await.unwrap().unwrap();
}

/// Calls until the peer answers.
async fn ask_until_answered(from: &Transport, to: u64) {
    let _ = from.connect(NodeId(to));
    wait_connected(from, to, true).await;
    assert_eq!(ask(from, to, ECHO, b"again").await.unwrap(), "again");
}

fn reason(err: &CallError) -> String {
    err.to_string()
}

#[tokio::test]
async fn calls_are_answered_both_ways_on_both_lanes() {
    let (_certs, nodes) = cluster(2);
    let (a, b) = (&nodes[0].0, &nodes[1].0);
    let whoami = |from: NodeId, group: GroupId, body: Bytes| async move {
        Ok(Bytes::from(format!("{from}/{}/{}", group.0, body.len())))
    };
    b.register(COUNT, Arc::new(whoami));
    for lane in [Lane::Raft, Lane::Bulk] {
        let big = Bytes::from(vec![7; 3 << 20]);
        let call = a.call(NodeId(2), lane, COUNT, SHARD, big.clone().into(), SOON);
        assert_eq!(call.await.unwrap(), format!("1/3/{}", 3 << 20));
        let call = b.call(NodeId(1), lane, ECHO, SHARD, big.clone().into(), SOON);
        assert_eq!(call.await.unwrap(), big);
    }
    assert!(a.connected(NodeId(2)) && b.connected(NodeId(1)));
}

#[tokio::test]
async fn what_is_not_answered_says_why() {
    let (_certs, nodes) = cluster(2);
    let (a, b) = (&nodes[0].0, &nodes[1].0);
    b.register(
        COUNT,
        Arc::new(|_, _, _| async { Err("not the leader".to_owned()) }),
    );
    let refused = ask(a, 2, COUNT, b"").await.unwrap_err();
    assert_eq!(refused, CallError::Refused("not the leader".to_owned()));
    let busy = ask(a, 2, Service(99), b"").await.unwrap_err();
    assert!(matches!(busy, CallError::Busy { .. }), "{busy}");
    let busy = a
        .open(NodeId(2), Lane::Bulk, Service(99), SHARD)
        .await
        .unwrap_err();
    assert!(matches!(busy, CallError::Busy { .. }), "{busy}");
    for nobody in [1, 5] {
        let err = ask(a, nobody, ECHO, b"").await.unwrap_err();
        assert!(matches!(err, CallError::Unreachable { .. }), "{err}");
    }
}

#[tokio::test]
async fn a_late_handler_is_dropped_and_its_caller_told() {
    struct Told(Option<oneshot::Sender<()>>);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.take().map(|tx| tx.send(()));
        }
    }
    let (_certs, nodes) = cluster(2);
    let (a, b) = (&nodes[0].0, &nodes[1].0);
    let (tx, rx) = oneshot::channel();
    let told = Mutex::new(Some(Told(Some(tx))));
    let handler = move |_, _, _| {
        let told = told.lock().unwrap().take();
        async move {
            let _told = told;
            std::future::pending::<Result<Bytes, String>>().await
        }
    };
    b.register(COUNT, Arc::new(handler));
    ask(a, 2, ECHO, b"").await.unwrap();
    let short = Duration::from_millis(50);
    let call = a.call(NodeId(2), Lane::Raft, COUNT, SHARD, Body::default(), short);
    assert_eq!(
        call.await.unwrap_err(),
        CallError::Timeout { node: NodeId(2) }
    );
    timeout(SOON, rx).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_calls_at_once_get_their_own_answers() {
    let certs = Certs::new();
    let mut options = certs.options(2);
    options.requests_max = 16_384;
    let ((a, _a_tasks), (b, _b_tasks)) = (start(certs.options(1)), start(options));
    meet(&a, &b);
    let calls = (0..3000_u32).map(|n| {
        let a = a.clone();
        let size = usize::try_from(n % 7).unwrap() * 1000;
        let body: Bytes = [&n.to_le_bytes()[..], &vec![0; size]].concat().into();
        spawn(async move {
            let answer = a
                .call(
                    NodeId(2),
                    Lane::Raft,
                    ECHO,
                    SHARD,
                    body.clone().into(),
                    SOON,
                )
                .await;
            assert_eq!(answer.unwrap(), body);
        })
    });
    for done in join_all(calls).await {
        done.unwrap();
    }
}

#[tokio::test]
async fn a_stuck_handler_delays_nobody_and_is_bounded() {
    let certs = Certs::new();
    let mut options = certs.options(2);
    options.requests_max = 40;
    let ((a, _a_tasks), (b, _b_tasks)) = (start(certs.options(1)), start(options));
    meet(&a, &b);
    let entered = Arc::new((AtomicUsize::new(0), Notify::new()));
    let seen = entered.clone();
    let stuck = move |_, _, _| {
        seen.0.fetch_add(1, Ordering::AcqRel);
        seen.1.notify_one();
        std::future::pending::<Result<Bytes, String>>()
    };
    b.register(STUCK, Arc::new(stuck));
    let call = || {
        let a = a.clone();
        spawn(async move { ask(&a, 2, STUCK, b"").await })
    };
    let stuck: Vec<_> = (0..10).map(|_| call()).collect();
    while entered.0.load(Ordering::Acquire) < 10 {
        timeout(SOON, entered.1.notified()).await.unwrap();
    }
    let beyond = ask(&a, 2, STUCK, b"").await.unwrap_err();
    assert!(matches!(beyond, CallError::Busy { .. }), "{beyond}");
    let other = a.call(
        NodeId(2),
        Lane::Raft,
        ECHO,
        GroupId(4),
        Bytes::from_static(b"x").into(),
        SOON,
    );
    assert_eq!(other.await.unwrap(), "x");
    stuck.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_keeps_its_order_under_load() {
    const FRAMES: u32 = 20_000;
    let (_certs, nodes) = cluster(2);
    let (mut tx, mut rx) = (nodes[0].0)
        .open(NodeId(2), Lane::Raft, ECHO, SHARD)
        .await
        .unwrap();
    let sender = spawn(async move {
        for n in 0..FRAMES {
            let size = if n % 100 == 0 { 50_000 } else { 100 };
            let body = [&n.to_le_bytes()[..], &vec![0; size]].concat();
            tx.send(body.into()).await.unwrap();
        }
    });
    for n in 0..FRAMES {
        let frame = timeout(SOON, rx.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(frame[..4], n.to_le_bytes());
    }
    sender.await.unwrap();
    assert!(rx.next().await.is_none(), "the sender's end is echoed too");
}

#[tokio::test]
async fn a_slow_reader_holds_its_sender_back() {
    let (_certs, nodes) = cluster(2);
    let idle = |_, _, tx, rx| async move {
        let _halves: (FrameTx, FrameRx) = (tx, rx);
        std::future::pending::<()>().await;
    };
    nodes[1].0.register_stream(COUNT, Arc::new(idle));
    let (mut tx, _rx) = (nodes[0].0)
        .open(NodeId(2), Lane::Bulk, COUNT, SHARD)
        .await
        .unwrap();
    let body = Bytes::from(vec![0; 1 << 20]);
    let mut sent = 0;
    // The windows of one stream and its queue hold about 18 MiB.
    while let Ok(done) = timeout(Duration::from_millis(500), tx.send(body.clone())).await {
        done.unwrap();
        sent += 1;
        assert!(sent < 64, "nothing held the sender back");
    }
}

#[tokio::test]
async fn dropping_a_half_ends_that_direction() {
    let (_certs, nodes) = cluster(2);
    let (tx, mut rx) = (nodes[0].0)
        .open(NodeId(2), Lane::Raft, ECHO, SHARD)
        .await
        .unwrap();
    drop(tx);
    assert!(timeout(SOON, rx.next()).await.unwrap().is_none());

    let (mut tx, rx) = (nodes[0].0)
        .open(NodeId(2), Lane::Raft, ECHO, SHARD)
        .await
        .unwrap();
    drop(rx);
    // The echo fails to answer, so its handler ends and takes its receiving half along.
    let ended = async { while tx.send(Bytes::from_static(b"x")).await.is_ok() {} };
    timeout(SOON, ended).await.unwrap();
    timeout(SOON, tx.closed()).await.unwrap();
}

#[tokio::test]
async fn three_nodes_know_who_is_reachable() {
    let (_certs, nodes) = cluster(3);
    let a = &nodes[0].0;
    assert!(!a.connected(NodeId(2)));
    a.connect(NodeId(2)).unwrap();
    a.connect(NodeId(3)).unwrap();
    wait_connected(a, 2, true).await;
    wait_connected(a, 3, true).await;
    assert!(nodes[2].1.stop(SOON).await);
    wait_connected(a, 3, false).await;
    assert!(a.connected(NodeId(2)));
    a.set_peer(NodeId(2), None);
    wait_connected(a, 2, false).await;
}

#[tokio::test]
async fn a_peer_that_moves_is_followed() {
    let certs = Certs::new();
    let (a, _a_tasks) = start(certs.options(1));
    let (b, _b_tasks) = start(certs.options(2));
    meet(&a, &b);
    ask_until_answered(&a, 2).await;
    let (moved, _moved_tasks) = start(certs.options(2));
    let where_am_i = |_, _, _| async { Ok(Bytes::from_static(b"moved")) };
    moved.register(COUNT, Arc::new(where_am_i));
    a.set_peer(NodeId(2), Some(moved.local_address().to_string()));
    assert_eq!(ask(&a, 2, COUNT, b"").await.unwrap(), "moved");
    wait_connected(&a, 2, true).await;
}

/// A node in a runtime of its own, so that it can die without a word.
struct Mortal {
    runtime: tokio::runtime::Runtime,
    address: SocketAddr,
}

impl Mortal {
    async fn start(options: Options) -> Self {
        let begin = move || {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            let runtime = builder.worker_threads(1).enable_all().build().unwrap();
            let address = runtime.block_on(async {
                let (transport, tasks) = start(options);
                let address = transport.local_address();
                // Held by a task that dies with the runtime.
                spawn(async move {
                    let _held = (transport, tasks);
                    std::future::pending::<()>().await;
                });
                address
            });
            Self { runtime, address }
        };
        tokio::task::spawn_blocking(begin).await.unwrap()
    }

    async fn kill(self) {
        tokio::task::spawn_blocking(move || drop(self.runtime))
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_is_noticed_in_time_and_a_return_too() {
    let certs = Certs::new();
    let (a, _tasks) = start(certs.options(1));
    let b = Mortal::start(certs.options(2)).await;
    let address = b.address;
    a.set_peer(NodeId(2), Some(address.to_string()));
    ask_until_answered(&a, 2).await;
    let (_tx, mut rx) = a.open(NodeId(2), Lane::Raft, ECHO, SHARD).await.unwrap();

    let caller = a.clone();
    let stuck = spawn(async move { ask(&caller, 2, STUCK, b"").await });
    ask(&a, 2, ECHO, b"behind it").await.unwrap();
    b.kill().await;
    let died = Instant::now();
    let broken = timeout(SOON, stuck).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(broken, CallError::Broken { .. }), "{broken}");
    assert!(
        died.elapsed() < Duration::from_secs(3),
        "{:?}",
        died.elapsed()
    );
    let ended = timeout(SOON, rx.next()).await.unwrap();
    assert!(
        matches!(ended, Some(Err(StreamError::Lost(_)))),
        "{ended:?}"
    );
    let asked = Instant::now();
    let err = ask(&a, 2, ECHO, b"").await.unwrap_err();
    assert!(matches!(err, CallError::Unreachable { .. }), "{err}");
    assert!(
        asked.elapsed() < Duration::from_millis(200),
        "it must not wait for a dial"
    );

    let mut options = certs.options(2);
    options.listen = address;
    let b = Mortal::start(options).await;
    ask_until_answered(&a, 2).await;
    b.kill().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_restarts_at_once_disowns_its_old_connections() {
    let certs = Certs::new();
    let mut patient = certs.options(1);
    // Silence alone would take longer than the test waits.
    patient.raft_idle_timeout = SOON * 10;
    let (a, _tasks) = start(patient);
    let mut options = certs.options(2);
    options.raft_idle_timeout = SOON * 10;
    let b = Mortal::start(options.clone()).await;
    options.listen = b.address;
    a.set_peer(NodeId(2), Some(b.address.to_string()));
    ask_until_answered(&a, 2).await;
    b.kill().await;
    let b = Mortal::start(options).await;
    wait_connected(&a, 2, false).await;
    ask_until_answered(&a, 2).await;
    b.kill().await;
}

#[tokio::test]
async fn a_stopped_node_says_farewell() {
    let (_certs, nodes) = cluster(2);
    let a = &nodes[0].0;
    ask_until_answered(a, 2).await;
    let caller = a.clone();
    let stuck = spawn(async move { ask(&caller, 2, STUCK, b"").await });
    ask(a, 2, ECHO, b"behind it").await.unwrap();
    let stopping = Instant::now();
    assert!(nodes[1].1.stop(SOON).await);
    let err = stuck.await.unwrap().unwrap_err();
    assert!(matches!(err, CallError::Broken { .. }), "{err}");
    assert!(
        stopping.elapsed() < Duration::from_millis(1200),
        "{:?}",
        stopping.elapsed()
    );
    // After its stop a node's own calls fail too.
    let err = ask(&nodes[1].0, 1, ECHO, b"").await.unwrap_err();
    assert!(matches!(err, CallError::Unreachable { .. }), "{err}");
}

#[tokio::test]
async fn another_authority_is_refused() {
    let (ours, theirs) = (Certs::new(), Certs::new());
    let (a, _a_tasks) = start(ours.options(1));
    let (b, _b_tasks) = start(theirs.options(2));
    meet(&a, &b);
    for (from, to) in [(&a, 2), (&b, 1)] {
        let err = ask(from, to, ECHO, b"").await.unwrap_err();
        assert!(reason(&err).contains("certificate"), "{err}");
        assert!(!from.connected(NodeId(to)));
    }
}

#[tokio::test]
async fn another_node_at_the_address_is_refused() {
    let certs = Certs::new();
    let (a, _a_tasks) = start(certs.options(1));
    let (c, _c_tasks) = start(certs.options(3));
    a.set_peer(NodeId(2), Some(c.local_address().to_string()));
    let err = ask(&a, 2, ECHO, b"").await.unwrap_err();
    assert!(reason(&err).contains("certificate"), "{err}");
}

#[tokio::test]
async fn a_certificate_of_another_node_or_cluster_cannot_start() {
    let certs = Certs::new();
    for (node, cluster_id) in [(2, "test"), (1, "other")] {
        let mut options = certs.options(1);
        options.certs = certs.node(cluster_id, node);
        let err = Transport::start(options, &Tasks::root().0).unwrap_err();
        assert!(matches!(err, Error::NotOurs { .. }), "{err}");
    }
}

/// Connects to `to` with the certificate of node 2, says `hello`, and returns why it was sent away.
async fn say_hello(certs: &Certs, to: &Transport, hello: &[u8]) -> String {
    let mut options = certs.options(2);
    options.frame_bytes_max = 1 << 20;
    let identity = certs::load(&options.certs).unwrap();
    let configs = tls::client_configs(&options, &identity).unwrap();
    let endpoint = Endpoint::client(LOCAL.parse().unwrap()).unwrap();
    let name = certs::node_name("test", to.node());
    let connecting = endpoint.connect_with(configs.lane(Lane::Raft), to.local_address(), &name);
    let connection = connecting.unwrap().await.unwrap();
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(hello).await.unwrap();
    frame::lost_reason(&timeout(SOON, connection.closed()).await.unwrap())
}

fn hello_frame(change: impl FnOnce(&mut peer::Hello)) -> Vec<u8> {
    let mut hello = peer::Hello {
        version: peer::VERSION,
        cluster_id: "test".to_owned(),
        node: 2,
        service: 0,
        group: 0,
    };
    change(&mut hello);
    let body = hello.encode_to_vec();
    let length = u32::try_from(body.len() + 1).unwrap();
    [
        &length.to_le_bytes()[..],
        &[frame::Kind::Hello as u8],
        &body,
    ]
    .concat()
}

#[tokio::test]
async fn a_false_hello_is_refused_with_the_reason() {
    let certs = Certs::new();
    let (a, _tasks) = start(certs.options(1));
    let cases: [(Vec<u8>, &str); 6] = [
        (
            hello_frame(|h| h.node = 3),
            "the certificate is not one of node 3",
        ),
        (hello_frame(|h| h.node = 1), "this node itself"),
        (
            hello_frame(|h| h.cluster_id = "other".to_owned()),
            "not `other`",
        ),
        (hello_frame(|h| h.version = 2), "protocol version 2"),
        (hello_frame(|h| h.service = 7), "not the one for calls"),
        (vec![0xff; 64], "larger than"),
    ];
    for (hello, expected) in cases {
        let reason = say_hello(&certs, &a, &hello).await;
        assert!(reason.contains(expected), "{reason}");
    }
}

#[tokio::test]
async fn a_frame_beyond_the_limit_is_refused() {
    let certs = Certs::new();
    let mut small = certs.options(2);
    small.frame_bytes_max = 2048;
    let ((a, _a_tasks), (b, _b_tasks)) = (start(certs.options(1)), start(small));
    meet(&a, &b);
    // Its own limit is checked before anything is sent.
    let body = Bytes::from(vec![0; 4096]);
    let call = b.call(
        NodeId(1),
        Lane::Raft,
        ECHO,
        SHARD,
        body.clone().into(),
        SOON,
    );
    assert!(matches!(call.await, Err(CallError::Refused(_))));
    let (mut tx, _rx) = b.open(NodeId(1), Lane::Raft, ECHO, SHARD).await.unwrap();
    let sent = tx.send(body.clone()).await;
    assert!(
        matches!(sent, Err(StreamError::TooLarge { .. })),
        "{sent:?}"
    );
    // The peer's limit ends the connection, which says why; the next one works.
    let call = a.call(NodeId(2), Lane::Raft, ECHO, SHARD, body.into(), SOON);
    let err = call.await.unwrap_err();
    assert!(
        matches!(err, CallError::Broken { .. }) && reason(&err).contains("larger than"),
        "{err}"
    );
    ask_until_answered(&a, 2).await;
}
