//! One node of a test cluster: everything below the doors, on a runtime of its own.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use firth::channel::Event;
use firth::cluster::{self, Clock, Cluster, EventSink, Peer};
use firth::raft::{self, Host};
use firth::storage::{self, Log};
use firth::tasks::Tasks;
use firth::transport::{self, Transport, certs};
use firth::types::{ChannelKey, NodeId, Serial, ShardId};
use firth::wire::control;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::disk::{Archives, TestDisk};

pub(crate) const CLUSTER: &str = "test";
pub(crate) const SHARDS: u32 = 2;
pub(crate) const SEGMENT_BYTES: u64 = 64 << 10;
/// Small, so that reads and replication go to the disk.
const TAIL_BYTES: usize = 32 << 10;
/// All of them are read in about a second.
const SCRUB_BYTES_PER_SECOND: u64 = 1 << 20;
/// Small, so that checkpoints, archived index entries and moved records are everyday matters.
const CHECKPOINT_BYTES: u64 = 64 << 10;
const SLACK_BYTES: u64 = 64 << 10;
const RECORDS_IN_MEMORY: usize = 100;
const CHECK_PERIOD: Duration = Duration::from_secs(1);
const HORIZON_PAUSE: Duration = Duration::from_millis(250);
const GRACE: Duration = Duration::from_secs(5);

/// Hears what a node applies, and keeps what cannot be right.
#[derive(Debug, Default)]
pub(crate) struct Recorder(Mutex<Heard>);

#[derive(Debug, Default)]
struct Heard {
    newest: BTreeMap<ChannelKey, Serial>,
    /// Where each shard's state was last put in the place of another.
    replaced: BTreeMap<ShardId, Serial>,
    complaints: Vec<String>,
    /// Records whose predecessor this node never heard of: what a snapshot brought.
    gaps: usize,
}

impl EventSink for Recorder {
    fn advanced(&self, shard: ShardId, events: Vec<Event>) {
        let mut heard = self.heard();
        let replaced = heard.replaced.get(&shard).copied();
        for event in events {
            let serial = event.record.serial;
            let newest = heard.newest.insert(event.key.clone(), serial);
            let before = newest.max(replaced);
            if before.is_some_and(|before| before >= serial) {
                let name = event.key.name.as_str();
                heard.complaints.push(format!(
                    "shard {shard}: {name} came to {serial} after {before:?}"
                ));
            }
            if newest.is_some() && event.record.predecessor != newest {
                heard.gaps += 1;
            }
        }
    }

    fn replaced(&self, shard: ShardId, at: Serial) {
        self.heard().replaced.insert(shard, at);
    }
}

impl Recorder {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn complaints(&self) -> Vec<String> {
        self.heard().complaints.clone()
    }

    pub(crate) fn gaps(&self) -> usize {
        self.heard().gaps
    }
}

/// A process, as it were: gone without a word when `kill`ed.
pub(crate) struct Process {
    /// Taken only at the end.
    runtime: Option<Runtime>,
    tasks: Tasks,
    pub(crate) transport: Transport,
    pub(crate) log: Log,
    /// There once the node takes part.
    pub(crate) cluster: Arc<OnceLock<Cluster>>,
    archives: Archives,
    pub(crate) recorder: Arc<Recorder>,
    /// Why the node cannot go on, once it cannot.
    pub(crate) failure: watch::Receiver<Option<String>>,
}

