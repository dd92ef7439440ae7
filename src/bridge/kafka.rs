//! librdkafka's settings, errors and callbacks, in this room's terms.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::Message as _;
use rdkafka::producer::{DeliveryResult, ProducerContext};
use rdkafka::statistics::Statistics;
use tracing::{debug, info, warn};

use crate::bridge::options::Options;
use crate::bridge::outbound::Fault;

/// A topic and one of its partitions.
pub(super) type TopicPartition = (String, i32);

/// Where one client of one bridge reaches Kafka.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) bootstrap_servers: String,
    pub(super) cluster_id: String,
    pub(super) bridge: String,
}

impl Target {
    fn base(&self, options: &Options) -> ClientConfig {
        let mut config = ClientConfig::new();
        for (name, value) in &options.client {
            config.set(name, value);
        }
        config
            .set("bootstrap.servers", &self.bootstrap_servers)
            .set("client.id", format!("firth-{}", self.bridge))
            .set("socket.keepalive.enable", "true")
            .set("reconnect.backoff.max.ms", "2000")
            .set("log.connection.close", "false")
            .set_log_level(RDKafkaLogLevel::Warning);
        config
    }

    /// Reads committed records from offsets it is given; never commits, never resets an offset by itself.
    pub(super) fn consumer(&self, options: &Options) -> ClientConfig {
        let mut config = self.base(options);
        config
            // Needed for assigning by hand; nothing is ever committed to it.
            .set(
                "group.id",
                format!("firth-{}-{}", self.cluster_id, self.bridge),
            )
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("isolation.level", "read_committed")
            .set("auto.offset.reset", "error")
            .set("allow.auto.create.topics", "false")
            .set("check.crcs", "true")
            .set("statistics.interval.ms", "2000")
            .set("fetch.wait.max.ms", "100")
            .set("fetch.queue.backoff.ms", "50")
            .set("queued.max.messages.kbytes", "16384");
        config
    }

    /// The one producer of a shard: its transactional id shuts out the former one.
    pub(super) fn producer(&self, options: &Options, shard: u32) -> ClientConfig {
        let mut config = self.base(options);
        let id = format!("firth-{}-{}-{shard}", self.cluster_id, self.bridge);
        let ms = |ms: u64| ms.to_string();
        config
            .set("transactional.id", id)
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("transaction.timeout.ms", ms(options.transaction_timeout_ms))
            .set("message.timeout.ms", ms(options.delivery_timeout_ms))
            // A topic that is still unknown then does not exist: say that rather than "timed out".
            .set(
                "topic.metadata.propagation.max.ms",
                ms(options.delivery_timeout_ms / 2),
            )
            .set("linger.ms", "1")
            .set("compression.type", "lz4")
            // As Java's producers do, so that one key is in one partition whoever wrote it.
            .set("partitioner", "murmur2_random")
            // Kafka, not the client, decides what is too large; batches stay below Kafka's default.
            .set("message.max.bytes", "16777216")
            .set("batch.size", "900000")
            .set("queue.buffering.max.kbytes", "65536");
        config
    }

    pub(super) fn admin(&self, options: &Options) -> ClientConfig {
        self.base(options)
    }

    pub(super) fn cursor_topic(&self) -> String {
        let prefix = crate::bridge::mapping::CURSOR_TOPIC_PREFIX;
        format!("{prefix}{}-{}", self.cluster_id, self.bridge)
    }
}

