//! The thread that reads a bridge's partitions from Kafka and hands records over, as far as a byte budget allows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc as std_mpsc;
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Headers as _, Message as _};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::bridge::kafka::{Context, Target, TopicPartition};
use crate::bridge::mapping;
use crate::bridge::options::Options;
use crate::bridge::record::Incoming;
use crate::stdx::{Backoff, ByteBudget, ByteGrant};

/// Longest wait for Kafka before commands are looked at.
const POLL: Duration = Duration::from_millis(20);

/// What the importer asks for.
#[derive(Debug)]
pub(super) enum Command {
    /// Read exactly these from now on, from the offset or from the earliest. Records that follow carry `generation`.
    Assign {
        generation: u64,
        partitions: Vec<(TopicPartition, Option<i64>)>,
    },
    Pause(TopicPartition),
    Resume(TopicPartition),
}

/// What the reader found.
#[derive(Debug)]
pub(super) enum Event {
    /// All partitions that take part in the convention.
    Discovered(BTreeSet<TopicPartition>),
    Record {
        generation: u64,
        record: Incoming,
        grant: ByteGrant,
    },
    /// Kafka no longer holds what lies below `low`, where reading should have gone on.
    Expired {
        at: TopicPartition,
        low: i64,
    },
    /// The partition ends before the place where reading should have gone on: it is not what it was.
    Shrunk {
        at: TopicPartition,
        high: i64,
    },
    Ends(BTreeMap<TopicPartition, i64>),
    Unreachable(String),
}

/// What a reader thread is for.
pub(super) struct Job {
    pub(super) options: Arc<Options>,
    pub(super) target: Target,
    pub(super) budget: ByteBudget,
    pub(super) events_tx: mpsc::Sender<Event>,
    pub(super) commands_rx: std_mpsc::Receiver<Command>,
}

/// Runs until stopped or until nobody takes its events.
pub(super) fn run(job: Job, stop: CancellationToken) {
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    let consumer = loop {
        let context = Context::new(&job.target.bridge);
        match (job.target.consumer(&job.options)).create_with_context(context) {
            Ok(consumer) => break consumer,
            Err(err) => {
                let reason = err.to_string();
                warn!(bridge = job.target.bridge, reason, "no kafka consumer");
                let pause = backoff.pause();
                if job
                    .events_tx
                    .blocking_send(Event::Unreachable(reason))
                    .is_err()
                    || pause_or_stopped(pause, &stop)
                {
                    return;
                }
            }
        }
    };
    let mut reader = Reader {
        job,
        stop,
        consumer,
        generation: 0,
        positions: BTreeMap::new(),
    };
    reader.run();
}

/// Whether it was stopped meanwhile.
fn pause_or_stopped(pause: Duration, stop: &CancellationToken) -> bool {
    let until = Instant::now() + pause;
    while Instant::now() < until && !stop.is_cancelled() {
        std::thread::sleep(Duration::from_millis(20));
    }
    stop.is_cancelled()
}

/// The importer is gone.
struct Abandoned;

struct Reader {
    job: Job,
    stop: CancellationToken,
    consumer: BaseConsumer<Context>,
    generation: u64,
    /// What is assigned, and where reading goes on.
    positions: BTreeMap<TopicPartition, Option<i64>>,
}

impl Reader {
    fn run(&mut self) {
        let mut discover_at = Instant::now();
        while !self.stop.is_cancelled() {
            let done = if discover_at <= Instant::now() {
                discover_at = Instant::now() + Duration::from_millis(self.job.options.discovery_ms);
                self.discover()
            } else {
                self.read()
            };
            if done.is_err() {
                break;
            }
            self.obey();
        }
    }

    fn tell(&self, event: Event) -> Result<(), Abandoned> {
        (self.job.events_tx)
            .blocking_send(event)
            .map_err(|_| Abandoned)
    }

    fn discover(&self) -> Result<(), Abandoned> {
        let metadata = self
            .consumer
            .fetch_metadata(None, self.job.options.request_timeout());
        let metadata = match metadata {
            Ok(metadata) => metadata,
            Err(err) => return self.tell(Event::Unreachable(err.to_string())),
        };
        let mirrored = metadata.topics().iter().filter(|topic| {
            // Without a healthy answer nothing is known about its partitions; ask again later.
            topic.error().is_none() && mapping::is_mirrored_topic(topic.name())
        });
        let found = mirrored
            .flat_map(|t| (t.partitions().iter()).map(|p| (t.name().to_owned(), p.id())))
            .collect();
        self.tell(Event::Discovered(found))?;
        let ends = self.consumer.context().take_ends();
        match ends.is_empty() {
            true => Ok(()),
            false => self.tell(Event::Ends(ends)),
        }
    }

