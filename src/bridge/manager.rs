//! Keeps importers and exporter threads in line with the configured bridges and the shards led here.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::bridge::exporter;
use crate::bridge::importer::{self, Shown};
use crate::bridge::kafka::Target;
use crate::bridge::options::Options;
use crate::bridge::record::ExportRule;
use crate::bridge::status::{BridgeStatus, ShardStatus};
use crate::bridge::thread::Worker;
use crate::bridge::upstream::Upstream;
use crate::tasks::{OnError, Tasks};
use crate::types::{AppId, ShardId};
use crate::wire::control;

/// How often threads that ended by themselves are looked for and started again.
const LOOK_AFTER: Duration = Duration::from_secs(1);

/// What the façade reads.
#[derive(Debug, Default)]
pub(super) struct Shared(Mutex<BTreeMap<String, Parts>>);

#[derive(Debug, Default)]
struct Parts {
    inbound: Option<Arc<Mutex<Shown>>>,
    outbound: BTreeMap<ShardId, ShownShard>,
}

#[derive(Debug)]
struct ShownShard {
    status: Arc<Mutex<ShardStatus>>,
    applied: watch::Receiver<u64>,
}

impl ShownShard {
    /// With the lag of now, not of when the exporter last looked.
    fn status(&self) -> ShardStatus {
        let mut status = lock(&self.status).clone();
        status.applied = *self.applied.borrow();
        status.lag = status.applied.saturating_sub(status.cursor);
        status
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn status(&self) -> Vec<BridgeStatus> {
        let parts = lock(&self.0);
        let status = parts.iter().map(|(bridge, parts)| {
            let inbound = parts.inbound.as_ref().map(|shown| lock(shown));
            let reading = inbound.as_ref().map(|shown| shown.reading.clone());
            let partitions = inbound.map_or_else(Vec::new, |shown| shown.partitions.clone());
            let shards = parts.outbound.values().map(ShownShard::status).collect();
            BridgeStatus::of(bridge.clone(), reading, partitions, shards)
        });
        status.collect()
    }
}

/// An importer task that can be stopped and awaited.
struct Import {
    stop: CancellationToken,
    ended: oneshot::Receiver<()>,
}

struct Export {
    term_tx: watch::Sender<u64>,
    worker: Worker,
}

/// One configured bridge while it runs.
struct Running {
    config: control::Bridge,
    app: AppId,
    import: Option<Import>,
    exports: BTreeMap<ShardId, Export>,
}

/// Owns everything that runs.
pub(super) struct Manager {
    upstream: Arc<dyn Upstream>,
    options: Arc<Options>,
    tasks: Tasks,
    shared: Arc<Shared>,
    running: BTreeMap<String, Running>,
}

impl Manager {
    pub(super) fn new(
        upstream: Arc<dyn Upstream>,
        options: Options,
        tasks: Tasks,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            upstream,
            options: Arc::new(options),
            tasks,
            shared,
            running: BTreeMap::new(),
        }
    }

