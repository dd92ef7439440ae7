//! The task that brings what the reader thread finds into channels, and moves the floors behind it.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::bridge::inbound::{Limits, Partition, Work};
use crate::bridge::kafka::{Target, TopicPartition};
use crate::bridge::options::Options;
use crate::bridge::reader::{self, Command, Event};
use crate::bridge::record::{self, Import, Incoming};
use crate::bridge::slot_of;
use crate::bridge::status::{PartitionStatus, State};
use crate::bridge::thread::Worker;
use crate::bridge::upstream::{Outcome, Publish, PublishError, Upstream};
use crate::stdx::{ByteBudget, ByteGrant};
use crate::types::AppId;
use crate::wire::{control, entry};

/// How often what waits for the clock is looked at.
const TICK: Duration = Duration::from_millis(20);
/// Events taken between two looks at everything else.
const EVENTS_MAX: usize = 64;

/// What operators see; shared with the façade.
#[derive(Debug, Default)]
pub(super) struct Shown {
    pub(super) reading: State,
    pub(super) partitions: Vec<PartitionStatus>,
}

/// What an importer is for.
#[derive(Clone)]
pub(super) struct Job {
    pub(super) upstream: Arc<dyn Upstream>,
    pub(super) options: Arc<Options>,
    pub(super) target: Target,
    pub(super) app: AppId,
    pub(super) shown: Arc<Mutex<Shown>>,
}

/// A record in the window: what is submitted, and the right to hold it.
type Payload = Arc<(Publish, ByteGrant)>;

struct Owned {
    epoch: u64,
    /// Tells this ownership from every other one, also of the same epoch.
    token: u64,
    machine: Partition<Payload>,
    paused: bool,
    durable: Option<i64>,
    end: Option<i64>,
    shown: State,
}

struct Settled {
    at: TopicPartition,
    token: u64,
    offset: i64,
    outcome: Result<Outcome, PublishError>,
}

struct Importer {
    job: Job,
    commands_tx: std_mpsc::Sender<Command>,
    slots: watch::Receiver<Arc<BTreeMap<u32, u64>>>,
    discovered: BTreeSet<TopicPartition>,
    owned: BTreeMap<TopicPartition, Owned>,
    generation: u64,
    publishing: FuturesUnordered<BoxFuture<'static, Settled>>,
    saving: Option<BoxFuture<'static, Result<(), String>>>,
    offered: BTreeMap<TopicPartition, (u64, i64)>,
    reading: State,
    told: Option<String>,
}

/// Runs until stopped.
///
/// # Errors
/// When the reader thread could not be started, or ended by itself; the importer may be run again.
pub(super) async fn run(job: Job, stop: CancellationToken) -> anyhow::Result<()> {
    let (events_tx, mut events_rx) = mpsc::channel(64);
    let (commands_tx, commands_rx) = std_mpsc::channel();
    let reader = reader::Job {
        options: job.options.clone(),
        target: job.target.clone(),
        budget: ByteBudget::new(job.options.inbound_bytes_max),
        events_tx,
        commands_rx,
    };
    let name = format!("kafka-in-{}", job.target.bridge);
    let reader_stop = CancellationToken::new();
    let mut reader = Worker::start(name, reader_stop, |stop| reader::run(reader, stop))?;
    let mut importer = Importer {
        slots: job.upstream.slots(&job.target.bridge),
        commands_tx,
        discovered: BTreeSet::new(),
        owned: BTreeMap::new(),
        generation: 0,
        publishing: FuturesUnordered::new(),
        saving: None,
        offered: BTreeMap::new(),
        reading: State::Connecting,
        told: None,
        job,
    };
    let failed = tokio::select! {
        () = stop.cancelled() => false,
        () = importer.run(&mut events_rx) => true,
        () = reader.ended() => true,
    };
    // The reader waits for room in the channel: without a receiver it ends.
    drop(events_rx);
    let grace = importer.job.options.stop_timeout();
    importer.finish(grace).await;
    if !failed {
        // Several requests may have to time out, one after the other.
        let grace = grace + importer.job.options.request_timeout() * 2;
        if !reader.stop(grace).await {
            warn!(
                bridge = importer.job.target.bridge,
                "kafka reader did not stop in time"
            );
        }
        return Ok(());
    }
    anyhow::bail!("kafka reader ended")
}

