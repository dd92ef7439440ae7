//! The handles: the node's [`Log`], and one [`GroupLog`] per Raft group.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};

use bytes::Bytes;

use crate::storage::disk::{Disk, RealDisk};
use crate::storage::frame::{Frame, Kind, PAYLOAD_MAX};
use crate::storage::group::{Found, Group, State, invalid};
use crate::storage::recover::{End, recover};
use crate::storage::segment::Segment;
use crate::storage::snapshot::SnapshotFile;
use crate::storage::spares::Spares;
use crate::storage::writer::{Record, Start, What, Writer};
use crate::storage::{Done, Entry, Error, LogId, Options, Owner, identity, locked};
use crate::types::GroupId;

const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = (4 << 10)..=(2 << 30);

/// A node's log. Clones are the same log. Close it with [`Log::close`]; when the last handle is dropped without, what
/// was handed in is still written, but nobody waits for it.
#[derive(Clone, Debug)]
pub struct Log(Arc<Handle>);

/// One Raft group's part of the log. Clones are the same. Calls of one group take effect in the order in which
/// they are made; the caller sees to it that there is an order.
#[derive(Clone, Debug)]
pub struct GroupLog {
    log: Log,
    group: Arc<Group>,
}

/// Counters since the log was opened, and what it holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Device flushes of segment files by the writer.
    pub syncs: u64,
    /// Batches written; each shares one flush, or needs none.
    pub batches: u64,
    /// Records written, without those repeated at the heads of segments.
    pub frames: u64,
    /// Bytes written to segments, without what is zeroed ahead.
    pub bytes: u64,
    /// Bytes handed in and not yet durable.
    pub waiting_bytes: usize,
    /// Segments there are.
    pub segments: usize,
}

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    directory_id: String,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What handles, readers and the writer share. Lock order: a group's state, then `queue` or `segments`; no lock is
/// held across I/O.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) queue: Mutex<Queue>,
    pub(super) wake: Condvar,
    groups: Mutex<HashMap<u32, Arc<Group>>>,
    pub(super) segments: RwLock<HashMap<u32, Arc<Segment>>>,
    pub(super) counters: Counters,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) syncs: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) frames: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) waiting: AtomicUsize,
}

/// What waits for the writer.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) records: Vec<Record>,
    /// Only the newest mark of a group is of interest, so these are bounded by the number of groups.
    pub(super) committed: HashMap<u32, Option<LogId>>,
    /// Somebody waits for a record; otherwise there is no hurry to write it.
    pub(super) urgent: bool,
    pub(super) condition: Condition,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Condition {
    #[default]
    Open,
    Closed,
    /// For good, until opened anew.
    Failed(io::ErrorKind, String),
}

impl Condition {
    pub(super) fn failed(error: &io::Error) -> Self {
        Self::Failed(error.kind(), format!("the log failed: {error}"))
    }

    /// What everybody gets who comes now.
    pub(super) fn error(&self) -> io::Error {
        match self {
            Self::Failed(kind, text) => io::Error::new(*kind, text.clone()),
            Self::Open | Self::Closed => {
                io::Error::new(io::ErrorKind::BrokenPipe, "the log is closed")
            }
        }
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            records, condition, ..
        } = self;
        write!(f, "Queue {{ {} records, {condition:?} }}", records.len())
    }
}

impl Log {
    /// Opens the directory's log, creating it for `owner` when the directory is new or empty. Reads and verifies
    /// every segment, so it takes a while: call it where blocking is allowed.
    pub fn open(options: Options, owner: &Owner) -> Result<Self, Error> {
        let disk = RealDisk::new(&options.dir).map_err(Error::io("create", &options.dir))?;
        Self::open_on(Arc::new(disk), options, owner)
    }

