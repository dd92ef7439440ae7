//! The thread of one shard on its way out: does what `outbound::Exporter` says with a transactional producer.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Message as _, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::{Offset, TopicPartitionList};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::bridge::cursor::Cursor;
use crate::bridge::kafka::{self, Context, Target};
use crate::bridge::options::Options;
use crate::bridge::outbound::{Batch, Exporter, Fault, Limits, Step};
use crate::bridge::record::{ExportRule, Outgoing};
use crate::bridge::status::{ShardStatus, State};
use crate::bridge::upstream::Upstream;
use crate::types::ShardId;

/// Log bytes read at a time.
const PAGE_BYTES: usize = 1 << 20;
/// Longest wait for the log before the producer is polled again.
const LOOK_AROUND: Duration = Duration::from_secs(1);
/// Offsets looked at first when the newest cursor is searched for, from the end; then twice as many.
const CURSOR_WINDOW: i64 = 64;

/// What an exporter thread is for.
pub(super) struct Job {
    pub(super) upstream: Arc<dyn Upstream>,
    pub(super) options: Arc<Options>,
    pub(super) target: Target,
    pub(super) rule: ExportRule,
    pub(super) shard: ShardId,
    /// The leadership's term, changing when leadership was lost and won in one look.
    pub(super) term: watch::Receiver<u64>,
    pub(super) status: Arc<Mutex<ShardStatus>>,
    pub(super) runtime: Handle,
}

/// Runs until stopped; an open transaction is finished first.
pub(super) fn run(job: Job, stop: CancellationToken) {
    let limits = Limits {
        open_for: Duration::from_millis(job.options.transaction_ms),
        bytes: job.options.transaction_bytes,
        idle_entries: job.options.idle_entries,
        fenced_pause: Duration::from_millis(job.options.fenced_pause_ms),
    };
    let mut driver = Driver {
        exporter: Exporter::new(limits, Instant::now()),
        applied: job.upstream.applied(job.shard),
        producer: None,
        shown: State::Connecting,
        told: None,
        job,
        stop,
    };
    driver.run();
}

struct Driver {
    job: Job,
    stop: CancellationToken,
    exporter: Exporter<Outgoing>,
    applied: watch::Receiver<u64>,
    producer: Option<BaseProducer<Context>>,
    shown: State,
    told: Option<Fault>,
}

impl Driver {
    fn run(&mut self) {
        let mut stopping: Option<Instant> = None;
        loop {
            if self.stop.is_cancelled() {
                let since = *stopping.get_or_insert_with(Instant::now);
                if self.exporter.is_settled() || since.elapsed() > self.job.options.stop_timeout() {
                    break;
                }
            }
            let step = self.exporter.step(Instant::now());
            if let Err(fault) = self.take(step) {
                self.log(&fault);
                self.exporter.on_fault(fault);
            }
            self.show();
        }
        if !self.exporter.is_settled()
            && let Err(fault) = self.abort()
        {
            // Harmless: Kafka aborts it when the successor opens, or when it times out.
            warn!(shard = %self.job.shard, ?fault, "transaction left open at stop");
        }
        self.producer = None;
    }

    /// Each kind of trouble once, until it is over.
    fn log(&mut self, fault: &Fault) {
        let (bridge, shard) = (self.job.target.bridge.as_str(), self.job.shard.0);
        if self.told.as_ref() == Some(fault) {
            debug!(bridge, shard, ?fault, "export");
        } else {
            warn!(bridge, shard, ?fault, "export");
            self.told = Some(fault.clone());
        }
    }

    fn take(&mut self, step: Step<Outgoing>) -> Result<(), Fault> {
        match step {
            Step::Sleep(pause) => self.sleep(pause),
            Step::Open => {
                let cursor = self.open()?;
                self.exporter.on_open(cursor);
                self.say_exported();
            }
            Step::Read { after, wait } => {
                if let Some(batch) = self.read(after, wait)? {
                    self.exporter.on_read(batch);
                }
            }
            Step::Begin => {
                self.producer()?.context().take_undelivered();
                let begun = self.producer()?.begin_transaction();
                begun.map_err(|err| self.explain(kafka::fault(&err)))?;
                self.exporter.on_begin(Instant::now());
            }
            Step::Produce(records) => {
                for record in &records {
                    self.produce(record)?;
                }
                self.exporter.on_produce();
            }
            Step::Commit(cursor) => {
                self.produce_cursor(cursor)?;
                self.commit()?;
                self.exporter.on_commit();
                self.say_exported();
            }
            Step::CommitAgain => {
                self.commit()?;
                self.exporter.on_commit();
                self.say_exported();
            }
            Step::Abort => {
                self.abort()?;
                self.exporter.on_abort();
            }
            Step::Close => {
                self.producer = None;
                self.exporter.on_close();
            }
        }
        Ok(())
    }

