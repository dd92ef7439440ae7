//! A cluster of such nodes: started, cut, killed, restarted, wiped, asked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use firth::channel;
use firth::cluster::{Clock, Cluster, Submitted};
use firth::storage::Log;
use firth::transport::{Transport, certs};
use firth::types::{ChannelKey, ChannelName, GroupId, Kinds, NodeId, Range, Serial, ShardId};
use firth::wire::entry;
use tempfile::TempDir;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::disk::TestDisk;
use crate::node::{Process, Recorder, SHARDS, certify};

/// Longer than anything takes on a machine that compiles meanwhile.
pub(crate) const SOON: Duration = Duration::from_secs(90);
pub(crate) const RETENTION: Duration = channel::RETENTION_MIN;
/// For what leaves a long trail.
pub(crate) const LONG: Duration = Duration::from_secs(24 * 3600);
/// How many times as fast as the world's the cluster's time runs: the shortest retention takes three seconds.
const HASTE: u32 = 40;
/// Milliseconds since 1970 at which it begins.
const EPOCH_MS: u64 = 1_750_000_000_000;
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// Polls until `look` finds something. Panics with `what` after `within`.
pub(crate) async fn until<T>(
    what: &str,
    within: Duration,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "gave up after {within:?} waiting for {what}"
        );
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// A small generator, so that a seed names a run: xorshift64*.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }
}

/// What a publisher heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Stored(Serial),
    /// Stored before, there.
    Again(Serial),
    /// It may be stored or not.
    Unknown,
}

impl Outcome {
    pub(crate) fn serial(self) -> Option<Serial> {
        match self {
            Self::Stored(serial) | Self::Again(serial) => Some(serial),
            Self::Unknown => None,
        }
    }
}

/// One record of a channel's history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) serial: Serial,
    pub(crate) id: String,
    pub(crate) body: Bytes,
}

/// A node that lives, as seen at one moment.
#[derive(Clone)]
pub(crate) struct Live {
    pub(crate) id: u64,
    pub(crate) cluster: Cluster,
    pub(crate) log: Log,
    pub(crate) failure: watch::Receiver<Option<String>>,
    transport: Transport,
    handle: Handle,
}

impl Live {
    pub(crate) fn leads(&self, shard: ShardId) -> bool {
        self.cluster.leadership(shard).borrow().leader == Some(NodeId(self.id))
    }

    /// Runs on the node; `None` when it is killed meanwhile.
    async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        self.handle.spawn(work).await.ok()
    }

    /// The log index that a shard's state is at, its digest, and its outline.
    pub(crate) fn state(&self, shard: ShardId) -> (u64, u64, Bytes) {
        let state = self.cluster.state(shard);
        (state.applied(), state.digest(), state.outline())
    }

    /// The shard's newest index that is in no log of this node any more.
    pub(crate) fn purged(&self, shard: ShardId) -> u64 {
        let purged = self.log.group(GroupId::of_shard(shard)).purged();
        purged.map_or(0, |id| id.index)
    }
}

struct Slot {
    id: u64,
    home: PathBuf,
    disk: Mutex<TestDisk>,
    address: Mutex<Option<SocketAddr>>,
    process: Mutex<Option<Process>>,
    /// Those of all the node's processes.
    recorders: Mutex<Vec<Arc<Recorder>>>,
}

/// The cluster. What it is told to do with one node is done when the call returns.
pub(crate) struct Net {
    slots: Vec<Slot>,
    random: Mutex<Random>,
    cuts: Mutex<BTreeSet<(u64, u64)>>,
    began: Instant,
    /// Comparisons of states that agreed, and that did not, on processes that are gone.
    compared: (AtomicU64, AtomicU64),
    /// Of those that did not.
    forgiven: AtomicU64,
    _homes: TempDir,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn shards() -> impl Iterator<Item = ShardId> {
    (0..SHARDS).map(ShardId)
}

pub(crate) fn key(channel: &str) -> ChannelKey {
    ChannelKey {
        app: "app".parse().unwrap(),
        name: ChannelName::parse(channel).unwrap(),
    }
}

impl Net {
    /// Starts nodes 1 to `n` on empty disks, and waits until they serve. The seed decides what power cuts leave.
    pub(crate) async fn start(n: u64, seed: u64) -> Arc<Self> {
        if std::env::var_os("RUST_LOG").is_some() {
            let lines = tracing_subscriber::fmt().with_thread_names(true);
            let lines = lines.with_env_filter(tracing_subscriber::EnvFilter::from_default_env());
            // A second test finds it set up.
            let _ = lines.try_init();
        }
        let homes = tempfile::tempdir().unwrap();
        let authority = homes.path().join("ca");
        certs::create_ca(&authority).unwrap();
        let slot = |id| {
            let home = homes.path().join(format!("node-{id}"));
            certify(&home, &authority, id);
            Slot {
                id,
                home,
                disk: Mutex::default(),
                address: Mutex::default(),
                process: Mutex::default(),
                recorders: Mutex::default(),
            }
        };
        let net = Arc::new(Self {
            slots: (1..=n).map(slot).collect(),
            random: Mutex::new(Random::new(seed)),
            cuts: Mutex::default(),
            began: Instant::now(),
            compared: Default::default(),
            forgiven: AtomicU64::default(),
            _homes: homes,
        });
        for id in net.ids() {
            net.boot(id).await.unwrap();
        }
        net.meet();
        // None of them begins before all are there.
        let joining: Vec<_> = net.ids().into_iter().map(|id| net.join(id)).collect();
        for joined in joining {
            joined.await.unwrap().unwrap();
        }
        net.wait_serving().await;
        net
    }

