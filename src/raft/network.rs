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

use crate::raft::codec::{
    self, AppendRequest, AppendResponse, VoteRequest, VoteResponse, log_id_out, vote_in, vote_out,
};
use crate::raft::machine::snapshot_out;
use crate::raft::{TypeConfig, Vote};
use crate::transport::{CallError, Lane, Service, Transport};
use crate::types::{GroupId, NodeId};
use crate::wire::peer;

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Bytes>;

/// Service numbers on the wire. Numbers are for ever.
pub(super) const APPEND: Service = Service(1);
pub(super) const VOTE: Service = Service(2);
pub(super) const PRE_VOTE: Service = Service(3);
pub(super) const SNAPSHOT: Service = Service(4);
pub(super) const TRANSFER: Service = Service(5);

/// Makes the clients of one group.
pub(super) struct Factory {
    pub(super) transport: Transport,
    pub(super) group: GroupId,
}

/// One group's way to one node.
pub(super) struct Client {
    transport: Transport,
    group: GroupId,
    target: NodeId,
}

impl RaftNetworkFactory<TypeConfig> for Factory {
    type Network = Client;

    async fn new_client(&mut self, target: u64, _: &EmptyNode) -> Client {
        Client {
            transport: self.transport.clone(),
            group: self.group,
            target: NodeId(target),
        }
    }
}

impl Client {
    async fn call(
        &self,
        lane: Lane,
        service: Service,
        body: Bytes,
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
        let answer = self
            .call(Lane::Raft, APPEND, body, option.hard_ttl())
            .await?;
        codec::append_response_in(answer).map_err(undecodable)
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest,
        option: RPCOption,
    ) -> Result<VoteResponse, RPCError<TypeConfig>> {
        let body = codec::vote_request_out(&rpc);
        let answer = self.call(Lane::Raft, VOTE, body, option.hard_ttl()).await?;
        codec::vote_response_in(answer).map_err(undecodable)
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest,
        option: RPCOption,
    ) -> Result<VoteResponse, RPCError<TypeConfig>> {
        let body = codec::vote_request_out(&rpc);
        let answer = self
            .call(Lane::Raft, PRE_VOTE, body, option.hard_ttl())
            .await?;
        codec::vote_response_in(answer).map_err(undecodable)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let mut request = snapshot_out(&snapshot.meta, &snapshot.snapshot);
        request.vote = Some(vote_out(&vote));
        let body = request.encode_to_vec().into();
        let sent = self.call(Lane::Bulk, SNAPSHOT, body, option.hard_ttl());
        let answer = tokio::select! {
            closed = cancel => return Err(closed.into()),
            answer = sent => answer?,
        };
        let response: peer::SnapshotResponse = codec::decode(answer).map_err(undecodable)?;
        Ok(SnapshotResponse::new(
            vote_in(response.vote).map_err(undecodable)?,
        ))
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
