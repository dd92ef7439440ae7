//! Kafka in and out, exactly once.
//!
//! *In*: a reader thread per bridge fetches the partitions whose slots this node owns; the importer task submits them in
//! order, each with its source offset, which the replicated state keeps beside the data. *Out*: a thread per led shard
//! produces the shard's log in transactions that hold the cursor too. What to do when something fails is decided by
//! `inbound` and `outbound`, which know no thread; what is absent is any trust in Kafka's consumer groups.

mod cursor;
mod exporter;
mod importer;
mod inbound;
mod kafka;
mod manager;
pub mod mapping;
mod options;
mod outbound;
mod reader;
mod record;
mod status;
mod thread;
mod upstream;

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::stdx::stable_hash;
use crate::tasks::{OnError, Tasks};

pub use options::{InvalidOptions, Options};
pub use status::{BridgeStatus, PartitionStatus, ShardStatus, State};
pub use upstream::{Outcome, Publish, PublishError, ShardPage, Upstream};

/// Slots per bridge: the unit in which partitions are assigned to nodes. May never change.
pub const SLOTS: u32 = 16;

/// The slot a partition belongs to.
#[must_use]
pub fn slot_of(topic: &str, partition: i32) -> u32 {
    let partition = partition.to_string();
    let hash = stable_hash(&[topic.as_bytes(), partition.as_bytes()]);
    u32::try_from(hash % u64::from(SLOTS)).expect("less than SLOTS")
}

/// All bridges of this node. Clones share them.
#[derive(Clone, Debug)]
pub struct Bridge {
    shared: Arc<manager::Shared>,
    stop: CancellationToken,
    stopped: watch::Receiver<bool>,
}

impl Bridge {
    /// Starts whatever the configured bridges need on this node, now and as that changes. Kafka need not be there.
    ///
    /// Must be called within a tokio runtime.
    #[must_use]
    pub fn start(upstream: Arc<dyn Upstream>, options: Options, tasks: &Tasks) -> Self {
        let shared = Arc::new(manager::Shared::default());
        let stop = CancellationToken::new();
        let (stopped_tx, stopped) = watch::channel(false);
        let manager = manager::Manager::new(upstream, options, tasks.clone(), shared.clone());
        let token = stop.clone();
        tasks.spawn("bridge.manager", OnError::StopNode, |node| async move {
            let stop = async {
                tokio::select! {
                    () = node.cancelled() => {}
                    () = token.cancelled() => {}
                }
            };
            manager.run(stop).await;
            // Nobody may be waiting.
            let _ = stopped_tx.send(true);
            Ok(())
        });
        Self {
            shared,
            stop,
            stopped,
        }
    }

    /// Every configured bridge, as far as this node takes part in it.
    #[must_use]
    pub fn status(&self) -> Vec<BridgeStatus> {
        self.shared.status()
    }

    /// Finishes or aborts open transactions, waits for running publishes (at most `stop_ms`), ends all threads.
    /// Returns when that is done; stopping twice is harmless.
    pub async fn stop(&self) {
        self.stop.cancel();
        // An error means that the manager is gone, and with it everything it ran.
        let _ = self.stopped.clone().wait_for(|stopped| *stopped).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// These values place partitions on nodes, and floors beside them: they may never change.
    #[test]
    fn slots_are_frozen_and_spread() {
        let slots: std::collections::BTreeSet<u32> = (0..200).map(|p| slot_of("t", p)).collect();
        assert_eq!(slots.len(), 16);
        assert_eq!([0, 1, 2].map(|p| slot_of("matches", p)), FROZEN);
    }

    const FROZEN: [u32; 3] = [13, 12, 1];
}
