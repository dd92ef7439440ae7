//! openraft's values ⇄ the schemas of `proto/firth/peer.proto`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use bytes::{Bytes, BytesMut};
use openraft::{EmptyNode, EntryPayload};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::raft::{Entry, LogId, Membership, Payload, TypeConfig, Vote};
use crate::transport::Body;
use crate::wire::peer;

/// Numbers of fields, as the schema has them.
const APPEND_ENTRIES: u32 = 3;
const ENTRY_NORMAL: u32 = 3;

type LeaderId = openraft::alias::LeaderIdOf<TypeConfig>;
pub(super) type AppendRequest = openraft::raft::AppendEntriesRequest<TypeConfig>;
pub(super) type AppendResponse = openraft::raft::AppendEntriesResponse<TypeConfig>;
pub(super) type VoteRequest = openraft::raft::VoteRequest<TypeConfig>;
pub(super) type VoteResponse = openraft::raft::VoteResponse<TypeConfig>;

/// A message that decodes but lacks what it must have.
pub(super) fn incomplete(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("message lacks {what}"))
}

pub(super) fn decode<M: prost::Message + Default>(bytes: Bytes) -> io::Result<M> {
    M::decode(bytes).map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
}

pub(super) fn log_id(term: u64, node: u64, index: u64) -> LogId {
    let node_id = node;
    LogId::new(LeaderId { term, node_id }, index)
}

pub(super) fn log_id_out(id: &LogId) -> peer::LogId {
    peer::LogId {
        term: id.leader_id.term,
        node: id.leader_id.node_id,
        index: id.index,
    }
}

pub(super) fn log_id_in(id: &peer::LogId) -> LogId {
    log_id(id.term, id.node, id.index)
}

pub(super) fn vote_out(vote: &Vote) -> peer::Vote {
    peer::Vote {
        term: vote.leader_id.term,
        node: vote.leader_id.node_id,
        committed: vote.committed,
    }
}

pub(super) fn vote_in(vote: Option<peer::Vote>) -> io::Result<Vote> {
    let vote = vote.ok_or_else(|| incomplete("its vote"))?;
    Ok(if vote.committed {
        Vote::new_committed(vote.term, vote.node)
    } else {
        Vote::new(vote.term, vote.node)
    })
}

pub(super) fn membership_out(membership: &Membership) -> peer::Membership {
    let set = |voters: &BTreeSet<u64>| peer::VoterSet {
        voters: voters.iter().copied().collect(),
    };
    peer::Membership {
        configs: membership.get_joint_config().iter().map(set).collect(),
        nodes: membership.nodes().map(|(id, _)| *id).collect(),
    }
}

pub(super) fn membership_in(membership: peer::Membership) -> io::Result<Membership> {
    let configs = membership.configs.into_iter();
    let configs: Vec<BTreeSet<u64>> = configs
        .map(|set| set.voters.into_iter().collect())
        .collect();
    let nodes = membership.nodes.into_iter();
    let nodes: BTreeMap<u64, EmptyNode> = nodes.map(|id| (id, EmptyNode::new())).collect();
    if configs.is_empty() {
        return Ok(Membership::default());
    }
    Membership::new(configs, nodes).map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
}

pub(super) fn entry_out(entry: &Entry) -> peer::LogEntry {
    use peer::log_entry::Payload as Out;
    let payload = match &entry.payload {
        EntryPayload::Blank => Out::Blank(true),
        EntryPayload::Normal(payload) => Out::Normal(payload.0.clone()),
        EntryPayload::Membership(membership) => Out::Membership(membership_out(membership)),
    };
    peer::LogEntry {
        id: Some(log_id_out(&entry.log_id)),
        payload: Some(payload),
    }
}

pub(super) fn entry_in(entry: peer::LogEntry) -> io::Result<Entry> {
    use peer::log_entry::Payload as In;
    let payload = match entry.payload.ok_or_else(|| incomplete("its payload"))? {
        In::Blank(_) => EntryPayload::Blank,
        In::Normal(bytes) => EntryPayload::Normal(Payload(bytes)),
        In::Membership(membership) => EntryPayload::Membership(membership_in(membership)?),
    };
    let id = entry.id.ok_or_else(|| incomplete("its log id"))?;
    Ok(Entry {
        log_id: log_id_in(&id),
        payload,
    })
}

/// A [`peer::AppendRequest`]. Payloads are pieces of their own, and not copied.
pub(super) fn append_out(rpc: &AppendRequest) -> Body {
    // Of one message the encoding is that of its parts, in any order.
    let request = peer::AppendRequest {
        vote: Some(vote_out(&rpc.vote)),
        prev: rpc.prev_log_id.as_ref().map(log_id_out),
        entries: Vec::new(),
        committed: rpc.leader_commit.as_ref().map(log_id_out),
    };
    let mut small = BytesMut::from(&*request.encode_to_vec());
    let mut body = Body::default();
    for entry in &rpc.entries {
        let mut out = entry_out(entry);
        let size = out.encoded_len() as u64;
        encode_key(APPEND_ENTRIES, WireType::LengthDelimited, &mut small);
        encode_varint(size, &mut small);
        let payload = match out.payload.take() {
            Some(peer::log_entry::Payload::Normal(payload)) => Some(payload),
            other => {
                out.payload = other;
                None
            }
        };
        small.extend_from_slice(&out.encode_to_vec());
        if let Some(payload) = payload {
            encode_key(ENTRY_NORMAL, WireType::LengthDelimited, &mut small);
            encode_varint(payload.len() as u64, &mut small);
            body.push(small.split().freeze());
            body.push(payload);
        }
    }
    body.push(small.freeze());
    body
}