impl Process {
    /// Opens the log and a socket of its own: the one of a killed process stays bound, like the address of a machine that
    /// is off, and says nothing.
    pub(crate) async fn boot(id: u64, home: &Path, disk: &TestDisk) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name(format!("node-{id}"))
            .enable_all()
            .build()?;
        let on_disk = Arc::new(disk.memory().clone());
        let opening = runtime.spawn_blocking(move || {
            let options = storage::Options {
                segment_bytes: SEGMENT_BYTES,
                tail_bytes: TAIL_BYTES,
                scrub_bytes_per_second: SCRUB_BYTES_PER_SECOND,
                ..storage::Options::new("log")
            };
            let owner = storage::Owner {
                cluster_id: CLUSTER.to_owned(),
                node: id,
            };
            Log::open_on(on_disk, options, &owner)
        });
        let opened = opening.await?;
        let (tasks, mut fatal_rx) = Tasks::root();
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let options = transport::Options::new(
            listen,
            NodeId(id),
            CLUSTER,
            home.join("certs"),
            BTreeMap::new(),
        );
        let on_tasks = tasks.clone();
        // The endpoint belongs to the runtime that it is made on.
        let starting = runtime.spawn(async move { Transport::start(options, &on_tasks) });
        let started = starting.await?;
        let (failure_tx, failure) = watch::channel(None);
        runtime.spawn(async move {
            if let Some(err) = fatal_rx.recv().await {
                failure_tx.send_replace(Some(format!("{err:#}")));
                failure_tx.closed().await;
            }
        });
        let parts = opened.map_err(anyhow::Error::from).and_then(|log| {
            let transport = started?;
            Ok((log, transport))
        });
        match parts {
            Ok((log, transport)) => Ok(Self {
                runtime: Some(runtime),
                tasks,
                transport,
                log,
                cluster: Arc::default(),
                archives: disk.archives(),
                recorder: Arc::default(),
                failure,
            }),
            Err(err) => {
                runtime.shutdown_background();
                Err(err)
            }
        }
    }

    /// Takes part in the cluster as soon as the others let it; the task ends then.
    pub(crate) fn join(&self, nodes: &[u64], clock: Clock) -> JoinHandle<anyhow::Result<()>> {
        let node = self.transport.node();
        let (log, transport) = (self.log.clone(), self.transport.clone());
        let (sink, archives) = (self.recorder.clone(), self.archives.clone());
        let (options, tasks) = (options(node, nodes, clock), self.tasks.clone());
        let (started, (phase, _)) = (self.cluster.clone(), watch::channel(String::new()));
        self.handle().spawn(async move {
            let parts = cluster::Parts {
                host: Host::new(node, log, transport, raft_options(), &tasks),
                sink,
                archive: Box::new(move |group| archives.of(group)),
                phase,
            };
            let cluster = Cluster::start(options, parts, &tasks).await?;
            // Set once, here.
            let _ = started.set(cluster);
            Ok(())
        })
    }

    pub(crate) fn handle(&self) -> Handle {
        let runtime = self.runtime.as_ref();
        let runtime = runtime.expect("it is taken only at the end");
        runtime.handle().clone()
    }

    /// Everything stops where it is. Blocks until no task of it is left.
    pub(crate) fn kill(mut self) {
        drop(self.runtime.take());
    }

    /// Leaves as an operator would have it.
    pub(crate) async fn stop(self) {
        let (cluster, tasks) = (self.cluster.get().cloned(), self.tasks.clone());
        let stopping = self.handle().spawn(async move {
            if let Some(cluster) = cluster {
                cluster.stop(GRACE).await;
            }
            assert!(tasks.stop(GRACE).await, "every task ends when told to");
        });
        stopping.await.unwrap();
        let closing = move || {
            self.log.close().unwrap();
            self.kill();
        };
        tokio::task::spawn_blocking(closing).await.unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // At the end of a test nobody waits for it.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn options(node: NodeId, nodes: &[u64], clock: Clock) -> cluster::Options {
    let peer = |id: &u64| {
        let nowhere = || "http://127.0.0.1:1".to_owned();
        let (url, admin) = (nowhere(), nowhere());
        (NodeId(*id), Peer { url, admin })
    };
    cluster::Options {
        node,
        nodes: nodes.iter().map(peer).collect(),
        shards: SHARDS,
        bootstrap: control::Bootstrap {
            cluster_id: CLUSTER.to_owned(),
            shards: SHARDS,
            ..Default::default()
        },
        upkeep: cluster::UpkeepOptions {
            slack_bytes: SLACK_BYTES,
            check_period: CHECK_PERIOD,
            horizon_pause: HORIZON_PAUSE,
            ..cluster::UpkeepOptions::default()
        },
        records_in_memory_max: RECORDS_IN_MEMORY,
        waiting_bytes_max: 16 << 20,
        clock,
    }
}

/// A follower must answer an append within a heartbeat, also one of an unoptimised build on a busy machine.
fn raft_options() -> raft::Options {
    raft::Options {
        heartbeat: Duration::from_millis(250),
        election_min: Duration::from_millis(500),
        election_max: Duration::from_millis(750),
        checkpoint_bytes: CHECKPOINT_BYTES,
        ..raft::Options::default()
    }
}

/// Makes the node's certificate below its home.
pub(crate) fn certify(home: &Path, authority: &Path, id: u64) {
    certs::create_node(&home.join("certs"), authority, CLUSTER, NodeId(id), &[]).unwrap();
}