    /// Lets the log go of what Kafka has.
    fn say_exported(&self) {
        let (job, through) = (&self.job, self.exporter.committed_through());
        job.upstream
            .exported(job.shard, &job.target.bridge, through);
    }

    fn producer(&self) -> Result<&BaseProducer<Context>, Fault> {
        let lost = || Fault::Fatal("no producer".into());
        self.producer.as_ref().ok_or_else(lost)
    }

    /// Cut short by a stop or a new term; both may mean that waiting has lost its reason.
    fn sleep(&mut self, pause: Duration) {
        let (stop, term) = (&self.stop, &mut self.job.term);
        self.job.runtime.block_on(async {
            tokio::select! {
                () = stop.cancelled() => {}
                // An error means that nobody will ever change it: sleep on.
                Ok(()) = term.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        });
    }

    fn read(&mut self, after: u64, wait: bool) -> Result<Option<Batch<Outgoing>>, Fault> {
        if wait {
            let (stop, applied) = (&self.stop, &mut self.applied);
            self.job.runtime.block_on(async {
                tokio::select! {
                    () = stop.cancelled() => {}
                    _ = applied.wait_for(|applied| *applied > after) => {}
                    () = tokio::time::sleep(LOOK_AROUND) => {}
                }
            });
            if let Some(producer) = &self.producer {
                producer.poll(Duration::ZERO);
            }
        }
        if *self.applied.borrow() <= after {
            let nothing = Batch {
                records: Vec::new(),
                bytes: 0,
                through: after,
                incarnation: None,
            };
            return Ok((!wait).then_some(nothing));
        }
        let page = self
            .job
            .upstream
            .read_shard(self.job.shard, after, PAGE_BYTES);
        let timeout = self.job.options.request_timeout();
        let page = (self.job.runtime)
            .block_on(async { tokio::time::timeout(timeout, page).await })
            .map_err(|_| Fault::Retry("the log was not read in time".into()))?
            .map_err(Fault::Retry)?;
        let mut records = Vec::new();
        for (serial, stamp_ms, publish) in &page.records {
            let exported = self.job.rule.export(*serial, *stamp_ms, publish);
            records.extend(exported.map_err(Fault::Blocked)?);
        }
        Ok(Some(Batch {
            bytes: records.iter().map(Outgoing::bytes).sum(),
            records,
            through: page.through,
            incarnation: Some(page.incarnation),
        }))
    }

    /// Shuts out the former producer first, then reads where it ended.
    fn open(&mut self) -> Result<Option<Cursor>, Fault> {
        let Job {
            options, target, ..
        } = &self.job;
        let context = Context::new(&target.bridge);
        let producer: BaseProducer<Context> = target
            .producer(options, self.job.shard.0)
            .create_with_context(context)
            .map_err(|err| kafka::fault(&err))?;
        let producer = self.producer.insert(producer);
        // Not by name: asking a producer about a topic by name may create it, with the wrong settings.
        let metadata = producer
            .client()
            .fetch_metadata(None, options.request_timeout())
            .map_err(|err| kafka::fault(&err))?;
        let topic = target.cursor_topic();
        let found = metadata.topics().iter().find(|t| t.name() == topic);
        let partitions = found.map(|t| t.partitions().len());
        match partitions {
            None => self.create_cursor_topic(&topic)?,
            Some(n) if n <= self.job.shard.0 as usize => {
                return Err(Fault::Blocked(format!(
                    "topic `{topic}` has {n} partitions, too few for shard {}",
                    self.job.shard
                )));
            }
            Some(_) => {}
        }
        // A former producer's transaction may have to be ended first; this call waits for that.
        let init = self
            .producer()?
            .init_transactions(options_init(&self.job.options));
        init.map_err(|err| kafka::fault(&err))?;
        self.read_cursor(&topic)
    }

    fn create_cursor_topic(&self, topic: &str) -> Result<(), Fault> {
        let options = &self.job.options;
        let admin: AdminClient<DefaultClientContext> = (self.job.target.admin(options))
            .create()
            .map_err(|err| kafka::fault(&err))?;
        let partitions = i32::try_from(self.job.upstream.shards()).unwrap_or(i32::MAX);
        let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(-1))
            .set("cleanup.policy", "compact");
        let limits = AdminOptions::new().operation_timeout(Some(options.request_timeout()));
        let created = admin.create_topics([&new], &limits);
        let timeout = options.request_timeout() * 2;
        let created = (self.job.runtime)
            .block_on(async { tokio::time::timeout(timeout, created).await })
            .map_err(|_| Fault::Retry(format!("topic `{topic}` was not created in time")))?
            .map_err(|err| kafka::fault(&err))?;
        match created.into_iter().next() {
            Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => Ok(()),
            Some(Err((_, code))) => Err(Fault::Blocked(format!(
                "topic `{topic}` could not be created: {code}"
            ))),
            Some(Ok(_)) | None => {
                info!(topic, "created the topic that keeps cursors");
                Ok(())
            }
        }
    }

