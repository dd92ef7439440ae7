//! A whole node: built bottom-up, stopped top-down.

pub mod dev;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::admin::{self, Serving};
use crate::archive::Archives;
use crate::bridge::Bridge;
use crate::broker::{Broker, Hub};
use crate::cluster::{self, Cluster};
use crate::config::Config;
use crate::gateway::Gateway;
use crate::raft::Host;
use crate::storage::{self, Log};
use crate::tasks::Tasks;
use crate::telemetry;
use crate::transport::Transport;

/// How long the data directory may still be held by a process that is ending, and how often that is looked at.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_AGAIN: Duration = Duration::from_millis(50);
/// How long clients may take to be sent away: the five seconds over which many are, and what the last one needs.
const CLIENTS_GRACE: Duration = Duration::from_secs(8);
/// How long handing over leaderships may take.
const HAND_OVER_GRACE: Duration = Duration::from_secs(2);
/// How long everything else may take.
const TASKS_GRACE: Duration = Duration::from_secs(2);

/// Runs a node until it is told to stop or cannot keep its promises.
///
/// # Errors
/// Why it could not start, or had to stop.
pub async fn run(config: Config, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    telemetry::start(&config.telemetry)?;
    let (root, mut fatal_rx) = Tasks::root();
    let mut signals = Signals::new()?;
    tokio::pin!(stop);
    let node = tokio::select! {
        node = Node::start(config, &root) => node?,
        err = failure(&mut fatal_rx) => return Err(err),
        () = signals.received() => return Ok(()),
        () = &mut stop => return Ok(()),
    };
    let result = tokio::select! {
        err = failure(&mut fatal_rx) => Err(err),
        () = signals.received() => Ok(()),
        () = &mut stop => Ok(()),
    };
    match &result {
        Ok(()) => tracing::info!("stopping"),
        Err(err) => tracing::error!(error = format!("{err:#}"), "the node cannot go on"),
    }
    tokio::select! {
        () = node.stop(&root) => {}
        () = signals.received() => tracing::warn!("stopped at once"),
    }
    result
}

async fn failure(fatal_rx: &mut mpsc::Receiver<anyhow::Error>) -> anyhow::Error {
    match fatal_rx.recv().await {
        Some(err) => err,
        // Every task is gone: whoever stopped them says why.
        None => std::future::pending().await,
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Opens the log. A killed process holds its lock until what it was writing is on the disk, so that one is waited for.
fn open_log(options: &storage::Options, owner: &storage::Owner) -> Result<Log, storage::Error> {
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match Log::open(options.clone(), owner) {
            Err(storage::Error::Locked { .. }) if Instant::now() < until => {
                std::thread::sleep(LOCK_AGAIN);
            }
            opened => return opened,
        }
    }
}

struct Node {
    log: Log,
    cluster: Cluster,
    bridge: Bridge,
    doors: Tasks,
    serving_tx: watch::Sender<Option<Serving>>,
}

impl Node {
    async fn start(config: Config, root: &Tasks) -> anyhow::Result<Self> {
        let node = config.cluster.node;
        tracing::info!(%node, cluster = config.owner.cluster_id, "starting");
        let (storage, owner) = (config.storage, config.owner);
        let (index, archive) = (storage.dir.join("index"), config.archive);
        let opened = tokio::task::spawn_blocking(move || open_log(&storage, &owner));
        let log = opened.await?.context("cannot open the data directory")?;
        let (serving_tx, serving_rx) = watch::channel(None);
        let (phase, phase_rx) = watch::channel("opening".to_owned());
        admin::start(&config.admin, serving_rx, phase_rx, root).await?;
        let doors = root.group();
        let gateway = Gateway::bind(config.gateway).await?;
        let transport =
            Transport::start(config.transport, root).context("cannot reach other nodes")?;
        let hub = Arc::new(Hub::default());
        let archives = tokio::task::spawn_blocking(move || Archives::open(index, archive)).await?;
        let archives = archives.context("cannot open the index of older records")?;
        let parts = cluster::Parts {
            host: Host::new(node, log.clone(), transport, config.raft, root),
            sink: hub.clone(),
            archive: Box::new(move |group| archives.shard(group)),
            phase,
        };
        let cluster = Cluster::start(config.cluster, parts, root).await?;
        cluster.ready().await?;
        let broker = Broker::new(cluster.clone(), hub);
        let bridge = Bridge::on_broker(broker.clone(), config.bridge, root);
        gateway.serve(broker.clone(), &doors);
        let bridge_status = bridge.clone();
        serving_tx.send_replace(Some(Serving {
            broker,
            bridge: bridge_status,
        }));
        tracing::info!(%node, "serving");
        Ok(Self {
            log,
            cluster,
            bridge,
            doors,
            serving_tx,
        })
    }

    async fn stop(self, root: &Tasks) {
        self.serving_tx.send_replace(None);
        if !self.doors.stop(CLIENTS_GRACE).await {
            tracing::warn!("some clients did not leave in time");
        }
        self.bridge.stop().await;
        self.cluster.stop(HAND_OVER_GRACE).await;
        if !root.stop(TASKS_GRACE).await {
            tracing::warn!("some tasks did not end in time");
        }
        let log = self.log;
        match tokio::task::spawn_blocking(move || log.close()).await {
            Ok(Ok(())) => tracing::info!("stopped"),
            Ok(Err(err)) => tracing::error!(error = %err, "the log did not close cleanly"),
            Err(err) => tracing::error!(error = %err, "the log did not close"),
        }
    }
}

/// Resolves when standard input ends, if that is to be listened to.
pub async fn stop_word(listen: bool) {
    use tokio::io::AsyncReadExt as _;
    if !listen {
        return std::future::pending().await;
    }
    let mut input = tokio::io::stdin();
    let mut buffer = [0; 64];
    // What is said does not matter, nor how it ends.
    while input.read(&mut buffer).await.is_ok_and(|bytes| bytes > 0) {}
}