    pub(crate) fn ids(&self) -> Vec<u64> {
        self.slots.iter().map(|slot| slot.id).collect()
    }

    fn slot(&self, id: u64) -> &Slot {
        let found = self.slots.iter().find(|slot| slot.id == id);
        found.expect("a scenario names nodes that it started")
    }

    /// The node, when it lives and takes part.
    pub(crate) fn live(&self, id: u64) -> Option<Live> {
        let process = lock(&self.slot(id).process);
        let process = process.as_ref()?;
        Some(Live {
            id,
            cluster: process.cluster.get()?.clone(),
            log: process.log.clone(),
            failure: process.failure.clone(),
            transport: process.transport.clone(),
            handle: process.handle(),
        })
    }

    /// Those that live.
    pub(crate) fn living(&self) -> Vec<Live> {
        let ids = self.slots.iter().map(|slot| slot.id);
        ids.filter_map(|id| self.live(id)).collect()
    }

    /// The disk on which the node is, or on which it will start next.
    pub(crate) fn disk(&self, id: u64) -> TestDisk {
        lock(&self.slot(id).disk).clone()
    }

    async fn boot(&self, id: u64) -> anyhow::Result<()> {
        let slot = self.slot(id);
        let process = Process::boot(id, &slot.home, &self.disk(id)).await?;
        *lock(&slot.address) = Some(process.transport.local_address());
        lock(&slot.recorders).push(process.recorder.clone());
        *lock(&slot.process) = Some(process);
        Ok(())
    }

    fn join(&self, id: u64) -> JoinHandle<anyhow::Result<()>> {
        let process = lock(&self.slot(id).process);
        let process = process.as_ref().expect("it was booted");
        process.join(&self.ids(), self.clock())
    }

    /// The clock of all nodes: theirs do not differ.
    fn clock(&self) -> Clock {
        let began = self.began;
        Clock::new(move || {
            let passed = (began.elapsed() * HASTE).as_millis();
            EPOCH_MS + u64::try_from(passed).expect("it runs for hours")
        })
    }

    /// The cluster's time in milliseconds since 1970.
    pub(crate) fn now_ms(&self) -> u64 {
        self.clock().now_ms()
    }

    /// Tells everybody where everybody is, but for cuts. An address that stays the same changes nothing.
    fn meet(&self) {
        let cuts = lock(&self.cuts).clone();
        for slot in &self.slots {
            let process = lock(&slot.process);
            let Some(process) = process.as_ref() else {
                continue;
            };
            for other in self.slots.iter().filter(|other| other.id != slot.id) {
                let cut = cuts.contains(&(slot.id.min(other.id), slot.id.max(other.id)));
                let address = lock(&other.address).filter(|_| !cut);
                let address = address.map(|address| address.to_string());
                let reachable = address.is_some();
                process.transport.set_peer(NodeId(other.id), address);
                if reachable {
                    process.transport.connect(NodeId(other.id)).unwrap();
                }
            }
        }
    }

    /// Nothing passes between two nodes any more.
    pub(crate) fn cut(&self, a: u64, b: u64) {
        lock(&self.cuts).insert((a.min(b), a.max(b)));
        self.meet();
    }

    /// Undoes all cuts.
    pub(crate) fn heal(&self) {
        lock(&self.cuts).clear();
        self.meet();
    }

