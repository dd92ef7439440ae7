//! What an operator sees of a bridge.

use std::fmt;

use serde::{Serialize, Serializer};

/// Where a part of a bridge stands. Serialized as the text operators know, `blocked: reason`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Kafka has not been reached yet, or not since it was lost.
    #[default]
    Connecting,
    Running,
    /// It works, but behind or hampered.
    Lagging(String),
    /// Another owner took over.
    Fenced,
    /// It cannot go on without help; nothing is skipped.
    Blocked(String),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connecting => f.write_str("connecting"),
            Self::Running => f.write_str("running"),
            Self::Lagging(reason) => write!(f, "lagging: {reason}"),
            Self::Fenced => f.write_str("fenced"),
            Self::Blocked(reason) => write!(f, "blocked: {reason}"),
        }
    }
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One configured bridge, as far as this node takes part in it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct BridgeStatus {
    pub bridge: String,
    /// The worst of its parts.
    pub state: State,
    /// Whether Kafka can be read from; absent on a node that reads nothing.
    pub reading: Option<State>,
    /// Topic partitions this node carries into channels.
    pub inbound: Vec<PartitionStatus>,
    /// Shards this node carries out into topics.
    pub outbound: Vec<ShardStatus>,
}

/// One partition on its way in. Counters start with this node's ownership.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PartitionStatus {
    pub topic: String,
    pub partition: i32,
    pub epoch: u64,
    pub state: State,
    /// Every record below it is in its channel; absent before the first.
    pub floor: Option<i64>,
    /// The partition's end, as last heard: records from there on are not there or not committed yet.
    pub end: Option<i64>,
    /// `end` − `floor`: an upper bound, as offsets are sparse.
    pub lag: Option<i64>,
    pub in_flight: usize,
    pub stored: u64,
    pub duplicates: u64,
    /// Records that came from this cluster.
    pub skipped: u64,
    pub retries: u64,
}

/// One shard on its way out. Counters start with this node's leadership.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShardStatus {
    pub shard: u32,
    pub term: u64,
    pub state: State,
    /// Log index through which everything is committed in Kafka.
    pub cursor: u64,
    /// Highest log index applied here.
    pub applied: u64,
    /// `applied` − `cursor`, in log entries.
    pub lag: u64,
    pub records: u64,
    pub transactions: u64,
    pub aborts: u64,
    pub rebuilds: u64,
}

impl BridgeStatus {
    /// Derives the whole's state from its parts': blocked, then fenced, lagging, connecting, running.
    pub(super) fn of(
        bridge: String,
        reading: Option<State>,
        inbound: Vec<PartitionStatus>,
        outbound: Vec<ShardStatus>,
    ) -> Self {
        let parts = (inbound.iter().map(|p| &p.state)).chain(outbound.iter().map(|s| &s.state));
        let states = parts.chain(&reading);
        let rank = |state: &&State| match state {
            State::Running => 0,
            State::Connecting => 1,
            State::Lagging(_) => 2,
            State::Fenced => 3,
            State::Blocked(_) => 4,
        };
        let state = states.max_by_key(rank).cloned().unwrap_or(State::Running);
        Self {
            bridge,
            state,
            reading,
            inbound,
            outbound,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_part_speaks_for_the_whole() {
        let blocked = ShardStatus {
            state: State::Blocked("no such topic".into()),
            ..Default::default()
        };
        let running = PartitionStatus {
            state: State::Running,
            ..Default::default()
        };
        let status = BridgeStatus::of("b".into(), None, vec![running], vec![blocked]);
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["state"], "blocked: no such topic");
        assert_eq!(json["inbound"][0]["state"], "running");
        assert_eq!(
            BridgeStatus::of("b".into(), None, vec![], vec![]).state,
            State::Running
        );
    }
}