    /// The newest committed cursor of this shard's partition.
    ///
    /// Read until two passes agree: a partition leader elected between the look at the end and the fetch may report
    /// an end that is too early for a moment, but not to the look that follows (KIP-207).
    fn read_cursor(&self, topic: &str) -> Result<Option<Cursor>, Fault> {
        let Job {
            options, target, ..
        } = &self.job;
        let consumer: BaseConsumer<Context> = (target.consumer(options))
            .set("enable.partition.eof", "true")
            .create_with_context(Context::new(&target.bridge))
            .map_err(|err| kafka::fault(&err))?;
        let mut before = self.look_for_cursor(&consumer, topic)?;
        loop {
            let now = self.look_for_cursor(&consumer, topic)?;
            if now == before {
                return Ok(now);
            }
            before = now;
        }
    }

    /// Reads backwards in growing steps, as a long tail of transaction markers and aborted records may lie behind the
    /// newest cursor.
    fn look_for_cursor(
        &self,
        consumer: &BaseConsumer<Context>,
        topic: &str,
    ) -> Result<Option<Cursor>, Fault> {
        let partition = i32::try_from(self.job.shard.0).unwrap_or(i32::MAX);
        let timeout = self.job.options.request_timeout();
        let (low, high) = consumer
            .fetch_watermarks(topic, partition, timeout)
            .map_err(|err| Fault::Retry(err.to_string()))?;
        let mut window = CURSOR_WINDOW;
        loop {
            let start = low.max(high.saturating_sub(window));
            let newest = newest_value(consumer, topic, partition, start, timeout)?;
            if let Some(value) = newest {
                let cursor = Cursor::decode(&value);
                return cursor
                    .map(Some)
                    .map_err(|err| Fault::Blocked(err.to_string()));
            }
            if start <= low {
                return Ok(None);
            }
            window = window.saturating_mul(8);
        }
    }

    fn produce(&self, record: &Outgoing) -> Result<(), Fault> {
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (key, value) in &record.headers {
            let value = Some(value.as_str());
            headers = headers.insert(Header { key, value });
        }
        let mut sent = BaseRecord::to(&record.topic)
            .headers(headers)
            .timestamp(record.timestamp_ms);
        sent.key = record.key.as_deref();
        sent.payload = record.value.as_deref();
        // Without a key Kafka would scatter the channel over partitions, and its order would be lost.
        sent.partition = record.key.is_none().then_some(0);
        self.send(sent)
    }

    fn produce_cursor(&self, cursor: Cursor) -> Result<(), Fault> {
        let topic = self.job.target.cursor_topic();
        let (key, value) = (self.job.shard.to_string(), cursor.encode());
        let mut record = BaseRecord::to(&topic)
            .key(key.as_str())
            .payload(value.as_bytes());
        record.partition = Some(i32::try_from(self.job.shard.0).unwrap_or(i32::MAX));
        self.send(record)
    }