    /// `kill -9` and a power cut: the node is gone, and of what it had not synced only parts are found again.
    pub(crate) async fn kill(&self, id: u64) {
        let slot = self.slot(id);
        let disk = self.disk(id);
        disk.cut();
        self.note_comparisons(id);
        let process = lock(&slot.process).take();
        if let Some(process) = process {
            let gone = tokio::task::spawn_blocking(|| process.kill());
            tokio::time::timeout(SOON, gone)
                .await
                .expect("a killed node is gone in time")
                .unwrap();
        }
        // Only now can nobody acknowledge any more what this image lacks.
        let mut random = lock(&self.random);
        *lock(&slot.disk) = disk.after_power_cut(|| random.below(2) == 0);
    }

    /// Ends the node as an operator would, handing over what it leads. Its disk stays as it is.
    pub(crate) async fn stop(&self, id: u64) {
        self.note_comparisons(id);
        let process = lock(&self.slot(id).process).take();
        let process = process.expect("a scenario stops nodes that live");
        let stopped = tokio::time::timeout(SOON, process.stop()).await;
        stopped.expect("a node stops in time");
    }

    /// Starts a killed or stopped node again; returns when it takes part, before it serves.
    ///
    /// # Errors
    /// What keeps it from starting: it is as if it had not been called.
    pub(crate) async fn try_restart(&self, id: u64) -> anyhow::Result<()> {
        let joining = match self.begin_restart(id).await {
            Ok(joining) => joining,
            Err(err) => {
                // Power may be gone: the next try finds what is left.
                self.kill(id).await;
                return Err(err);
            }
        };
        let mut failure = lock(&self.slot(id).process)
            .as_ref()
            .expect("it was booted")
            .failure
            .clone();
        let joined = tokio::select! {
            joined = joining => joined?,
            // It would end now.
            Ok(failed) = failure.wait_for(Option::is_some) => Err(anyhow::anyhow!("{failed:?}")),
            () = tokio::time::sleep(SOON) => {
                panic!("node {id} does not take part: {}", self.describe())
            }
        };
        if joined.is_err() {
            self.kill(id).await;
        }
        joined
    }

    /// Starts a killed or stopped node again. The task ends when it takes part: for that it may need others.
    async fn begin_restart(&self, id: u64) -> anyhow::Result<JoinHandle<anyhow::Result<()>>> {
        self.boot(id).await?;
        self.meet();
        Ok(self.join(id))
    }

    pub(crate) async fn restart(&self, id: u64) {
        let started = self.try_restart(id).await;
        started.unwrap_or_else(|err| panic!("node {id} does not start: {err:#}"));
    }

    /// Starts nodes again that need one another for it.
    pub(crate) async fn restart_all(&self, ids: &[u64]) {
        let mut joining = Vec::new();
        for id in ids {
            joining.push((*id, self.begin_restart(*id).await.unwrap()));
        }
        for (id, joined) in joining {
            let joined = tokio::time::timeout(SOON, joined).await;
            let joined = joined.unwrap_or_else(|_| {
                panic!("node {id} does not take part: {}", self.describe());
            });
            joined
                .unwrap()
                .unwrap_or_else(|err| panic!("node {id} does not start: {err:#}"));
        }
    }

    /// Starts a node whose disk is empty: it takes part only when the others let it.
    pub(crate) async fn restart_wiped(&self, id: u64) {
        drop(self.begin_restart(id).await.unwrap());
    }

    /// Has the cluster take a node back that lost its data, and waits until it votes everywhere.
    pub(crate) async fn readmit(&self, through: u64, node: u64) {
        let live = self.live(through).expect("a scenario asks nodes that live");
        let (cluster, id) = (live.cluster.clone(), NodeId(node));
        let readmitted = live.run(async move { cluster.readmit(id).await }).await;
        readmitted.expect("the node lives").unwrap();
        let what = format!("node {node} to vote again");
        until(&what, SOON, async || {
            let standing = live.cluster.standing(id).expect("it is configured");
            let done = !standing.readmitting && standing.votes_in == standing.groups;
            (done && self.live(node).is_some()).then_some(())
        })
        .await;
    }

    /// Kills the node and gives it an empty disk under its old identity.
    pub(crate) async fn wipe(&self, id: u64) {
        self.kill(id).await;
        *lock(&self.slot(id).disk) = TestDisk::default();
    }