/// Receives what librdkafka says on its own account.
#[derive(Debug, Default)]
pub(super) struct Context {
    bridge: String,
    undelivered: Mutex<Option<(String, KafkaError)>>,
    ends: Mutex<BTreeMap<TopicPartition, i64>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Context {
    pub(super) fn new(bridge: &str) -> Self {
        Self {
            bridge: bridge.to_owned(),
            ..Self::default()
        }
    }

    /// The first record that could not be delivered since last asked: its topic and why.
    pub(super) fn take_undelivered(&self) -> Option<(String, KafkaError)> {
        lock(&self.undelivered).take()
    }

    /// Ends of partitions heard of since last asked: the first offset that is not there or not committed.
    pub(super) fn take_ends(&self) -> BTreeMap<TopicPartition, i64> {
        std::mem::take(&mut lock(&self.ends))
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        let bridge = self.bridge.as_str();
        match level {
            RDKafkaLogLevel::Info => info!(bridge, fac, "{message}"),
            RDKafkaLogLevel::Debug => debug!(bridge, fac, "{message}"),
            _ => warn!(bridge, fac, "{message}"),
        }
    }

    /// librdkafka goes on by itself after these; the calls that fail in earnest say so.
    fn error(&self, error: KafkaError, reason: &str) {
        debug!(bridge = self.bridge, %error, reason, "kafka client");
    }

    fn stats(&self, statistics: Statistics) {
        let mut ends = lock(&self.ends);
        for (name, topic) in statistics.topics {
            for (partition, p) in topic.partitions {
                if p.ls_offset >= 0 {
                    ends.insert((name.clone(), partition), p.ls_offset);
                }
            }
        }
    }
}

impl ConsumerContext for Context {}

impl ProducerContext for Context {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, record)) = result {
            let topic = || record.topic().to_owned();
            lock(&self.undelivered).get_or_insert_with(|| (topic(), error.clone()));
        }
    }
}

/// What a failed call asks for.
pub(super) fn fault(error: &KafkaError) -> Fault {
    let why = error.to_string();
    if let Some(fault) = error
        .rdkafka_error_code()
        .and_then(|code| by_code(code, &why))
    {
        return fault;
    }
    match error {
        KafkaError::Transaction(e) if e.is_fatal() => Fault::Fatal(why),
        KafkaError::Transaction(e) if e.txn_requires_abort() => Fault::Abort(why),
        KafkaError::Transaction(e) if e.is_retriable() => Fault::Retry(why),
        // Neither: the call did not fit the producer's state, so what that is is not known here.
        KafkaError::Transaction(_) | KafkaError::Nul(_) => Fault::Fatal(why),
        KafkaError::ClientConfig(..) | KafkaError::ClientCreation(_) => Fault::Blocked(why),
        KafkaError::MessageProduction(_) => Fault::Abort(why),
        _ => Fault::Retry(why),
    }
}

/// What a record that could not be delivered asks for.
pub(super) fn undelivered(topic: &str, error: &KafkaError) -> Fault {
    match fault(error) {
        Fault::Blocked(why) => Fault::Blocked(format!("topic `{topic}`: {why}")),
        Fault::Retry(why) | Fault::Abort(why) => Fault::Abort(format!("topic `{topic}`: {why}")),
        other => other,
    }
}

fn by_code(code: RDKafkaErrorCode, why: &str) -> Option<Fault> {
    use RDKafkaErrorCode as Code;
    match code {
        Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch => Some(Fault::Fenced),
        Code::Fatal => Some(Fault::Fatal(why.to_owned())),
        Code::MessageSizeTooLarge
        | Code::UnknownTopic
        | Code::UnknownPartition
        | Code::UnknownTopicOrPartition
        | Code::InvalidTopic
        | Code::InvalidRecord
        | Code::PolicyViolation
        | Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed => Some(Fault::Blocked(why.to_owned())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_sorted_by_what_they_ask_for() {
        use RDKafkaErrorCode as Code;
        let produced = |code| undelivered("t", &KafkaError::MessageProduction(code));
        assert_eq!(produced(Code::ProducerFenced), Fault::Fenced);
        assert!(matches!(produced(Code::MessageTimedOut), Fault::Abort(_)));
        assert!(matches!(produced(Code::Fatal), Fault::Fatal(_)));
        let Fault::Blocked(why) = produced(Code::UnknownTopic) else {
            panic!("not blocked");
        };
        assert!(why.starts_with("topic `t`: "), "{why}");
        let unreachable = KafkaError::MetadataFetch(Code::BrokerTransportFailure);
        assert!(matches!(fault(&unreachable), Fault::Retry(_)));
    }
}