    fn read(&mut self) -> Result<(), Abandoned> {
        let record = match self.consumer.poll(POLL) {
            None => return Ok(()),
            Some(Ok(message)) => incoming(&message),
            Some(Err(err))
                if err.rdkafka_error_code() == Some(RDKafkaErrorCode::AutoOffsetReset) =>
            {
                return self.find_out_of_range();
            }
            Some(Err(KafkaError::MessageConsumptionFatal(code))) => {
                warn!(bridge = self.job.target.bridge, %code, "kafka consumer failed for good");
                return Err(Abandoned);
            }
            Some(Err(err)) => {
                // librdkafka goes on by itself; discovery tells when Kafka is away.
                debug!(bridge = self.job.target.bridge, %err, "kafka consumer");
                return Ok(());
            }
        };
        let (generation, bytes) = (self.generation, record.bytes());
        let grant = loop {
            if let Some(grant) = self.job.budget.try_take(bytes) {
                break grant;
            }
            std::thread::sleep(Duration::from_millis(2));
            self.obey();
            // A new assignment reads this record again if it is still wanted.
            if self.stop.is_cancelled() || self.generation != generation {
                return Ok(());
            }
        };
        let at = (record.topic.clone(), record.partition);
        self.positions.insert(at, Some(record.offset + 1));
        self.tell(Event::Record {
            generation,
            record,
            grant,
        })
    }

    /// librdkafka says that some partition's offset does not exist, not which one.
    fn find_out_of_range(&self) -> Result<(), Abandoned> {
        for (at, next) in &self.positions {
            let Some(next) = *next else { continue };
            let timeout = self.job.options.request_timeout();
            match self.consumer.fetch_watermarks(&at.0, at.1, timeout) {
                Ok((low, _)) if next < low => {
                    let at = at.clone();
                    self.tell(Event::Expired { at, low })?;
                }
                Ok((_, high)) if next > high => {
                    let at = at.clone();
                    self.tell(Event::Shrunk { at, high })?;
                }
                Ok(_) => {}
                Err(err) => debug!(topic = at.0, partition = at.1, %err, "watermarks"),
            }
        }
        Ok(())
    }

    fn obey(&mut self) {
        while let Ok(command) = self.job.commands_rx.try_recv() {
            let done = match command {
                Command::Assign {
                    generation,
                    partitions,
                } => {
                    self.generation = generation;
                    self.assign(partitions)
                }
                Command::Pause(at) => self.consumer.pause(&list([(&at, None)])),
                Command::Resume(at) => self.consumer.resume(&list([(&at, None)])),
            };
            if let Err(err) = done {
                // Pausing is an optimisation: the budget holds without it. A failed assignment shows as lag.
                warn!(bridge = self.job.target.bridge, %err, "kafka consumer");
            }
        }
    }

    fn assign(&mut self, partitions: Vec<(TopicPartition, Option<i64>)>) -> KafkaResult<()> {
        self.positions = partitions.into_iter().collect();
        // Emptied first, so that nothing fetched for the former assignment is left in its queues.
        self.consumer.unassign()?;
        let all = list(self.positions.iter().map(|(at, next)| (at, *next)));
        self.consumer.assign(&all)?;
        self.consumer.resume(&all)
    }
}

fn list<'a>(
    partitions: impl IntoIterator<Item = (&'a TopicPartition, Option<i64>)>,
) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for ((topic, partition), offset) in partitions {
        let offset = offset.map_or(Offset::Beginning, Offset::Offset);
        if let Err(err) = list.add_partition_offset(topic, *partition, offset) {
            warn!(topic, partition, %err, "offset not accepted");
        }
    }
    list
}

fn incoming(message: &BorrowedMessage<'_>) -> Incoming {
    let headers = message.headers().map(|headers| {
        let owned = |h: rdkafka::message::Header<'_, &[u8]>| {
            (h.key.to_owned(), h.value.map(<[u8]>::to_vec))
        };
        headers.iter().map(owned).collect()
    });
    Incoming {
        topic: message.topic().to_owned(),
        partition: message.partition(),
        offset: message.offset(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers: headers.unwrap_or_default(),
    }
}
