//! The `[storage]` section: how much the node keeps, and how fast it looks after it.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{archive, cluster, raft, storage};

/// What the node's disk and its upkeep may cost.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// Size of a log file. A freed one is used again.
    pub segment_bytes: u64,
    /// How fast sealed log files are read and verified in the background. 0: not at all.
    pub scrub_bytes_per_second: u64,
    /// Log that a restart replays at most for one shard, about.
    pub checkpoint_bytes: u64,
    /// How fast this node sends to nodes that are catching up, all together. 0: no limit.
    pub catch_up_bytes_per_second: u64,
    /// Log of one shard that is left alone however little of it is retained.
    pub slack_bytes: u64,
    /// Log of one shard that a bridge may hold which does not get on.
    pub held_bytes_max: u64,
    /// Records of one shard whose index entries are in memory, at most 64 bytes each; older ones are on disk.
    pub records_in_memory: usize,
    /// Memory for reading index entries that are on disk.
    pub index_cache_bytes: u64,
    /// How often the replicas of a shard compare their states.
    pub check_period_ms: u64,
}

impl Default for Storage {
    fn default() -> Self {
        let log = storage::Options::new("");
        let (raft, upkeep) = (raft::Options::default(), cluster::UpkeepOptions::default());
        Self {
            segment_bytes: log.segment_bytes,
            scrub_bytes_per_second: log.scrub_bytes_per_second,
            checkpoint_bytes: raft.checkpoint_bytes,
            catch_up_bytes_per_second: raft.catch_up_bytes_per_second,
            slack_bytes: upkeep.slack_bytes,
            held_bytes_max: upkeep.held_bytes_max,
            records_in_memory: 65_536,
            index_cache_bytes: archive::Options::default().cache_bytes,
            check_period_ms: u64::try_from(upkeep.check_period.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl Storage {
    /// What is wrong with the values, by field.
    pub(super) fn check(&self) -> Result<(), (&'static str, String)> {
        if !(4 << 10..=2 << 30).contains(&self.segment_bytes) {
            return Err(("segment_bytes", "must be 4 KiB to 2 GiB".to_owned()));
        }
        if self.check_period_ms < 1000 {
            return Err(("check_period_ms", "must be at least 1000".to_owned()));
        }
        if self.records_in_memory < 16 {
            return Err(("records_in_memory", "must be at least 16".to_owned()));
        }
        Ok(())
    }

    pub(super) fn log(&self, dir: PathBuf) -> storage::Options {
        storage::Options {
            segment_bytes: self.segment_bytes,
            scrub_bytes_per_second: self.scrub_bytes_per_second,
            ..storage::Options::new(dir)
        }
    }

    pub(super) fn archive(&self) -> archive::Options {
        archive::Options {
            cache_bytes: self.index_cache_bytes,
        }
    }

    pub(super) fn raft(&self, raft: raft::Options) -> raft::Options {
        raft::Options {
            checkpoint_bytes: self.checkpoint_bytes,
            catch_up_bytes_per_second: self.catch_up_bytes_per_second,
            ..raft
        }
    }

    pub(super) fn upkeep(&self) -> cluster::UpkeepOptions {
        cluster::UpkeepOptions {
            slack_bytes: self.slack_bytes,
            held_bytes_max: self.held_bytes_max,
            check_period: Duration::from_millis(self.check_period_ms),
            ..cluster::UpkeepOptions::default()
        }
    }
}
