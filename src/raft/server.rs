//! Answers other nodes' Raft calls for the groups that live here.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use openraft::raft::TransferLeaderRequest;
use prost::Message as _;

use crate::raft::codec::{self, log_id_in, vote_in, vote_out};
use crate::raft::machine::snapshot_in;
use crate::raft::{Group, Raft, TypeConfig, network};
use crate::transport::{Handler, Service, Transport};
use crate::types::{GroupId, NodeId};
use crate::wire::peer;

type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Bytes>;

/// The groups of this node, reachable by number.
#[derive(Clone, Debug, Default)]
pub(super) struct Server {
    groups: Arc<RwLock<BTreeMap<GroupId, Group>>>,
}

impl Server {
    /// Answers Raft's calls on this transport from now on.
    pub(super) fn register(&self, transport: &Transport) {
        let services = [
            network::APPEND,
            network::VOTE,
            network::PRE_VOTE,
            network::SNAPSHOT,
            network::TRANSFER,
        ];
        for service in services {
            let groups = self.clone();
            transport.register(service, Arc::new(Door { groups, service }));
        }
    }

    pub(super) fn add(&self, group: Group) {
        let mut groups = self.groups.write().unwrap_or_else(|err| err.into_inner());
        groups.insert(group.id(), group);
    }

    fn raft(&self, group: GroupId) -> Option<Raft> {
        let groups = self.groups.read().unwrap_or_else(|err| err.into_inner());
        groups.get(&group).map(|group| group.raft().clone())
    }
}

struct Door {
    groups: Server,
    service: Service,
}

impl Handler for Door {
    fn handle(
        &self,
        _: NodeId,
        group: GroupId,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, String>> {
        let (raft, service) = (self.groups.raft(group), self.service);
        Box::pin(async move {
            let raft = raft.ok_or_else(|| format!("{group} is not here"))?;
            answer(&raft, service, body).await
        })
    }
}

async fn answer(raft: &Raft, service: Service, body: Bytes) -> Result<Bytes, String> {
    let text = |err: &dyn std::fmt::Display| err.to_string();
    match service {
        network::APPEND => {
            let rpc = codec::append_in(body).map_err(|err| text(&err))?;
            let answer = raft.append_entries(rpc).await.map_err(|err| text(&err))?;
            Ok(codec::append_response_out(&answer))
        }
        network::VOTE => {
            let rpc = codec::vote_request_in(body).map_err(|err| text(&err))?;
            let answer = raft.vote(rpc).await.map_err(|err| text(&err))?;
            Ok(codec::vote_response_out(&answer))
        }
        network::PRE_VOTE => {
            let rpc = codec::vote_request_in(body).map_err(|err| text(&err))?;
            let answer = raft.pre_vote(rpc).await.map_err(|err| text(&err))?;
            Ok(codec::vote_response_out(&answer))
        }
        network::SNAPSHOT => {
            let mut request: peer::SnapshotRequest =
                codec::decode(body).map_err(|err| text(&err))?;
            let vote = vote_in(request.vote.take()).map_err(|err| text(&err))?;
            let (meta, snapshot) = snapshot_in(request).map_err(|err| text(&err))?;
            let snapshot = Snapshot { meta, snapshot };
            let answer = raft.install_full_snapshot(vote, snapshot).await;
            let vote = Some(vote_out(&answer.map_err(|err| text(&err))?.vote));
            Ok(peer::SnapshotResponse { vote }.encode_to_vec().into())
        }
        network::TRANSFER => {
            let request: peer::TransferRequest = codec::decode(body).map_err(|err| text(&err))?;
            let from = vote_in(request.from).map_err(|err| text(&err))?;
            let last = request.last.as_ref().map(log_id_in);
            let rpc = TransferLeaderRequest::new(from, request.to, last);
            let answer = raft.handle_transfer_leader(rpc).await;
            let refused = match answer.map_err(|err| text(&err))? {
                Ok(()) => String::new(),
                Err(err) => err.to_string(),
            };
            Ok(peer::TransferResponse { refused }.encode_to_vec().into())
        }
        Service(other) => Err(format!("service {other} is not Raft's")),
    }
}
