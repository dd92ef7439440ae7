//! Keeps one group's log and its restarts short: checkpoints as the log goes, and purges what nobody needs.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::raft::Raft;
use crate::raft::adapter::{Adapter, Progress};
use crate::storage::GroupLog;
use crate::types::GroupId;

/// How long a snapshot may take to be built before it is asked for again.
const BUILD_PATIENCE: Duration = Duration::from_secs(30);
/// Pause after a purge that openraft has to put off, and between looks at what is new.
const AGAIN: Duration = Duration::from_millis(500);
/// How often a group is looked at in which nothing happens.
const QUIET: Duration = Duration::from_secs(10);
/// Newer segments from which on a group's oldest entries hold up what is freed of the node's log.
const SEGMENTS: usize = 2;

pub(super) struct Keeper {
    pub(super) raft: Raft,
    pub(super) adapter: Adapter,
    pub(super) log: GroupLog,
    pub(super) checkpoint_bytes: u64,
    /// Checkpoints being made on this node at a time.
    pub(super) turns: Arc<Semaphore>,
}

impl Keeper {
    pub(super) async fn run(self, id: GroupId, token: CancellationToken) -> anyhow::Result<()> {
        let mut progress = self.adapter.progress();
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                changed = progress.changed() => if changed.is_err() {
                    return Ok(());
                },
                () = tokio::time::sleep(QUIET) => {}
            }
            if self.log.newer_segments() > SEGMENTS {
                self.adapter.let_go();
            }
            let kept = tokio::select! {
                () = token.cancelled() => return Ok(()),
                kept = self.look(&mut progress) => kept,
            };
            kept.map_err(|err| anyhow::anyhow!("{id}: its state cannot be kept: {err}"))?;
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
    }

    async fn look(&self, progress: &mut watch::Receiver<Progress>) -> io::Result<()> {
        let now = *progress.borrow_and_update();
        if now.horizon > self.log.purged().map_or(0, |id| id.index) {
            let _turn = self.turns.acquire().await;
            self.purge(now.horizon).await;
        } else if now.since_checkpoint > self.checkpoint_bytes {
            let _turn = self.turns.acquire().await;
            self.adapter.checkpoint().await?;
        }
        Ok(())
    }

    /// Lets openraft make the checkpoint that covers the horizon, then purge up to it. A group that has stopped says so
    /// elsewhere.
    async fn purge(&self, horizon: u64) {
        let mut metrics = self.raft.metrics();
        if self.raft.trigger().snapshot().await.is_err() {
            return;
        }
        let built = async {
            while metrics
                .borrow_watched()
                .snapshot
                .is_none_or(|id| id.index < horizon)
            {
                if metrics.changed().await.is_err() {
                    return false;
                }
            }
            true
        };
        if let Ok(true) = tokio::time::timeout(BUILD_PATIENCE, built).await {
            // An error is a stopped group.
            let _ = self.raft.trigger().purge_log(horizon).await;
        }
    }
}
