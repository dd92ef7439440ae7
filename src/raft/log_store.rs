//! openraft's log storage on one group's part of the node-wide log.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};

use bytes::Bytes;
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{EntryPayload, OptionalSend, RaftLogReader};
use prost::Message as _;
use tokio::sync::oneshot;

use crate::raft::codec::{decode, log_id, membership_in, membership_out, vote_in, vote_out};
use crate::raft::{Entry, LogId, Payload, TypeConfig, Vote};
use crate::storage::{self, GroupLog};

/// Bytes of entries in one replication request; a single larger entry still goes alone.
const REQUEST_BYTES: usize = 1 << 20;

/// Kinds of entries on disk. Numbers are for ever.
const BLANK: u8 = 0;
const NORMAL: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// One group's log. Clones are readers of the same log.
#[derive(Clone, Debug)]
pub(super) struct LogStore(pub(super) GroupLog);

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<TypeConfig>> {
        let purged = self.0.purged().map(id_in);
        Ok(LogState {
            last_purged_log_id: purged,
            last_log_id: self.0.last().map(id_in).or(purged),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let (done, saved) = completion();
        let bytes = vote_out(vote).encode_to_vec().into();
        self.0.save_vote(bytes, done);
        saved.await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.0.save_committed(committed.as_ref().map(id_out))
    }

    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        Ok(self.0.committed().map(id_in))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries = entries.into_iter().map(entry_out).collect();
        let done = Box::new(move |result| callback.io_completed(result));
        self.0.append(entries, done)
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        self.0.truncate_after(last.map(|id| id.index))
    }

    async fn purge(&mut self, upto: LogId) -> io::Result<()> {
        let (done, purged) = completion();
        self.0.purge(id_out(&upto), done);
        purged.await
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(before) => before + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(last) => last + 1,
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        read(&self.0, start, end, usize::MAX)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        let vote = self.0.vote().map(decode).transpose()?;
        vote.map(|vote| vote_in(Some(vote))).transpose()
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        read(&self.0, start, end, REQUEST_BYTES)
    }
}

fn read(log: &GroupLog, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
    if start >= end {
        return Ok(Vec::new());
    }
    let entries = log.read(start..end, max_bytes)?;
    entries.into_iter().map(entry_in).collect()
}

type Saved = std::pin::Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// A callback for the log's writer, and the wait for it.
fn completion() -> (storage::Done, Saved) {
    let (tx, rx) = oneshot::channel();
    let done: storage::Done = Box::new(move |result| {
        // The waiter may be gone: its group was stopped.
        let _ = tx.send(result);
    });
    let saved = async {
        rx.await
            .unwrap_or_else(|_| Err(io::Error::other("log is closed")))
    };
    (done, Box::pin(saved))
}

pub(super) fn id_in(id: storage::LogId) -> LogId {
    log_id(id.term, id.node, id.index)
}

pub(super) fn id_out(id: &LogId) -> storage::LogId {
    storage::LogId {
        term: id.leader_id.term,
        node: id.leader_id.node_id,
        index: id.index,
    }
}

fn entry_out(entry: Entry) -> storage::Entry {
    let (kind, payload) = match entry.payload {
        EntryPayload::Blank => (BLANK, Bytes::new()),
        EntryPayload::Normal(payload) => (NORMAL, payload.0),
        EntryPayload::Membership(membership) => {
            let bytes = membership_out(&membership).encode_to_vec();
            (MEMBERSHIP, bytes.into())
        }
    };
    storage::Entry {
        id: id_out(&entry.log_id),
        kind,
        payload,
    }
}

fn entry_in(entry: storage::Entry) -> io::Result<Entry> {
    let payload = match entry.kind {
        BLANK => EntryPayload::Blank,
        NORMAL => EntryPayload::Normal(Payload(entry.payload)),
        MEMBERSHIP => EntryPayload::Membership(membership_in(decode(entry.payload)?)?),
        kind => {
            let what = format!("log entry {} is of unknown kind {kind}", entry.id.index);
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
    };
    Ok(Entry {
        log_id: id_in(entry.id),
        payload,
    })
}

/// The payload of an entry if it is a normal one: for readers of the log itself.
pub(super) fn normal_payload(entry: storage::Entry) -> Option<Bytes> {
    (entry.kind == NORMAL).then_some(entry.payload)
}