    /// Like [`Log::open`], on another disk.
    pub fn open_on(disk: Arc<dyn Disk>, options: Options, owner: &Owner) -> Result<Self, Error> {
        if !SEGMENT_BYTES.contains(&options.segment_bytes) {
            return Err(Error::SegmentBytes {
                found: options.segment_bytes,
                min: *SEGMENT_BYTES.start(),
                max: *SEGMENT_BYTES.end(),
            });
        }
        let dir = options.dir.clone();
        let lock = disk
            .try_lock(identity::LOCK)
            .map_err(Error::io("lock", &dir))?;
        let Some(lock) = lock else {
            return Err(Error::Locked { dir });
        };
        let identity = identity::claim(&*disk, &dir, owner)?;
        let recovered = recover(&*disk, &dir)?;
        let (spares, spares_thread) =
            Spares::start(&disk, &options, recovered.segments.is_empty())?;
        let mut groups = HashMap::new();
        let mut tracks = HashMap::new();
        for (number, (state, track)) in recovered.groups {
            let state = Mutex::new(state);
            groups.insert(number, Arc::new(Group { number, state }));
            tracks.insert(number, track);
        }
        let segments = recovered
            .segments
            .iter()
            .map(|segment| (segment.number, segment.clone()));
        let shared = Arc::new(Shared {
            disk,
            queue: Mutex::default(),
            wake: Condvar::new(),
            groups: Mutex::new(groups),
            segments: RwLock::new(segments.collect()),
            counters: Counters::default(),
        });
        let start = Start {
            shared: shared.clone(),
            options,
            spares,
            tracks,
            lock,
        };
        let writer = writer(start, &recovered.segments, recovered.end);
        let writer = writer.map_err(Error::io("continue the log in", &dir))?;
        let thread = thread::Builder::new()
            .name("log-writer".to_owned())
            .spawn(move || writer.run())
            .map_err(Error::io("start a thread for", &dir))?;
        Ok(Self(Arc::new(Handle {
            shared,
            directory_id: identity.directory_id,
            threads: Mutex::new(vec![thread, spares_thread]),
        })))
    }

    /// The group's part of the log; empty when it has none yet.
    #[must_use]
    pub fn group(&self, group: GroupId) -> GroupLog {
        let mut groups = locked(&self.0.shared.groups);
        let new = || {
            let state = Mutex::new(State::default());
            let number = group.0;
            Arc::new(Group { number, state })
        };
        GroupLog {
            log: self.clone(),
            group: groups.entry(group.0).or_insert_with(new).clone(),
        }
    }

    /// Where the group's snapshot lies.
    #[must_use]
    pub fn snapshot(&self, group: GroupId) -> SnapshotFile {
        SnapshotFile::new(self.0.shared.disk.clone(), group)
    }

    /// Groups that have a part in the log or were asked for, in order.
    #[must_use]
    pub fn groups(&self) -> Vec<GroupId> {
        let mut groups: Vec<_> = locked(&self.0.shared.groups)
            .keys()
            .copied()
            .map(GroupId)
            .collect();
        groups.sort_unstable();
        groups
    }

    /// Tells this directory from every other that the node ever had: 32 hexadecimal digits.
    #[must_use]
    pub fn directory_id(&self) -> &str {
        &self.0.directory_id
    }

    #[must_use]
    pub fn stats(&self) -> Stats {
        let counters = &self.0.shared.counters;
        let segments = self
            .0
            .shared
            .segments
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        Stats {
            syncs: counters.syncs.load(Relaxed),
            batches: counters.batches.load(Relaxed),
            frames: counters.frames.load(Relaxed),
            bytes: counters.bytes.load(Relaxed),
            waiting_bytes: counters.waiting.load(Relaxed),
            segments: segments.len(),
        }
    }

