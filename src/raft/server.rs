//! Answers other nodes' Raft calls for the groups that live here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use openraft::raft::TransferLeaderRequest;
use prost::Message as _;

use crate::raft::adapter::{Snapshot, snapshot_in};
use crate::raft::codec::{self, log_id_in, vote_in, vote_out};
use crate::raft::log_store::LogStore;
use crate::raft::{Entry, Group, network};
use crate::storage::Log;
use crate::transport::{Handler, Service, Transport};
use crate::types::{GroupId, NodeId};
use crate::wire::peer;

/// The groups of this node, reachable by number.
#[derive(Clone, Debug)]
pub(super) struct Server {
    log: Log,
    groups: Arc<RwLock<BTreeMap<GroupId, Group>>>,
    /// Snapshots of which parts have arrived. One per group: a group has one leader.
    arriving: Arc<Mutex<BTreeMap<GroupId, Arriving>>>,
}

/// The first parts of a snapshot.
#[derive(Debug)]
struct Arriving {
    from: NodeId,
    /// All but its bytes.
    of: peer::SnapshotRequest,
    bytes: BytesMut,
}

/// A snapshot larger than this is refused rather than gathered in memory.
const SNAPSHOT_BYTES_MAX: u64 = 1 << 30;

impl Server {
    pub(super) fn new(log: Log) -> Self {
        Self {
            log,
            groups: Arc::default(),
            arriving: Arc::default(),
        }
    }

    /// Committed entries from `first` to `last`, those that can be read here, some of them. Also of a group that has not
    /// started yet: it may wait itself for what others have.
    async fn committed_entries(
        &self,
        group: GroupId,
        first: u64,
        last: u64,
    ) -> std::io::Result<Vec<Entry>> {
        let log = self.log.group(group);
        let applied = self.group(group).map_or(0, |group| group.applied());
        let committed = log.committed().map_or(0, |id| id.index).max(applied);
        let end = last.min(committed).saturating_add(1);
        let read = tokio::task::spawn_blocking(move || LogStore(log).read_page(first, end));
        read.await.map_err(std::io::Error::other)?
    }

    /// Answers Raft's calls on this transport from now on.
    pub(super) fn register(&self, transport: &Transport) {
        let services = [
            network::APPEND,
            network::VOTE,
            network::PRE_VOTE,
            network::SNAPSHOT,
            network::TRANSFER,
            network::OUTLINE,
            network::FETCH,
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

    pub(super) fn group(&self, group: GroupId) -> Option<Group> {
        let groups = self.groups.read().unwrap_or_else(|err| err.into_inner());
        groups.get(&group).cloned()
    }

    /// Adds a part, and returns the whole once it is there.
    fn gather(
        &self,
        from: NodeId,
        group: GroupId,
        mut part: peer::SnapshotRequest,
    ) -> Result<Option<peer::SnapshotRequest>, String> {
        if part.total > SNAPSHOT_BYTES_MAX {
            return Err(format!("a snapshot of {} bytes is too large", part.total));
        }
        let bytes = std::mem::take(&mut part.state);
        let offset = std::mem::take(&mut part.offset);
        let mut arriving = self.arriving.lock().unwrap_or_else(PoisonError::into_inner);
        if offset == 0 {
            let first = Arriving {
                from,
                of: part.clone(),
                bytes: BytesMut::new(),
            };
            arriving.insert(group, first);
        }
        let known = arriving.get_mut(&group);
        let known = known.filter(|known| {
            known.from == from && known.of == part && known.bytes.len() as u64 == offset
        });
        let known = known.ok_or("the part does not continue a snapshot that is arriving")?;
        known.bytes.extend_from_slice(&bytes);
        if (known.bytes.len() as u64) < part.total {
            return Ok(None);
        }
        let whole = arriving.remove(&group).map(|whole| whole.bytes.freeze());
        part.state = whole.unwrap_or_default();
        Ok(Some(part))
    }
}

struct Door {
    groups: Server,
    service: Service,
}

impl Handler for Door {
    fn handle(
        &self,
        from: NodeId,
        group: GroupId,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, String>> {
        let (server, service) = (self.groups.clone(), self.service);
        Box::pin(async move {
            if service == network::FETCH {
                return fetch(&server, group, body).await;
            }
            let here = server.group(group);
            let here = here.ok_or_else(|| format!("{group} is not here"))?;
            match service {
                network::SNAPSHOT => snapshot(&server, &here, from, body).await,
                network::OUTLINE => Ok(here.outline().encode_to_vec().into()),
                _ => answer(&here, service, body).await,
            }
        })
    }
}

fn text(err: impl std::fmt::Display) -> String {
    err.to_string()
}

async fn snapshot(
    server: &Server,
    group: &Group,
    from: NodeId,
    body: Bytes,
) -> Result<Bytes, String> {
    let part: peer::SnapshotRequest = codec::decode(body).map_err(text)?;
    let vote = part.vote;
    let Some(mut whole) = server.gather(from, group.id(), part)? else {
        return Ok(peer::SnapshotResponse { vote }.encode_to_vec().into());
    };
    let vote = vote_in(whole.vote.take()).map_err(text)?;
    let (meta, snapshot) = snapshot_in(whole).map_err(text)?;
    let snapshot = Snapshot { meta, snapshot };
    let answer = group.raft().install_full_snapshot(vote, snapshot).await;
    let vote = Some(vote_out(&answer.map_err(text)?.vote));
    Ok(peer::SnapshotResponse { vote }.encode_to_vec().into())
}

async fn fetch(server: &Server, group: GroupId, body: Bytes) -> Result<Bytes, String> {
    let request: peer::FetchRequest = codec::decode(body).map_err(text)?;
    let entries = server.committed_entries(group, request.first, request.last);
    let entries = entries.await;
    let entries = entries.map_err(text)?;
    let entries = entries.iter().map(codec::entry_out).collect();
    Ok(peer::FetchResponse { entries }.encode_to_vec().into())
}

async fn answer(group: &Group, service: Service, body: Bytes) -> Result<Bytes, String> {
    let raft = group.raft();
    match service {
        network::APPEND => {
            let rpc = codec::append_in(body).map_err(text)?;
            let answer = raft.append_entries(rpc).await.map_err(text)?;
            Ok(codec::append_response_out(&answer))
        }
        network::VOTE => {
            group.may_vote()?;
            let rpc = codec::vote_request_in(body).map_err(text)?;
            let answer = raft.vote(rpc).await.map_err(text)?;
            Ok(codec::vote_response_out(&answer))
        }
        network::PRE_VOTE => {
            group.may_vote()?;
            let rpc = codec::vote_request_in(body).map_err(text)?;
            let answer = raft.pre_vote(rpc).await.map_err(text)?;
            Ok(codec::vote_response_out(&answer))
        }
        network::TRANSFER => {
            group.may_vote()?;
            let request: peer::TransferRequest = codec::decode(body).map_err(text)?;
            let from = vote_in(request.from).map_err(text)?;
            let last = request.last.as_ref().map(log_id_in);
            let rpc = TransferLeaderRequest::new(from, request.to, last);
            let answer = raft.handle_transfer_leader(rpc).await;
            let refused = match answer.map_err(text)? {
                Ok(()) => String::new(),
                Err(err) => err.to_string(),
            };
            Ok(peer::TransferResponse { refused }.encode_to_vec().into())
        }
        Service(other) => Err(format!("service {other} is not Raft's")),
    }
}
