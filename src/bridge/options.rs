//! What an operator may set about all bridges of a node.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Settings of the bridge room. The defaults suit a Kafka in the same region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// librdkafka properties for every client, such as `security.protocol`. What exactly-once depends on (isolation,
    /// idempotence, offsets) is set after them and wins.
    pub client: BTreeMap<String, String>,
    /// Bytes read from Kafka and not yet in their channels, per bridge.
    pub inbound_bytes_max: usize,
    /// Records of one partition in the same state.
    pub inbound_records_max: usize,
    /// How often topics and partitions are looked for.
    pub discovery_ms: u64,
    /// How often floors are made durable.
    pub floor_ms: u64,
    /// Longest a transaction stays open while there is more to export.
    pub transaction_ms: u64,
    /// Bytes after which a transaction is committed.
    pub transaction_bytes: usize,
    /// Kafka aborts the transaction of a producer that is silent for so long.
    pub transaction_timeout_ms: u64,
    /// A record not delivered for so long aborts its transaction; below `transaction_timeout_ms`.
    pub delivery_timeout_ms: u64,
    /// Longest a thread waits for one answer of Kafka before it looks around.
    pub request_timeout_ms: u64,
    /// Longest a stop waits for open transactions and running publishes.
    pub stop_ms: u64,
    /// Pause of a fenced exporter that still leads its shard.
    pub fenced_pause_ms: u64,
    /// Log entries with nothing to export after which the cursor is committed alone.
    pub idle_entries: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            client: BTreeMap::new(),
            inbound_bytes_max: 32 << 20,
            inbound_records_max: 4096,
            discovery_ms: 3000,
            floor_ms: 500,
            transaction_ms: 100,
            transaction_bytes: 4 << 20,
            transaction_timeout_ms: 30_000,
            delivery_timeout_ms: 20_000,
            request_timeout_ms: 3000,
            stop_ms: 3000,
            fenced_pause_ms: 5000,
            idle_entries: 10_000,
        }
    }
}

/// Settings that contradict each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOptions {
    #[error("delivery_timeout_ms must be below transaction_timeout_ms")]
    DeliveryTimeout,
    #[error("{0} must be above 0")]
    Zero(&'static str),
}

impl Options {
    /// # Errors
    /// When settings contradict each other; the error names them.
    pub fn validate(&self) -> Result<(), InvalidOptions> {
        if self.delivery_timeout_ms >= self.transaction_timeout_ms {
            return Err(InvalidOptions::DeliveryTimeout);
        }
        let positive = [
            ("inbound_bytes_max", self.inbound_bytes_max as u64),
            ("inbound_records_max", self.inbound_records_max as u64),
            ("discovery_ms", self.discovery_ms),
            ("floor_ms", self.floor_ms),
            ("transaction_bytes", self.transaction_bytes as u64),
            ("delivery_timeout_ms", self.delivery_timeout_ms),
            ("request_timeout_ms", self.request_timeout_ms),
            ("idle_entries", self.idle_entries),
        ];
        match positive.iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => Err(InvalidOptions::Zero(name)),
            None => Ok(()),
        }
    }

    pub(super) fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.request_timeout_ms)
    }

    pub(super) fn stop_timeout(&self) -> Duration {
        Duration::from_millis(self.stop_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradictions_are_named() {
        assert_eq!(Options::default().validate(), Ok(()));
        let late = Options {
            delivery_timeout_ms: 30_000,
            ..Default::default()
        };
        assert_eq!(late.validate(), Err(InvalidOptions::DeliveryTimeout));
        let zero = Options {
            discovery_ms: 0,
            ..Default::default()
        };
        assert_eq!(zero.validate(), Err(InvalidOptions::Zero("discovery_ms")));
    }
}
