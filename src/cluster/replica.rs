//! A shard's replica on this node: its replicated state, for readers, and the events it gives off.

use std::io;
use std::sync::{Arc, RwLock, RwLockReadGuard};

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::watch;

use crate::channel::{self, Archive, Event, InvalidCheckpoint, RecordRef, Shard};
use crate::raft::{Group, Machine, Replay, Response, Restored};
use crate::types::{Serial, ShardId};
use crate::wire::entry;

/// Hears of every record as it is applied on this node. Called from the state machine: must not block.
pub trait EventSink: Send + Sync + 'static {
    fn advanced(&self, shard: ShardId, events: Vec<Event>);
    /// The shard's state was replaced: records up to `at` may never have been told of.
    fn replaced(&self, shard: ShardId, at: Serial);
}

/// The shard's state as readers share it.
#[derive(Clone, Debug)]
pub(super) struct State(Arc<RwLock<Shard>>);

impl State {
    pub(super) fn read(&self) -> RwLockReadGuard<'_, Shard> {
        (self.0.read()).expect("a panic while applying stops the group, so nobody comes after it")
    }
}

/// The shard as a replicated state machine.
pub(super) struct ShardMachine {
    shard: ShardId,
    options: channel::Options,
    archive: Arc<dyn Archive>,
    state: State,
    sink: Arc<dyn EventSink>,
    applied_tx: watch::Sender<u64>,
}

impl ShardMachine {
    /// The machine, the state it changes, and the newest index applied to it.
    pub(super) fn new(
        shard: ShardId,
        incarnation: u16,
        options: channel::Options,
        archive: Arc<dyn Archive>,
        sink: Arc<dyn EventSink>,
    ) -> (Self, State, watch::Receiver<u64>) {
        let (applied_tx, applied_rx) = watch::channel(0);
        let empty = Shard::new(incarnation, options, archive.clone());
        let state = State(Arc::new(RwLock::new(empty)));
        let machine = Self {
            shard,
            options,
            archive,
            state: state.clone(),
            sink,
            applied_tx,
        };
        (machine, state, applied_rx)
    }

    fn with<R>(&self, change: impl FnOnce(&mut Shard) -> R) -> R {
        let mut shard = self.state.0.write();
        let shard = shard
            .as_mut()
            .expect("a panic while applying stops the group");
        change(shard)
    }

    fn moved_on(&self, index: u64, rebuilt: bool) {
        match rebuilt {
            true => self.was_replaced(),
            false => drop(self.applied_tx.send_replace(index)),
        }
    }

    /// Readers are told after the state is there: whoever looks then finds it.
    fn was_replaced(&self) {
        let (applied, now) = {
            let state = self.state.read();
            (state.applied(), state.now())
        };
        self.sink.replaced(self.shard, now);
        self.applied_tx.send_replace(applied);
    }
}

impl Machine for ShardMachine {
    fn apply(&mut self, index: u64, payload: Bytes) -> Result<Response, String> {
        let (applied, before, after) = self.with(|shard| {
            let before = shard.is_rebuilding();
            let applied = shard.apply(index, payload);
            (applied, before, shard.is_rebuilding())
        });
        let applied = applied.map_err(|err| err.to_string())?;
        // Events go out before anyone can learn that the entry is applied: who waits for `applied` finds them. While the
        // records come back nobody may read: followers look again once all are there.
        if !before && !applied.events.is_empty() {
            self.sink.advanced(self.shard, applied.events);
        }
        self.moved_on(index, before && !after);
        Ok(Response::Publishes(applied.outcomes))
    }

    fn skip(&mut self, index: u64) {
        let (before, after) = self.with(|shard| {
            let before = shard.is_rebuilding();
            shard.skip(index);
            (before, shard.is_rebuilding())
        });
        self.moved_on(index, before && !after);
    }

    fn checkpoint(&self) -> Bytes {
        self.state.read().encode()
    }

    fn checkpointed(&mut self, index: u64) -> Result<(), String> {
        let noted = self.with(|shard| shard.checkpointed(index));
        noted.map_err(|err| err.to_string())
    }

