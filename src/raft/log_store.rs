//! openraft's log storage on one group's part of the node-wide log.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds, RangeInclusive};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{EntryPayload, OptionalSend, RaftLogReader};
use prost::Message as _;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::raft::codec::{decode, log_id, membership_in, membership_out, vote_in, vote_out};
use crate::raft::{Entry, LogId, Payload, TypeConfig, Vote};
use crate::storage::{self, GroupLog};

/// Bytes of entries in one replication request; a single larger entry still goes alone.
const REQUEST_BYTES: usize = 1 << 20;

/// Bytes of entries read at a time on their way to the state machine.
const PAGE_BYTES: usize = 4 << 20;

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
        let (start, end) = bounds(&range);
        read_mended(&self.0, start, end, usize::MAX).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        let vote = self.0.vote().map(decode).transpose()?;
        vote.map(|vote| vote_in(Some(vote))).transpose()
    }

    /// Page by page: the whole range may be more than memory holds.
    async fn entries_stream<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<Entry>> + OptionalSend {
        let (start, end) = bounds(&range);
        let log = self.0.clone();
        let pages = stream::try_unfold(start, move |next| {
            let log = log.clone();
            async move {
                let page = read_mended(&log, next, end, PAGE_BYTES).await?;
                let last = page.last().map(|entry| entry.log_id.index);
                Ok::<_, io::Error>(
                    last.map(|last| (stream::iter(page.into_iter().map(Ok)), last + 1)),
                )
            }
        });
        Box::pin(pages.try_flatten())
    }

    /// The last entry of each leader, without reading any.
    async fn get_key_log_ids(&mut self, range: RangeInclusive<LogId>) -> io::Result<Vec<LogId>> {
        let (first, last) = (*range.start(), *range.end());
        let starts = self.0.leader_starts();
        let ends = starts.windows(2).map(|pair| storage::LogId {
            index: pair[1].index - 1,
            ..pair[0]
        });
        let inside = |id: &storage::LogId| (first.index..last.index).contains(&id.index);
        let mut keys: Vec<LogId> = ends.filter(inside).map(id_in).collect();
        keys.push(last);
        Ok(keys)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        read_mended(&self.0, start, end, REQUEST_BYTES).await
    }
}

impl LogStore {
    /// Entries from `first` on, before `end`, about as many as fit a request.
    pub(super) fn read_page(&self, first: u64, end: u64) -> io::Result<Vec<Entry>> {
        read(&self.0, first, end, REQUEST_BYTES)
    }
}

/// First index, and one past the last.
fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
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
    (start, end)
}

/// Waits until everything handed to the log so far is durable.
pub(super) async fn barrier(log: &GroupLog) -> io::Result<()> {
    let (done, durable) = completion();
    log.append(Vec::new(), done)?;
    durable.await
}

/// How long a damaged entry may take to be had from another node before the group gives up, and how often that is looked
/// at.
const MEND_PATIENCE: Duration = Duration::from_secs(60);
const MEND_LOOK: Duration = Duration::from_millis(20);

/// Like `read`, and waits for damaged entries to be mended.
async fn read_mended(
    log: &GroupLog,
    start: u64,
    end: u64,
    max_bytes: usize,
) -> io::Result<Vec<Entry>> {
    let until = Instant::now() + MEND_PATIENCE;
    loop {
        match read(log, start, end, max_bytes) {
            Err(err) if is_damage(&err) && Instant::now() < until => {
                tokio::time::sleep(MEND_LOOK).await;
            }
            read => return read,
        }
    }
}

fn is_damage(err: &io::Error) -> bool {
    err.get_ref()
        .is_some_and(|inner| inner.is::<storage::Damaged>())
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
pub(super) fn completion() -> (storage::Done, Saved) {
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

pub(super) fn entry_out(entry: Entry) -> storage::Entry {
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