    /// Hands a record to librdkafka; a full queue is waited for.
    fn send(&self, mut record: BaseRecord<'_, str, [u8]>) -> Result<(), Fault> {
        let producer = self.producer()?;
        let deadline = Instant::now() + self.job.options.request_timeout();
        loop {
            let Err((error, back)) = producer.send(record) else {
                return Ok(());
            };
            let full = error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull);
            if !full {
                return Err(self.explain(kafka::undelivered(back.topic, &error)));
            }
            if Instant::now() > deadline {
                return Err(Fault::Abort("kafka takes records too slowly".into()));
            }
            producer.poll(Duration::from_millis(1));
            record = back;
        }
    }

    /// A failed call often only says that the transaction is lost; the first undelivered record says why.
    fn explain(&self, fault: Fault) -> Fault {
        let Some(producer) = &self.producer else {
            return fault;
        };
        if matches!(fault, Fault::Fenced) {
            return fault;
        }
        if let Some((code, why)) = producer.client().fatal_error() {
            let fenced = [
                RDKafkaErrorCode::Fenced,
                RDKafkaErrorCode::ProducerFenced,
                RDKafkaErrorCode::InvalidProducerEpoch,
            ];
            return match fenced.contains(&code) {
                true => Fault::Fenced,
                false => Fault::Fatal(why),
            };
        }
        match producer.context().take_undelivered() {
            Some((topic, error)) => kafka::undelivered(&topic, &error),
            None => fault,
        }
    }

    fn commit(&self) -> Result<(), Fault> {
        let producer = self.producer()?;
        let timeout = self.job.options.request_timeout();
        let deadline = Instant::now() + timeout;
        // The library's own flush polls in steps of 100 ms; this one ends with the last delivery.
        while producer.in_flight_count() > 0 {
            producer.poll(Duration::from_millis(1));
            if Instant::now() > deadline {
                return Err(Fault::Retry("records are not delivered yet".into()));
            }
        }
        if let Some((topic, error)) = producer.context().take_undelivered() {
            return Err(self.explain(kafka::undelivered(&topic, &error)));
        }
        let committed = producer.commit_transaction(timeout);
        committed.map_err(|err| self.explain(kafka::fault(&err)))
    }

    /// In short tries: the library waits for deliveries that only polling here lets happen.
    fn abort(&self) -> Result<(), Fault> {
        let producer = self.producer()?;
        let deadline = Instant::now() + self.job.options.request_timeout();
        loop {
            let Err(error) = producer.abort_transaction(Duration::from_millis(50)) else {
                producer.context().take_undelivered();
                return Ok(());
            };
            let fault = kafka::fault(&error);
            if !matches!(fault, Fault::Retry(_)) {
                return Err(match self.explain(fault) {
                    Fault::Fenced => Fault::Fenced,
                    _ => Fault::Fatal(error.to_string()),
                });
            }
            if Instant::now() > deadline {
                return Err(fault);
            }
            producer.poll(Duration::from_millis(10));
        }
    }

    /// Tells operators where it stands; a change of state goes to the log too.
    fn show(&mut self) {
        let state = self.exporter.state();
        if *state != self.shown {
            let (bridge, shard) = (self.job.target.bridge.as_str(), self.job.shard.0);
            match state {
                State::Blocked(_) => error!(bridge, shard, %state, "export"),
                State::Running => {
                    info!(bridge, shard, %state, "export");
                    self.told = None;
                }
                // Said when it happened.
                State::Connecting | State::Lagging(_) | State::Fenced => {}
            }
            self.shown = state.clone();
        }
        let counters = self.exporter.counters();
        let status = ShardStatus {
            shard: self.job.shard.0,
            term: *self.job.term.borrow(),
            state: state.clone(),
            cursor: self.exporter.done_through(),
            records: counters.records,
            transactions: counters.transactions,
            aborts: counters.aborts,
            rebuilds: counters.rebuilds,
            // Filled in when somebody asks.
            ..ShardStatus::default()
        };
        let mut shown = self
            .job
            .status
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *shown != status {
            debug!(?status, "export");
            *shown = status;
        }
    }
}

/// Ending a former producer's transaction takes Kafka longer than an ordinary answer.
fn options_init(options: &Options) -> Duration {
    options.request_timeout() * 3
}

/// The value of the last committed record with one, from `start` to the partition's end.
fn newest_value(
    consumer: &BaseConsumer<Context>,
    topic: &str,
    partition: i32,
    start: i64,
    timeout: Duration,
) -> Result<Option<Vec<u8>>, Fault> {
    let mut assignment = TopicPartitionList::new();
    assignment
        .add_partition_offset(topic, partition, Offset::Offset(start))
        // Emptied first, so that nothing of a former pass is left in its queues.
        .and_then(|()| consumer.unassign())
        .and_then(|()| consumer.assign(&assignment))
        .map_err(|err| Fault::Retry(err.to_string()))?;
    let mut newest = None;
    let mut deadline = Instant::now() + timeout * 2;
    loop {
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(record)) => {
                deadline = Instant::now() + timeout * 2;
                if let Some(value) = record.payload() {
                    newest = Some(value.to_vec());
                }
            }
            Some(Err(KafkaError::PartitionEOF(_))) => return Ok(newest),
            Some(Err(err)) => debug!(%err, "while reading the cursor"),
            None => {}
        }
        if Instant::now() > deadline {
            return Err(Fault::Retry("the cursor was not read in time".into()));
        }
    }
}