impl Importer {
    /// Returns when the reader is gone.
    async fn run(&mut self, events_rx: &mut mpsc::Receiver<Event>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut floors = tokio::time::interval(Duration::from_millis(self.job.options.floor_ms));
        floors.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut events = Vec::with_capacity(EVENTS_MAX);
        loop {
            tokio::select! {
                changed = self.slots.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.reassign();
                }
                n = events_rx.recv_many(&mut events, EVENTS_MAX) => {
                    if n == 0 {
                        return;
                    }
                    self.on_events(&mut events).await;
                }
                Some(settled) = self.publishing.next(), if !self.publishing.is_empty() => {
                    self.on_settled(settled).await;
                }
                saved = async { self.saving.as_mut().expect("checked").await }, if self.saving.is_some() => {
                    self.on_saved(saved);
                }
                _ = tick.tick() => self.on_tick().await,
                _ = floors.tick() => self.save_floors(),
            }
        }
    }

    /// Waits for what is under way, then leaves the floors as high as they are.
    async fn finish(&mut self, grace: Duration) {
        let deadline = tokio::time::Instant::now() + grace;
        while !self.publishing.is_empty()
            && let Ok(Some(settled)) =
                tokio::time::timeout_at(deadline, self.publishing.next()).await
        {
            if let Some(owned) = self.owned.get_mut(&settled.at)
                && owned.token == settled.token
            {
                owned
                    .machine
                    .on_outcome(settled.offset, settled.outcome, Instant::now());
            }
        }
        if let Some(saving) = self.saving.take()
            && let Ok(saved) = tokio::time::timeout_at(deadline, saving).await
        {
            self.on_saved(saved);
        }
        self.save_floors();
        if let Some(saving) = self.saving.take()
            && tokio::time::timeout_at(deadline, saving).await.is_err()
        {
            info!(
                bridge = self.job.target.bridge,
                "floors not saved at stop; some records will be read again"
            );
        }
    }

    async fn on_events(&mut self, events: &mut Vec<Event>) {
        let mut touched = BTreeSet::new();
        for event in events.drain(..) {
            match event {
                Event::Record {
                    generation,
                    record,
                    grant,
                } if generation == self.generation => {
                    let at = (record.topic.clone(), record.partition);
                    self.on_record(&at, &record, grant);
                    touched.insert(at);
                }
                // Read for an assignment that is over: it is read again if it is still wanted.
                Event::Record { .. } => {}
                Event::Discovered(found) => self.on_discovered(found),
                Event::Expired { at, low } => self.on_expired(&at, low),
                Event::Shrunk { at, high } => self.on_shrunk(&at, high),
                Event::Ends(ends) => {
                    for (at, end) in ends {
                        if let Some(owned) = self.owned.get_mut(&at) {
                            owned.end = Some(end);
                        }
                    }
                }
                Event::Unreachable(reason) => self.on_unreachable(reason),
            }
        }
        for at in touched {
            self.pump(&at).await;
        }
    }

    /// Said once, until it is over.
    fn on_unreachable(&mut self, reason: String) {
        if self.told.as_ref() != Some(&reason) {
            warn!(
                bridge = self.job.target.bridge,
                reason, "kafka cannot be read"
            );
            self.told = Some(reason.clone());
        }
        if self.reading != State::Connecting {
            self.reading = State::Lagging(reason);
        }
    }

    fn on_discovered(&mut self, found: BTreeSet<TopicPartition>) {
        if self.reading != State::Running {
            info!(
                bridge = self.job.target.bridge,
                partitions = found.len(),
                "kafka can be read"
            );
            self.reading = State::Running;
            self.told = None;
        }
        if found != self.discovered {
            self.discovered = found;
            self.reassign();
        }
    }

    fn on_expired(&mut self, at: &TopicPartition, low: i64) {
        let Some(owned) = self.owned.get_mut(at) else {
            return;
        };
        let (bridge, floor) = (&self.job.target.bridge, owned.machine.floor());
        error!(
            bridge,
            topic = at.0,
            partition = at.1,
            ?floor,
            low,
            "kafka's retention passed the bridge: offsets below `low` were gone before they were read"
        );
        owned.machine.skip_to(low);
        self.send_assignment();
    }

    fn on_shrunk(&mut self, at: &TopicPartition, high: i64) {
        if let Some(owned) = self.owned.get_mut(at) {
            let next = owned.machine.next();
            owned.machine.block(format!(
                "the topic ends at offset {high}, before {next:?} where reading should go on: it was created anew or lost records"
            ));
        }
    }

    /// Brings the ownerships in line with slots and topics.
    fn reassign(&mut self) {
        let slots = self.slots.borrow_and_update().clone();
        let epoch_of = |at: &TopicPartition| slots.get(&slot_of(&at.0, at.1)).copied();
        let discovered = &self.discovered;
        let before = self.owned.len();
        self.owned
            .retain(|at, owned| discovered.contains(at) && epoch_of(at) == Some(owned.epoch));
        let mut changed = self.owned.len() != before;
        let floors = self.job.upstream.floors(&self.job.target.bridge);
        for at in discovered {
            let Some(epoch) = epoch_of(at) else { continue };
            if self.owned.contains_key(at) {
                continue;
            }
            changed = true;
            self.generation += 1;
            let durable = floors.get(at).copied();
            let owned = Owned {
                epoch,
                token: self.generation,
                machine: Partition::new(durable, self.limits(1)),
                paused: false,
                durable,
                end: None,
                shown: State::Running,
            };
            self.owned.insert(at.clone(), owned);
        }
        if changed {
            let limits = self.limits(self.owned.len());
            self.owned
                .values_mut()
                .for_each(|owned| owned.machine.set_limits(limits));
            self.send_assignment();
        }
    }

    fn limits(&self, partitions: usize) -> Limits {
        Limits {
            records: self.job.options.inbound_records_max,
            bytes: self.job.options.inbound_bytes_max / (partitions + 1),
        }
    }

    fn send_assignment(&mut self) {
        self.generation += 1;
        let mut partitions = Vec::with_capacity(self.owned.len());
        for (at, owned) in &mut self.owned {
            owned.paused = false;
            partitions.push((at.clone(), owned.machine.next()));
        }
        let generation = self.generation;
        // A reader that is gone is noticed in `run`.
        let _ = self.commands_tx.send(Command::Assign {
            generation,
            partitions,
        });
    }

    fn on_record(&mut self, at: &TopicPartition, record: &Incoming, grant: ByteGrant) {
        let Some(owned) = self.owned.get_mut(at) else {
            return;
        };
        let bytes = record.bytes();
        let work = match record::import(record, &self.job.target.cluster_id) {
            Import::OwnOrigin => Work::Skip,
            Import::Unmappable(reason) => Work::Stop(reason),
            Import::Publish { channel, id, body } => {
                let key = record::channel_key(&self.job.app, channel);
                let shard = self.job.upstream.shard_of(&key);
                let publish = Publish {
                    key,
                    id,
                    count: 1,
                    body,
                    source: Some(entry::Source {
                        bridge: self.job.target.bridge.clone(),
                        topic: at.0.clone(),
                        partition: at.1,
                        offset: record.offset,
                        epoch: owned.epoch,
                        after: None,
                    }),
                    after: None,
                };
                let payload = Arc::new((publish, grant));
                Work::Submit { shard, payload }
            }
        };
        owned.machine.offer(record.offset, bytes, work);
    }

    async fn on_settled(&mut self, settled: Settled) {
        let Some(owned) = self.owned.get_mut(&settled.at) else {
            return;
        };
        if owned.token == settled.token {
            owned
                .machine
                .on_outcome(settled.offset, settled.outcome, Instant::now());
            self.pump(&settled.at).await;
        }
    }

    async fn on_tick(&mut self) {
        let now = Instant::now();
        let due = self
            .owned
            .iter()
            .filter(|(_, o)| o.machine.next_deadline().is_some_and(|d| d <= now));
        let due: Vec<TopicPartition> = due.map(|(at, _)| at.clone()).collect();
        for at in due {
            self.pump(&at).await;
        }
    }

    /// Submits what the partition wants submitted. Each publish is polled once before the next is made, so that it is
    /// under way in its place.
    async fn pump(&mut self, at: &TopicPartition) {
        let Some(owned) = self.owned.get_mut(at) else {
            return;
        };
        while let Some(submission) = owned.machine.poll(Instant::now()) {
            let mut publish = submission.payload.0.clone();
            publish.after = submission.after;
            let mut outcome = self.job.upstream.publish(publish);
            let first = poll_fn(|cx| Poll::Ready(outcome.as_mut().poll(cx))).await;
            match first {
                Poll::Ready(outcome) => {
                    owned
                        .machine
                        .on_outcome(submission.offset, outcome, Instant::now());
                }
                Poll::Pending => {
                    let (at, token, offset) = (at.clone(), owned.token, submission.offset);
                    self.publishing.push(Box::pin(async move {
                        Settled {
                            at,
                            token,
                            offset,
                            outcome: outcome.await,
                        }
                    }));
                }
            }
        }
        let command = if !owned.paused && owned.machine.is_full() {
            Command::Pause(at.clone())
        } else if owned.paused && owned.machine.has_room() {
            Command::Resume(at.clone())
        } else {
            return;
        };
        owned.paused = !owned.paused;
        // A reader that is gone is noticed in `run`.
        let _ = self.commands_tx.send(command);
    }

    /// Offers the floors that moved, one request at a time.
    fn save_floors(&mut self) {
        self.show();
        if self.saving.is_some() {
            return;
        }
        let moved = self.owned.iter().filter_map(|(at, owned)| {
            let offset = owned.machine.floor()?;
            // The floor of a fenced owner is its successor's to move.
            let ours = owned.machine.state() != State::Fenced;
            (ours && Some(offset) > owned.durable).then(|| control::Floor {
                topic: at.0.clone(),
                partition: at.1,
                offset,
                slot: slot_of(&at.0, at.1),
                epoch: owned.epoch,
            })
        });
        let floors: Vec<control::Floor> = moved.collect();
        if floors.is_empty() {
            return;
        }
        let offered = floors
            .iter()
            .map(|f| ((f.topic.clone(), f.partition), (f.epoch, f.offset)));
        self.offered = offered.collect();
        self.saving = Some(
            self.job
                .upstream
                .advance_floors(&self.job.target.bridge, floors),
        );
    }

    fn on_saved(&mut self, saved: Result<(), String>) {
        self.saving = None;
        let offered = std::mem::take(&mut self.offered);
        if let Err(reason) = saved {
            warn!(bridge = self.job.target.bridge, reason, "floors not saved");
            return;
        }
        for (at, (epoch, offset)) in offered {
            if let Some(owned) = self.owned.get_mut(&at)
                && owned.epoch == epoch
            {
                owned.durable = owned.durable.max(Some(offset));
            }
        }
    }

    /// Tells operators where it stands; a change of state goes to the log too.
    fn show(&mut self) {
        let bridge = self.job.target.bridge.as_str();
        let mut partitions = Vec::with_capacity(self.owned.len());
        for ((topic, partition), owned) in &mut self.owned {
            let state = owned.machine.state();
            if state != owned.shown {
                match state {
                    State::Blocked(_) => error!(bridge, topic, partition, %state, "import"),
                    _ => warn!(bridge, topic, partition, %state, "import"),
                }
                owned.shown = state.clone();
            }
            let (floor, counters) = (owned.machine.floor(), owned.machine.counters());
            partitions.push(PartitionStatus {
                topic: topic.clone(),
                partition: *partition,
                epoch: owned.epoch,
                state,
                floor,
                end: owned.end,
                lag: owned.end.map(|end| (end - floor.unwrap_or(0)).max(0)),
                in_flight: owned.machine.in_flight(),
                stored: counters.stored,
                duplicates: counters.duplicates,
                skipped: counters.skipped,
                retries: counters.retries,
            });
        }
        let mut shown = self
            .job
            .shown
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        shown.reading = self.reading.clone();
        shown.partitions = partitions;
    }
}