    fn restore(&mut self, _: u64, checkpoint: Bytes) -> Result<Restored, String> {
        match Shard::decode(checkpoint, self.options, self.archive.clone()) {
            Ok(restored) => {
                self.with(|shard| *shard = restored);
                self.was_replaced();
                Ok(Restored::Whole)
            }
            Err(InvalidCheckpoint::ArchiveBehind { .. }) => Ok(Restored::Unusable),
            Err(err) => Err(err.to_string()),
        }
    }

    fn archive(&self) -> Option<Arc<dyn Archive>> {
        Some(self.archive.clone())
    }

    fn horizon(&self) -> Option<u64> {
        Some(self.state.read().horizon()).filter(|horizon| *horizon > 0)
    }

    /// A shard's horizon is in its entries.
    fn let_go(&mut self) {}

    fn outline(&self) -> Bytes {
        self.state.read().outline()
    }

    fn restore_outline(&mut self, _: u64, outline: Bytes) -> Result<(), String> {
        let (options, archive) = (self.options, self.archive.clone());
        let restored = Shard::decode_outline(outline, options, archive);
        let restored = restored.map_err(|err| err.to_string())?;
        self.with(|shard| *shard = restored);
        self.was_replaced();
        Ok(())
    }

    fn rebuild(&mut self, _: u64, outline: Bytes, replay: Replay<'_>) -> Result<(), String> {
        let (options, archive) = (self.options, self.archive.clone());
        // Under the lock from the start: the state of now leans on the archive that is emptied for the new one.
        self.with(|shard| {
            let rebuilt = Shard::decode_outline(outline, options, archive);
            let mut rebuilt = rebuilt.map_err(|err| err.to_string())?;
            while let Some((index, payload)) = replay().map_err(|err| err.to_string())? {
                match payload {
                    Some(payload) => {
                        let applied = rebuilt.apply(index, payload);
                        applied.map_err(|err| err.to_string())?;
                    }
                    None => rebuilt.skip(index),
                }
            }
            *shard = rebuilt;
            Ok::<(), String>(())
        })?;
        self.was_replaced();
        Ok(())
    }
}

/// A record read back from the log.
#[derive(Clone, Debug)]
pub struct StoredRecord {
    pub at: RecordRef,
    pub publish: entry::Publish,
}

/// Accepted messages of a shard in log order, without presence events, and the index up to which they are all.
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

/// Reads accepted messages after log index `after`, about `max_bytes` of them.
pub(super) fn read_page(
    group: &Group,
    state: &State,
    after: u64,
    max_bytes: usize,
) -> io::Result<ShardPage> {
    let (applied, horizon) = {
        let state = state.read();
        (state.applied(), state.horizon())
    };
    if after > 0 && after < horizon {
        let what = format!("entries from {} to {horizon} are no longer held", after + 1);
        return Err(io::Error::new(io::ErrorKind::NotFound, what));
    }
    let after = after.max(horizon);
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
            // What was only moved stands in the log where it came first, or did.
            let own = publish.moved.is_none() && publish.presence.is_none();
            if own && !shard.is_dropped(index, position) {
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

/// Retained records in entries from `first` on, as publishes that move them: about `moved_bytes` of them, found in about
/// `read_bytes` of log.
pub(super) fn find_movable(
    group: &Group,
    state: &State,
    first: u64,
    applied: u64,
    read_bytes: usize,
    moved_bytes: usize,
) -> io::Result<Vec<entry::Publish>> {
    let mut found = Vec::new();
    let mut bytes = 0;
    for (index, payload) in group.read_log(first, applied, read_bytes)? {
        let Some(payload) = payload else { continue };
        let entry = decode(index, Some(payload))?;
        let shard = state.read();
        for (position, mut publish) in (0_u16..).zip(entry.publishes) {
            if let Some(moved) = shard.movable(index, position, &publish) {
                bytes += publish.encoded_len();
                publish.moved = Some(moved);
                found.push(publish);
            }
        }
        if bytes >= moved_bytes {
            break;
        }
    }
    Ok(found)
}

fn decode(index: u64, payload: Option<Bytes>) -> io::Result<entry::Entry> {
    let payload = payload.ok_or_else(|| missing(index))?;
    entry::Entry::decode(payload).map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
}

fn missing(index: u64) -> io::Error {
    let what = format!("log entry {index} does not hold the record its channel says it holds");
    io::Error::new(io::ErrorKind::InvalidData, what)
}