    /// Waits until every living node is ready to serve clients.
    pub(crate) async fn wait_serving(&self) {
        for live in self.living() {
            let (cluster, handle) = (live.cluster.clone(), live.handle.clone());
            // On the node's own runtime: what is started there must die with it.
            let ready = tokio::task::spawn_blocking(move || {
                handle.block_on(async { tokio::time::timeout(SOON, cluster.ready()).await })
            });
            match ready.await.unwrap() {
                Ok(Ok(())) => {}
                Ok(Err(err)) => panic!("node {} cannot serve: {err}", live.id),
                Err(_) => panic!("node {} does not serve: {}", live.id, self.describe()),
            }
        }
    }

    /// Who leads what and how far everybody is, for messages.
    pub(crate) fn describe(&self) -> String {
        let shard = |live: &Live, shard| {
            let leader = live.cluster.leadership(shard).borrow().leader;
            let applied = *live.cluster.applied(shard).borrow();
            format!(
                "shard {shard}: leader {leader:?}, applied {applied}, purged {}",
                live.purged(shard)
            )
        };
        let node = |live: &Live| {
            let shards: Vec<String> = shards().map(|at| shard(live, at)).collect();
            let failure = live.failure.borrow().clone().unwrap_or_default();
            format!("node {}: {} {failure}", live.id, shards.join("; "))
        };
        let nodes: Vec<String> = self.living().iter().map(node).collect();
        nodes.join("\n")
    }

    /// The living node that leads the shard, once there is one that itself says so.
    pub(crate) async fn leader(&self, shard: ShardId) -> u64 {
        until("a leader", SOON, async || {
            let living = self.living();
            living.iter().find(|live| live.leads(shard)).map(|l| l.id)
        })
        .await
    }

    /// A living node that leads no shard, once there is one.
    pub(crate) async fn follower(&self) -> u64 {
        until("a node that leads nothing", SOON, async || {
            let living = self.living();
            let settled = shards().all(|shard| living.iter().any(|live| live.leads(shard)));
            let idle = |live: &&Live| shards().all(|shard| !live.leads(shard));
            let idle = living.iter().find(idle).map(|live| live.id);
            idle.filter(|_| settled)
        })
        .await
    }

    /// A channel of the shard.
    pub(crate) fn channel_of(shard: ShardId, prefix: &str) -> String {
        let names = (0..).map(|n| format!("{prefix}-{n}"));
        let mut names =
            names.filter(|name| firth::placement::shard_of(&key(name), SHARDS) == shard);
        names.next().expect("there are more names than shards")
    }

    /// Hands a publish in at a node; calls for one channel at one node are stored in this order. `None` when the node
    /// does not live or takes no more.
    pub(crate) fn submit(
        &self,
        node: u64,
        channel: &str,
        id: &str,
        body: Bytes,
        retention: Duration,
    ) -> Option<Submitted> {
        let live = self.live(node)?;
        let key = key(channel);
        let shard = live.cluster.shard_of(&key);
        let publish = entry::Publish {
            app: key.app.to_string(),
            channel: channel.to_owned(),
            id: id.to_owned(),
            count: 1,
            body,
            retention_ms: u64::try_from(retention.as_millis()).unwrap(),
            ..Default::default()
        };
        live.cluster.submit(shard, publish).ok()
    }

    /// The channel as the node shows it, oldest first, with everything acknowledged before the call.
    pub(crate) async fn history(&self, node: u64, channel: &str) -> Vec<Stored> {
        let live = self.live(node).expect("a scenario asks nodes that live");
        let (cluster, key) = (live.cluster.clone(), key(channel));
        let shard = cluster.shard_of(&key);
        let read = live.run(async move {
            let deadline = Instant::now() + SOON;
            loop {
                // Records go, and move, between the look at the index and the one at the log.
                match read_channel(&cluster, shard, &key).await {
                    Err(_) if Instant::now() < deadline => tokio::time::sleep(LOOK_AGAIN).await,
                    read => return read,
                }
            }
        });
        let records = read.await.expect("the node lives");
        let records = records.unwrap_or_else(|err| panic!("{channel} on node {node}: {err:#}"));
        let stored = |record: firth::cluster::StoredRecord| Stored {
            serial: record.at.serial,
            id: record.publish.id,
            body: record.publish.body,
        };
        records.into_iter().map(stored).collect()
    }

    /// Waits until all living nodes are at the same place of every shard, and proves on the way that the same place
    /// means the same bytes.
    pub(crate) async fn agree(&self) {
        for shard in shards() {
            let mut seen: BTreeMap<u64, (u64, (u64, Bytes))> = BTreeMap::new();
            let what = format!("one state of shard {shard}");
            until(&what, SOON, async || {
                let states: Vec<_> = self
                    .living()
                    .iter()
                    .map(|live| (live.id, live.state(shard)))
                    .collect();
                for (id, (applied, digest, outline)) in &states {
                    let shown = (*digest, outline.clone());
                    let first = seen.entry(*applied).or_insert_with(|| (*id, shown.clone()));
                    assert!(
                        first.1 == shown,
                        "at {applied} of shard {shard} nodes {} and {id} differ",
                        first.0
                    );
                }
                let mut places = states.iter().map(|(_, (applied, ..))| *applied);
                let place = places.next()?;
                places.all(|other| other == place).then_some(())
            })
            .await;
        }
    }