pub(super) fn append_in(body: Bytes) -> io::Result<AppendRequest> {
    let request: peer::AppendRequest = decode(body)?;
    let entries = request.entries.into_iter().map(entry_in);
    Ok(AppendRequest {
        vote: vote_in(request.vote)?,
        prev_log_id: request.prev.as_ref().map(log_id_in),
        entries: entries.collect::<io::Result<_>>()?,
        leader_commit: request.committed.as_ref().map(log_id_in),
    })
}

pub(super) fn append_response_out(response: &AppendResponse) -> Bytes {
    use peer::append_response::Kind;
    let (kind, matching, vote) = match response {
        AppendResponse::Success => (Kind::Success, None, None),
        AppendResponse::PartialSuccess(id) => (Kind::Partial, id.as_ref().map(log_id_out), None),
        AppendResponse::Conflict => (Kind::Conflict, None, None),
        AppendResponse::HigherVote(vote) => (Kind::HigherVote, None, Some(vote_out(vote))),
    };
    let kind = kind.into();
    let response = peer::AppendResponse {
        kind,
        matching,
        vote,
    };
    response.encode_to_vec().into()
}

pub(super) fn append_response_in(body: Bytes) -> io::Result<AppendResponse> {
    use peer::append_response::Kind;
    let response: peer::AppendResponse = decode(body)?;
    let kind = Kind::try_from(response.kind).map_err(|_| incomplete("a known kind"))?;
    Ok(match kind {
        Kind::Success => AppendResponse::Success,
        Kind::Partial => AppendResponse::PartialSuccess(response.matching.as_ref().map(log_id_in)),
        Kind::Conflict => AppendResponse::Conflict,
        Kind::HigherVote => AppendResponse::HigherVote(vote_in(response.vote)?),
    })
}

pub(super) fn vote_request_out(rpc: &VoteRequest) -> Bytes {
    let request = peer::VoteRequest {
        vote: Some(vote_out(&rpc.vote)),
        last: rpc.last_log_id.as_ref().map(log_id_out),
        transfer: rpc.leadership_transfer,
    };
    request.encode_to_vec().into()
}

pub(super) fn vote_request_in(body: Bytes) -> io::Result<VoteRequest> {
    let request: peer::VoteRequest = decode(body)?;
    let last = request.last.as_ref().map(log_id_in);
    let mut rpc = VoteRequest::new(vote_in(request.vote)?, last);
    rpc.leadership_transfer = request.transfer;
    Ok(rpc)
}

pub(super) fn vote_response_out(response: &VoteResponse) -> Bytes {
    let response = peer::VoteResponse {
        vote: Some(vote_out(&response.vote)),
        granted: response.vote_granted,
        last: response.last_log_id.as_ref().map(log_id_out),
    };
    response.encode_to_vec().into()
}

pub(super) fn vote_response_in(body: Bytes) -> io::Result<VoteResponse> {
    let response: peer::VoteResponse = decode(body)?;
    let last = response.last.as_ref().map(log_id_in);
    Ok(VoteResponse::new(
        vote_in(response.vote)?,
        last,
        response.granted,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_append_request_is_read_back_whatever_its_pieces() {
        let payloads = [
            EntryPayload::Blank,
            EntryPayload::Normal(Payload(Bytes::new())),
            EntryPayload::Normal(Payload(Bytes::from_static(b"small"))),
            EntryPayload::Normal(Payload(vec![7; 100_000].into())),
            EntryPayload::Membership(Membership::default()),
        ];
        let entries = (1..).zip(payloads).map(|(index, payload)| Entry {
            log_id: log_id(2, 1, index),
            payload,
        });
        let rpc = AppendRequest {
            vote: Vote::new_committed(2, 1),
            prev_log_id: None,
            entries: entries.collect(),
            leader_commit: Some(log_id(1, 3, 4)),
        };
        let body = append_out(&rpc);
        let bytes = body.pieces().concat();
        assert_eq!(bytes.len(), body.len());
        let plain = peer::AppendRequest {
            vote: Some(vote_out(&rpc.vote)),
            prev: None,
            entries: rpc.entries.iter().map(entry_out).collect(),
            committed: rpc.leader_commit.as_ref().map(log_id_out),
        };
        let found = peer::AppendRequest::decode(&*bytes).unwrap();
        assert_eq!(found, plain);
        assert_eq!(bytes.len(), plain.encoded_len());
        let back = append_in(bytes.into()).unwrap();
        assert_eq!(format!("{back:?}"), format!("{rpc:?}"));
    }
}