    /// Writes and syncs what was handed in, ends the threads and lets go of the directory. What comes later fails;
    /// reading still works. Blocks. Fails when the log had failed.
    pub fn close(&self) -> io::Result<()> {
        self.0.shared.stop();
        let threads = std::mem::take(&mut *locked(&self.0.threads));
        for thread in threads {
            thread
                .join()
                .map_err(|_| io::Error::other("a thread of the log panicked"))?;
        }
        match &locked(&self.0.shared.queue).condition {
            failed @ Condition::Failed(..) => Err(failed.error()),
            Condition::Open | Condition::Closed => Ok(()),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

/// Makes the disk agree with what was recovered, and goes on from there.
fn writer(start: Start, segments: &[Arc<Segment>], end: End) -> io::Result<Writer> {
    match (segments.last(), end) {
        (None, _) => Writer::create(start, 1),
        (Some(newest), End::Sealed) => Writer::create(start, newest.number + 1),
        (Some(newest), End::Open { at, dirty_to }) => {
            if dirty_to > at {
                tracing::warn!(
                    segment = newest.number,
                    at,
                    bytes = dirty_to - at,
                    "cutting off writes that a crash interrupted; nobody was told of them"
                );
            }
            let zeros = vec![0; usize::try_from(dirty_to - at).map_err(io::Error::other)?];
            newest.file.write_at(&zeros, at)?;
            // Also for what was read a moment ago: after a mere restart it may never have reached the device.
            newest.file.sync()?;
            Ok(Writer::resume(start, newest.clone(), at))
        }
    }
}

impl Shared {
    fn stop(&self) {
        let mut queue = locked(&self.queue);
        if queue.condition == Condition::Open {
            queue.condition = Condition::Closed;
        }
        drop(queue);
        self.wake.notify_all();
    }

    /// Lets `change` alter a group and, in the same moment, queues the record it returns, if any. So the queue has a
    /// group's records in the order in which its readers saw them take effect.
    fn submit(
        &self,
        group: &Arc<Group>,
        done: Option<Done>,
        change: impl FnOnce(&mut State) -> io::Result<Option<What>>,
    ) -> io::Result<()> {
        let mut state = locked(&group.state);
        let mut queue = locked(&self.queue);
        let what = match &queue.condition {
            Condition::Open => change(&mut state),
            closed => Err(closed.error()),
        };
        let what = match what {
            Ok(None) if done.is_none() => return Ok(()),
            Ok(what) => what.unwrap_or(What::Barrier),
            Err(error) => {
                drop((queue, state));
                if let Some(done) = done {
                    done(Err(io::Error::new(error.kind(), error.to_string())));
                }
                return Err(error);
            }
        };
        let wakes = done.is_some() && !queue.urgent;
        queue.urgent |= done.is_some();
        let group = group.clone();
        let record = Record { group, what, done };
        self.counters.waiting.fetch_add(record.size(), Relaxed);
        queue.records.push(record);
        drop((queue, state));
        if wakes {
            self.wake.notify_all();
        }
        Ok(())
    }
}

impl GroupLog {
    /// Adds entries behind the last one. They can be read when this returns, and are durable when `done` is told so.
    /// Fails when they would overwrite entries or leave a hole (`InvalidInput`), and when the log has failed or is
    /// closed; then nothing was added, and `done` gets the same error.
    pub fn append(&self, entries: Vec<Entry>, done: Done) -> io::Result<()> {
        self.shared().submit(&self.group, Some(done), |state| {
            if entries
                .iter()
                .any(|entry| entry.payload.len() > PAYLOAD_MAX)
            {
                return Err(invalid("an entry is larger than 1 GiB"));
            }
            let stamp = state.append(&entries)?;
            Ok(Some(What::Entries(stamp, entries)))
        })
    }

    /// Replaces the group's vote. `done` learns of every outcome.
    pub fn save_vote(&self, vote: Bytes, done: Done) {
        let saved = self.shared().submit(&self.group, Some(done), |state| {
            if vote.len() > PAYLOAD_MAX {
                return Err(invalid("a vote is larger than 1 GiB"));
            }
            state.vote = Some(vote.clone());
            Ok(Some(What::Vote(vote)))
        });
        // The callback was told.
        drop(saved);
    }

    /// The newest vote handed in, durable or not.
    #[must_use]
    pub fn vote(&self) -> Option<Bytes> {
        locked(&self.group.state).vote.clone()
    }

    /// Remembers how far the group had committed. Not synced by itself: after a crash an older mark may be found.
    pub fn save_committed(&self, committed: Option<LogId>) -> io::Result<()> {
        let mut state = locked(&self.group.state);
        let mut queue = locked(&self.shared().queue);
        match &queue.condition {
            Condition::Open => {}
            closed => return Err(closed.error()),
        }
        state.committed = committed;
        queue.committed.insert(self.group.number, committed);
        Ok(())
    }

    #[must_use]
    pub fn committed(&self) -> Option<LogId> {
        locked(&self.group.state).committed
    }

    /// Removes entries behind index `keep`, or all that are not purged. They are gone for readers when this returns,
    /// and on disk before anything handed in later. `InvalidInput` when `keep` lies before the purge mark.
    pub fn truncate_after(&self, keep: Option<u64>) -> io::Result<()> {
        self.shared().submit(&self.group, None, |state| {
            let (last, removed) = state.truncate(keep)?;
            Ok(removed.then_some(What::Truncate(last)))
        })
    }

    /// Forgets entries up to `upto`, which need not exist here. Segments that nothing lives in any more are freed
    /// after the mark is durable. `done` learns of every outcome; an older mark than the present one changes nothing.
    pub fn purge(&self, upto: LogId, done: Done) {
        let purged = self.shared().submit(&self.group, Some(done), |state| {
            if upto.index == u64::MAX {
                return Err(invalid("index is too large"));
            }
            Ok(state.purge(upto).then_some(What::Purge(upto)))
        });
        // The callback was told.
        drop(purged);
    }

    /// The newest entry, or the purge mark when no entry is left.
    #[must_use]
    pub fn last(&self) -> Option<LogId> {
        locked(&self.group.state).last()
    }

    /// The oldest entry's index.
    #[must_use]
    pub fn first(&self) -> Option<u64> {
        locked(&self.group.state).first()
    }

    #[must_use]
    pub fn purged(&self) -> Option<LogId> {
        locked(&self.group.state).purged
    }

    /// The id of an entry that exists, without reading it.
    #[must_use]
    pub fn id(&self, index: u64) -> Option<LogId> {
        locked(&self.group.state).id(index)
    }

    /// The first existing entry of each (term, node), in order. Nothing is read for it.
    #[must_use]
    pub fn leader_starts(&self) -> Vec<LogId> {
        let state = locked(&self.group.state);
        state
            .first()
            .map_or_else(Vec::new, |_| state.leader_starts())
    }

    /// Entries of `range` in order, from the first that exists on, until `max_bytes` of payload are reached; at
    /// least one if there is one. Recent ones come from memory, others from disk, which may block. `InvalidData`
    /// when an entry's bytes on disk are not what was written.
    pub fn read(&self, range: Range<u64>, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let found = self.find(range, max_bytes)?;
        let entry = |(found, segment)| self.entry(found, segment);
        found.into_iter().map(entry).collect()
    }

    /// Collects what memory has, and files for the rest: while such a file is held, it is not written anew.
    fn find(
        &self,
        range: Range<u64>,
        max_bytes: usize,
    ) -> io::Result<Vec<(Found, Option<Arc<Segment>>)>> {
        let state = locked(&self.group.state);
        let found = state.find(range, max_bytes);
        let segments = self
            .shared()
            .segments
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let with_file = |found| match &found {
            Found::Here(_) => Ok((found, None)),
            Found::There(id, slot) => match segments.get(&slot.segment) {
                Some(segment) => Ok((found, Some(segment.clone()))),
                None => Err(io::Error::other(format!(
                    "entry {} has no segment",
                    id.index
                ))),
            },
        };
        found.into_iter().map(with_file).collect()
    }

    fn entry(&self, found: Found, segment: Option<Arc<Segment>>) -> io::Result<Entry> {
        match (found, segment) {
            (Found::Here(entry), _) => Ok(entry),
            (Found::There(id, _), None) => Err(io::Error::other(format!(
                "entry {} has no segment",
                id.index
            ))),
            (Found::There(id, slot), Some(segment)) => {
                let expected = Frame {
                    kind: Kind::Entry,
                    tag: slot.kind,
                    group: self.group.number,
                    id,
                    payload: &[],
                };
                let payload = segment.read(slot.offset, slot.length, expected)?;
                let kind = slot.kind;
                Ok(Entry { id, kind, payload })
            }
        }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.log.0.shared
    }
}