    /// Comparisons of states on all processes that there were: how many agreed, and how many did not.
    pub(crate) fn comparisons(&self) -> (u64, u64) {
        let (agreed, differed) = &self.compared;
        let gone = (
            agreed.load(Ordering::Relaxed),
            differed.load(Ordering::Relaxed),
        );
        let living = self
            .living()
            .into_iter()
            .map(|live| live.cluster.comparisons());
        living.fold(gone, |sum, more| (sum.0 + more.0, sum.1 + more.1))
    }

    /// A scenario meant what differed until now.
    pub(crate) fn forgive_differences(&self) {
        let (_, differed) = self.comparisons();
        self.forgiven.store(differed, Ordering::Relaxed);
    }

    /// A number that the seed decides.
    pub(crate) fn below(&self, end: u64) -> u64 {
        lock(&self.random).below(end)
    }

    fn note_comparisons(&self, id: u64) {
        let Some(live) = self.live(id) else { return };
        let (agreed, differed) = live.cluster.comparisons();
        self.compared.0.fetch_add(agreed, Ordering::Relaxed);
        self.compared.1.fetch_add(differed, Ordering::Relaxed);
    }

    /// No node ever found its state to differ, or heard of a record twice or out of order. The number of records whose predecessor was not heard of.
    pub(crate) fn check_nodes(&self) -> usize {
        let recorders = self.slots.iter().flat_map(|slot| {
            let recorders = lock(&slot.recorders).clone();
            recorders
                .into_iter()
                .map(move |recorder| (slot.id, recorder))
        });
        let (agreed, differed) = self.comparisons();
        assert_eq!(
            differed,
            self.forgiven.load(Ordering::Relaxed),
            "states differed on some node; {agreed} times they agreed"
        );
        let mut gaps = 0;
        for (id, recorder) in recorders {
            let complaints = recorder.complaints();
            assert!(complaints.is_empty(), "node {id}: {complaints:?}");
            gaps += recorder.gaps();
        }
        gaps
    }

    /// Waits until the node has said that it cannot go on, and why.
    pub(crate) async fn failure(&self, id: u64) -> String {
        let live = self.live(id).expect("a scenario asks nodes that live");
        let mut failure = live.failure;
        let said = tokio::time::timeout(SOON, failure.wait_for(Option::is_some)).await;
        let said = said.expect("the node says that it cannot go on");
        said.unwrap().clone().unwrap()
    }

    /// Other nodes that the node can reach.
    pub(crate) fn reached_from(&self, id: u64) -> BTreeSet<u64> {
        let live = self.live(id);
        let reachable = live.map(|live| live.transport.reachable().borrow().clone());
        let reachable = reachable.into_iter().flatten();
        reachable.map(|node| node.0).collect()
    }
}

async fn read_channel(
    cluster: &Cluster,
    shard: ShardId,
    key: &ChannelKey,
) -> anyhow::Result<Vec<firth::cluster::StoredRecord>> {
    cluster.catch_up(shard, SOON).await?;
    let all = Range {
        newest_first: false,
        ..Range::ALL
    };
    let mut refs = cluster
        .state(shard)
        .range(key, &all, Kinds::Both, usize::MAX)?;
    let mut records = Vec::with_capacity(refs.len());
    while !refs.is_empty() {
        let page = cluster.read_records(shard, refs.clone()).await?;
        refs.drain(..page.len());
        records.extend(page);
    }
    Ok(records)
}

/// What becomes of a publish. `Unknown` also for one that was never taken.
pub(crate) async fn outcome(submitted: Option<Submitted>) -> Outcome {
    let Some(submitted) = submitted else {
        return Outcome::Unknown;
    };
    match submitted.await {
        Ok(Ok(channel::Outcome::Stored(serial))) => Outcome::Stored(serial),
        Ok(Ok(channel::Outcome::Duplicate(Some(serial)))) => Outcome::Again(serial),
        Ok(Ok(other)) => panic!("no client's publish is answered with {other:?}"),
        Ok(Err(_)) | Err(_) => Outcome::Unknown,
    }
}
