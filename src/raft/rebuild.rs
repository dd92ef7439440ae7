//! State from other replicas: what a replica is rebuilt from when its own state cannot be trusted or found.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::WatchReceiver as _;
use prost::Message as _;

use crate::raft::adapter::{SnapshotMeta, snapshot_in, snapshot_out};
use crate::raft::host::Parts;
use crate::raft::{Group, codec, network};
use crate::transport::{Lane, Transport};
use crate::types::{GroupId, NodeId};
use crate::wire::peer;

/// How long another node may take to make an outline and send it.
const ASK: Duration = Duration::from_secs(30);
/// Pause before asking everybody again, and how often that is said.
const ASK_AGAIN: Duration = Duration::from_millis(500);

impl Group {
    /// What a replica of the group can be rebuilt from; without an id for one that has the whole log.
    pub(super) fn outline(&self) -> peer::SnapshotRequest {
        let (meta, state) = self.adapter.outline();
        snapshot_out(&meta, state)
    }

    /// Asks `from` for an outline and rebuilds the state from it and the log here.
    ///
    /// # Errors
    /// When `from` does not answer, or its outline and the log here do not meet.
    pub async fn rebuild_from(&self, transport: &Transport, from: NodeId) -> io::Result<()> {
        let (meta, outline) = ask_outline(self.id(), transport, from).await?;
        self.adapter.rebuild(meta, outline).await
    }

    /// The newest log index applied here.
    pub(super) fn applied(&self) -> u64 {
        let metrics = self.raft.metrics();
        let applied = metrics.borrow_watched().last_applied;
        applied.map_or(0, |id| id.index)
    }
}

/// Asks other nodes for the group's outline until one has it.
pub(super) async fn other_outline(group: GroupId, parts: &Parts) -> (SnapshotMeta, Bytes) {
    tracing::warn!(%group, "no usable checkpoint is on this disk: another node's state is needed");
    let mut reachable = parts.transport.reachable();
    loop {
        let nodes = reachable.borrow_and_update().clone();
        for node in nodes {
            match ask_outline(group, &parts.transport, node).await {
                Ok((meta, _)) if meta.last_log_id.is_none() => {
                    tracing::warn!(%group, from = %node, "the log there begins before the one here");
                }
                Ok(outline) => return outline,
                Err(err) => {
                    tracing::warn!(%group, from = %node, error = %err, "no outline was had");
                }
            }
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

async fn ask_outline(
    group: GroupId,
    transport: &Transport,
    from: NodeId,
) -> io::Result<(SnapshotMeta, Bytes)> {
    let body = peer::OutlineRequest {}.encode_to_vec().into();
    let answer = transport
        .call(from, Lane::Bulk, network::OUTLINE, group, body, ASK)
        .await;
    snapshot_in(codec::decode(answer.map_err(io::Error::other)?)?)
}