    pub(super) async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut bridges = self.upstream.bridges();
        let mut led = self.upstream.led_shards();
        loop {
            let configured = bridges.borrow_and_update().clone();
            let leading = led.borrow_and_update().clone();
            self.follow_bridges(&configured).await;
            self.follow_shards(&leading).await;
            tokio::select! {
                () = &mut stop => break,
                Ok(()) = bridges.changed() => {}
                Ok(()) = led.changed() => {}
                () = tokio::time::sleep(LOOK_AFTER) => {}
            }
        }
        let all = std::mem::take(&mut self.running);
        join_all(all.into_values().map(|running| self.stop(running))).await;
        lock(&self.shared.0).clear();
    }

    async fn follow_bridges(&mut self, configured: &[control::Bridge]) {
        let same = |running: &Running| configured.contains(&running.config);
        let gone: Vec<String> = (self.running.iter())
            .filter(|(_, running)| !same(running))
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            if let Some(running) = self.running.remove(&id) {
                self.stop(running).await;
            }
            lock(&self.shared.0).remove(&id);
        }
        for config in configured {
            if !self.running.contains_key(&config.id) {
                self.start(config);
            }
        }
    }

    fn start(&mut self, config: &control::Bridge) {
        let bridge = config.id.as_str();
        let app: AppId = match config.app.parse() {
            Ok(app) => app,
            Err(err) => return error!(bridge, %err, "bridge not started"),
        };
        info!(
            bridge,
            inbound = config.inbound,
            outbound = config.outbound,
            "bridge"
        );
        let mut parts = Parts::default();
        let mut running = Running {
            config: config.clone(),
            app,
            import: None,
            exports: BTreeMap::new(),
        };
        if config.inbound {
            let shown = Arc::new(Mutex::new(Shown::default()));
            parts.inbound = Some(shown.clone());
            running.import = Some(self.start_import(&running, shown));
        }
        lock(&self.shared.0).insert(config.id.clone(), parts);
        self.running.insert(config.id.clone(), running);
    }

    fn target(&self, config: &control::Bridge) -> Target {
        Target {
            bootstrap_servers: config.bootstrap_servers.clone(),
            cluster_id: self.upstream.cluster_id().to_owned(),
            bridge: config.id.clone(),
        }
    }

    fn start_import(&self, running: &Running, shown: Arc<Mutex<Shown>>) -> Import {
        let job = importer::Job {
            upstream: self.upstream.clone(),
            options: self.options.clone(),
            target: self.target(&running.config),
            app: running.app.clone(),
            shown,
        };
        let stop = CancellationToken::new();
        let (ended_tx, ended) = oneshot::channel();
        let token = stop.clone();
        self.tasks
            .spawn("bridge.import", OnError::StopNode, |_| async move {
                while let Err(err) = importer::run(job.clone(), token.clone()).await {
                    error!(
                        bridge = job.target.bridge,
                        error = format!("{err:#}"),
                        "import restarts"
                    );
                    tokio::select! {
                        () = token.cancelled() => break,
                        () = tokio::time::sleep(LOOK_AFTER) => {}
                    }
                }
                // Nobody may be waiting.
                let _ = ended_tx.send(());
                Ok(())
            });
        Import { stop, ended }
    }

    async fn follow_shards(&mut self, leading: &BTreeMap<ShardId, u64>) {
        let grace = self.grace();
        let ids: Vec<String> = self.running.keys().cloned().collect();
        let mut gone = Vec::new();
        for id in ids {
            let Some(running) = self.running.get_mut(&id) else {
                continue;
            };
            if !running.config.outbound {
                continue;
            }
            let over = |shard: &ShardId, export: &mut Export| {
                !leading.contains_key(shard) || export.worker.is_ended()
            };
            for (shard, export) in running.exports.extract_if(.., over) {
                export.worker.ask();
                gone.push((id.clone(), shard, export));
            }
        }
        // Together, then waited for: a successor of the same transactional id starts after its former one here.
        let stopped = gone.into_iter().map(|(id, shard, export)| async move {
            let in_time = export.worker.stop(grace).await;
            (id, shard, in_time)
        });
        for (id, shard, in_time) in join_all(stopped).await {
            if !in_time {
                warn!(bridge = id, %shard, "kafka producer did not stop in time");
            }
            if let Some(parts) = lock(&self.shared.0).get_mut(&id) {
                parts.outbound.remove(&shard);
            }
        }
        self.start_exports(leading);
    }

    fn start_exports(&mut self, leading: &BTreeMap<ShardId, u64>) {
        let mut running = std::mem::take(&mut self.running);
        for bridge in running.values_mut().filter(|r| r.config.outbound) {
            for (shard, term) in leading {
                if let Some(export) = bridge.exports.get(shard) {
                    export.term_tx.send_if_modified(|old| {
                        let newer = *old != *term;
                        *old = *term;
                        newer
                    });
                    continue;
                }
                match self.start_export(bridge, *shard, *term) {
                    Ok(export) => drop(bridge.exports.insert(*shard, export)),
                    Err(err) => {
                        error!(bridge = bridge.config.id, %shard, %err, "no thread for export");
                    }
                }
            }
        }
        self.running = running;
    }

    fn start_export(&self, bridge: &Running, shard: ShardId, term: u64) -> std::io::Result<Export> {
        let status = Arc::new(Mutex::new(ShardStatus {
            shard: shard.0,
            term,
            ..Default::default()
        }));
        let (term_tx, term) = watch::channel(term);
        let target = self.target(&bridge.config);
        let job = exporter::Job {
            upstream: self.upstream.clone(),
            options: self.options.clone(),
            rule: ExportRule {
                bridge: target.bridge.clone(),
                app: bridge.app.clone(),
                cluster_id: target.cluster_id.clone(),
            },
            target,
            shard,
            term,
            status: status.clone(),
            runtime: Handle::current(),
        };
        let name = format!("kafka-out-{shard}");
        let worker = Worker::start(name, CancellationToken::new(), |stop| {
            exporter::run(job, stop)
        })?;
        if let Some(parts) = lock(&self.shared.0).get_mut(&bridge.config.id) {
            let applied = self.upstream.applied(shard);
            parts.outbound.insert(shard, ShownShard { status, applied });
        }
        Ok(Export { term_tx, worker })
    }

    /// Longest a thread may take to stop: its own limit, and requests that have to time out meanwhile.
    fn grace(&self) -> Duration {
        self.options.stop_timeout() + self.options.request_timeout() * 3
    }

    async fn stop(&self, running: Running) {
        let bridge = running.config.id.as_str();
        let grace = self.grace();
        let exports = running.exports.into_values().map(|export| {
            export.worker.ask();
            export.worker.stop(grace)
        });
        let import = async {
            let Some(import) = running.import else {
                return true;
            };
            import.stop.cancel();
            // The importer limits itself; an error means that it is gone.
            tokio::time::timeout(grace * 2, import.ended).await.is_ok()
        };
        let (exports, import) = tokio::join!(join_all(exports), import);
        if !import || exports.contains(&false) {
            warn!(bridge, "bridge did not stop in time");
        }
    }
}
