//! openraft's calls to other nodes, over the transport.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    SnapshotResponse, TransferLeaderError, TransferLeaderRequest, TransferLeaderResponse,
};
use openraft::{EmptyNode, RaftNetworkFactory, RaftNetworkV2};
use prost::Message as _;

use crate::raft::adapter::{Snapshot, snapshot_out};
use crate::raft::codec::{
    self, AppendRequest, AppendResponse, VoteRequest, VoteResponse, log_id_out, vote_in, vote_out,
};
use crate::raft::throttle::Throttle;
use crate::raft::{TypeConfig, Vote};
use crate::transport::{Body, CallError, Lane, Service, Transport};
use crate::types::{GroupId, NodeId};
use crate::wire::peer;

/// Service numbers on the wire. Numbers are for ever.
pub(super) const APPEND: Service = Service(1);
pub(super) const VOTE: Service = Service(2);
pub(super) const PRE_VOTE: Service = Service(3);
pub(super) const SNAPSHOT: Service = Service(4);
pub(super) const TRANSFER: Service = Service(5);
pub(super) const OUTLINE: Service = Service(6);
pub(super) const FETCH: Service = Service(7);

/// How long a request with entries may take: a slow link or disk is no reason to send it again.
const ENTRIES_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of entries from which on a request that only catches up is kept off the way of heartbeats.
const BULK_BYTES: usize = 32 << 10;
/// A snapshot travels in parts of this size, and each part may take so long.
const PART_BYTES: usize = 4 << 20;
const PART_PATIENCE: Duration = Duration::from_secs(30);

/// Makes the clients of one group.
pub(super) struct Factory {
    pub(super) transport: Transport,
    pub(super) group: GroupId,
    pub(super) catch_up: Throttle,
}

/// One group's way to one node.
pub(super) struct Client {
    transport: Transport,
    group: GroupId,
    target: NodeId,
    catch_up: Throttle,
}

impl RaftNetworkFactory<TypeConfig> for Factory {
    type Network = Client;

    async fn new_client(&mut self, target: u64, _: &EmptyNode) -> Client {
        Client {
            transport: self.transport.clone(),
            group: self.group,
            target: NodeId(target),
            catch_up: self.catch_up.clone(),
        }
    }
}

impl Client {
    async fn call(
        &self,
        lane: Lane,
        service: Service,
        body: Body,
        deadline: Duration,
    ) -> Result<Bytes, RPCError<TypeConfig>> {
        let answer = (self.transport)
            .call(self.target, lane, service, self.group, body, deadline)
            .await;
        answer.map_err(|err| match err {
            CallError::Unreachable { .. } | CallError::Broken { .. } | CallError::Busy { .. } => {
                RPCError::Unreachable(Unreachable::from_string(err))
            }
            CallError::Timeout { .. } | CallError::Refused(_) => {
                RPCError::Network(NetworkError::from_string(err))
            }
        })
    }
}

impl Client {
    /// The answer to the last part is the answer to the snapshot; a higher vote in an earlier one ends it.
    async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: Snapshot,
    ) -> Result<SnapshotResponse<TypeConfig>, RPCError<TypeConfig>> {
        let whole = snapshot.snapshot;
        let mut request = snapshot_out(&snapshot.meta, Bytes::new());
        request.vote = Some(vote_out(&vote));
        request.total = whole.len() as u64;
        let mut offset = 0;
        loop {
            let end = (offset + PART_BYTES).min(whole.len());
            request.offset = offset as u64;
            request.state = whole.slice(offset..end);
            let body: Body = request.encode_to_vec().into();
            self.catch_up.take(body.len()).await;
            let answer = self.call(Lane::Bulk, SNAPSHOT, body, PART_PATIENCE).await?;
            let response: peer::SnapshotResponse = codec::decode(answer).map_err(undecodable)?;
            let theirs = vote_in(response.vote).map_err(undecodable)?;
            offset = end;
            if offset == whole.len() || theirs > vote {
                return Ok(SnapshotResponse::new(theirs));
            }
        }
    }
}

/// An answer that does not decode: the peer is of another version or defective.
fn undecodable(err: io::Error) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::new(&err))
}

impl RaftNetworkV2<TypeConfig> for Client {
    type SnapshotData = Bytes;

    async fn append_entries(
        &mut self,
        rpc: AppendRequest,
        option: RPCOption,
    ) -> Result<AppendResponse, RPCError<TypeConfig>> {
        let body = codec::append_out(&rpc);
        let deadline = match rpc.entries.is_empty() {
            true => option.hard_ttl(),
            false => ENTRIES_PATIENCE,
        };
        // What was committed without this follower reaches it without delaying anyone.
        let committed = rpc.leader_commit.map_or(0, |id| id.index);
        let behind = (rpc.entries.last()).is_some_and(|last| last.log_id.index <= committed);
        let lane = match behind && body.len() > BULK_BYTES {
            true => {
                self.catch_up.take(body.len()).await;
                Lane::Bulk
            }
            false => Lane::Raft,
        };
        let answer = self.call(lane, APPEND, body, deadline).await?;
        codec::append_response_in(answer).map_err(undecodable)
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest,
        option: RPCOption,
    ) -> Result<VoteResponse, RPCError<TypeConfig>> {
        let body = codec::vote_request_out(&rpc);
        let answer = self
            .call(Lane::Raft, VOTE, body.into(), option.hard_ttl())
            .await?;
        codec::vote_response_in(answer).map_err(undecodable)
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest,
        option: RPCOption,
    ) -> Result<VoteResponse, RPCError<TypeConfig>> {
        let body = codec::vote_request_out(&rpc);
        let answer = self
            .call(Lane::Raft, PRE_VOTE, body.into(), option.hard_ttl())
            .await?;
        codec::vote_response_in(answer).map_err(undecodable)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        tokio::select! {
            closed = cancel => Err(closed.into()),
            answer = self.send_snapshot(vote, snapshot) => Ok(answer?),
        }
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let request = peer::TransferRequest {
            from: Some(vote_out(rpc.from_leader())),
            to: *rpc.to_node_id(),
            last: rpc.last_log_id().map(log_id_out),
        };
        let body = request.encode_to_vec().into();
        let answer = self
            .call(Lane::Raft, TRANSFER, body, option.hard_ttl())
            .await?;
        let response: peer::TransferResponse = codec::decode(answer).map_err(undecodable)?;
        if response.refused.is_empty() {
            return Ok(Ok(()));
        }
        // The reason is the target's to log; what matters here is that it did not take over.
        let expected = *rpc.from_leader();
        Ok(Err(TransferLeaderError::VoteChanged {
            expected,
            actual: expected,
        }))
    }
}
