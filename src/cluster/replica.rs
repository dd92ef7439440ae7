//! A shard's replica on this node: its replicated state, for readers, and the events it gives off.

use std::io;
use std::sync::{Arc, RwLock, RwLockReadGuard};

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::watch;

use crate::channel::{Event, MemoryArchive, Options, RecordRef, Shard};
use crate::raft::{Group, Machine, Response};
use crate::types::{Serial, ShardId};
use crate::wire::entry;

/// Hears of every record as it is applied on this node. Called from the state machine: must not block.
pub trait EventSink: Send + Sync + 'static {
    fn advanced(&self, shard: ShardId, events: Vec<Event>);
}

/// The shard's state as readers share it.
#[derive(Clone, Debug)]
pub(super) struct State(Arc<RwLock<Shard>>);

impl State {
    pub(super) fn new(incarnation: u16) -> Self {
        let archive = Arc::new(MemoryArchive::default());
        let shard = Shard::new(incarnation, Options::default(), archive);
        Self(Arc::new(RwLock::new(shard)))
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Shard> {
        (self.0.read()).expect("a panic while applying stops the group, so nobody comes after it")
    }
}

/// The shard as a replicated state machine.
pub(super) struct ShardMachine {
    shard: ShardId,
    state: State,
    sink: Arc<dyn EventSink>,
    applied_tx: watch::Sender<u64>,
}

impl ShardMachine {
    pub(super) fn new(
        shard: ShardId,
        state: State,
        sink: Arc<dyn EventSink>,
    ) -> (Self, watch::Receiver<u64>) {
        let (applied_tx, applied_rx) = watch::channel(0);
        let machine = Self {
            shard,
            state,
            sink,
            applied_tx,
        };
        (machine, applied_rx)
    }

    fn with<R>(&self, change: impl FnOnce(&mut Shard) -> R) -> R {
        let mut shard = self.state.0.write();
        let shard = shard
            .as_mut()
            .expect("a panic while applying stops the group");
        change(shard)
    }
}

impl Machine for ShardMachine {
    fn apply(&mut self, index: u64, payload: Bytes) -> Result<Response, String> {
        let applied = self.with(|shard| shard.apply(index, payload));
        let applied = applied.map_err(|err| err.to_string())?;
        // Events go out before anyone can learn that the entry is applied: who waits for `applied` finds them.
        if !applied.events.is_empty() {
            self.sink.advanced(self.shard, applied.events);
        }
        self.applied_tx.send_replace(index);
        Ok(Response::Publishes(applied.outcomes))
    }

    fn skip(&mut self, index: u64) {
        self.with(|shard| shard.skip(index));
        self.applied_tx.send_replace(index);
    }

    fn checkpoint(&self) -> Bytes {
        self.state.read().encode()
    }

    fn restore(&mut self, state: Bytes) -> Result<(), String> {
        let archive = Arc::new(MemoryArchive::default());
        let restored = Shard::decode(state, Options::default(), archive);
        let restored = restored.map_err(|err| err.to_string())?;
        let applied = restored.applied();
        self.with(|shard| *shard = restored);
        self.applied_tx.send_replace(applied);
        Ok(())
    }
}

/// A record read back from the log.
#[derive(Clone, Debug)]
pub struct StoredRecord {
    pub at: RecordRef,
    pub publish: entry::Publish,
}

/// Accepted records of a shard in log order, and the index up to which they are all.
#[derive(Debug)]
pub struct ShardPage {
    /// Serial, stamp in milliseconds since 1970, and the publish.
    pub records: Vec<(Serial, u64, entry::Publish)>,
    pub through: u64,
    /// What serials of the shard begin with.
    pub incarnation: u16,
}

/// Bodies read at a time; a page ends after the record that passes it.
const PAGE_BYTES: usize = 2 << 20;

/// Reads the publishes at `refs` from the log, in the order of `refs`; fewer when they are large, but at least one.
/// Bodies are copied: what a reader keeps must not keep whole entries.
pub(super) fn read_records(group: &Group, refs: &[RecordRef]) -> io::Result<Vec<StoredRecord>> {
    let mut current: Option<(u64, entry::Entry)> = None;
    let mut records = Vec::with_capacity(refs.len());
    let mut bytes = 0;
    for at in refs {
        let index = at.place.index;
        let entry = match current.take() {
            Some((read, entry)) if read == index => entry,
            _ => {
                let read = group.read_log(index, index, usize::MAX)?.pop();
                decode(index, read.and_then(|(_, payload)| payload))?
            }
        };
        let publish = entry.publishes.get(usize::from(at.place.position));
        let mut publish = publish.cloned().ok_or_else(|| missing(index))?;
        publish.body = Bytes::copy_from_slice(&publish.body);
        bytes += publish.body.len();
        records.push(StoredRecord { at: *at, publish });
        current = Some((index, entry));
        if bytes > PAGE_BYTES {
            break;
        }
    }
    Ok(records)
}

/// Reads accepted publishes after log index `after`, about `max_bytes` of them.
pub(super) fn read_page(
    group: &Group,
    state: &State,
    after: u64,
    max_bytes: usize,
) -> io::Result<ShardPage> {
    let applied = state.read().applied();
    let entries = group.read_log(after + 1, applied, max_bytes)?;
    let mut page = ShardPage {
        records: Vec::new(),
        through: after,
        incarnation: state.read().now().incarnation,
    };
    for (index, payload) in entries {
        page.through = index;
        let Some(payload) = payload else { continue };
        let entry = decode(index, Some(payload))?;
        let shard = state.read();
        for (position, publish) in (0_u16..).zip(entry.publishes) {
            if publish.moved.is_none() && !shard.is_dropped(index, position) {
                let incarnation = shard.now().incarnation;
                let serial = Serial {
                    incarnation,
                    index,
                    position,
                };
                page.records.push((serial, entry.stamp_ms, publish));
            }
        }
    }
    Ok(page)
}

fn decode(index: u64, payload: Option<Bytes>) -> io::Result<entry::Entry> {
    let payload = payload.ok_or_else(|| missing(index))?;
    entry::Entry::decode(payload).map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
}

fn missing(index: u64) -> io::Error {
    let what = format!("log entry {index} does not hold the record its channel says it holds");
    io::Error::new(io::ErrorKind::InvalidData, what)
}
