//! The handle of the node's log, and what it shares with the writer, the readers and the scrubber.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::thread::{self, JoinHandle};

use crate::storage::cache::Cache;
use crate::storage::disk::{Disk, RealDisk};
use crate::storage::frame::{Frame, Kind};
use crate::storage::group::{Group, State};
use crate::storage::group_log::GroupLog;
use crate::storage::recover::{End, recover};
use crate::storage::scrub::{self, Scrubbed, Stop};
use crate::storage::segment::Segment;
use crate::storage::snapshot::SnapshotFile;
use crate::storage::spares::Spares;
use crate::storage::writer::{Record, Start, What, Writer};
use crate::storage::{Done, Error, LogId, Options, Owner, identity, locked};
use crate::types::GroupId;

const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = (4 << 10)..=(2 << 30);

/// A node's log. Clones are the same log. Close it with [`Log::close`]; when the last handle is dropped without, what
/// was handed in is still written, but nobody waits for it.
#[derive(Clone, Debug)]
pub struct Log(Arc<Handle>);

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
    /// What their files take, with what was written ahead; spare ones are not counted.
    pub bytes_on_disk: u64,
    /// Entries that exist but cannot be read.
    pub holes: u64,
    /// Bytes of sealed segments that were read to find damage.
    pub scrubbed_bytes: u64,
    /// Times that all sealed segments were read so.
    pub scrub_rounds: u64,
}

/// Told of entries that turned out to be unreadable, by the thread that tried to read them. Must be quick.
pub type OnDamage = Box<dyn Fn(GroupId, Range<u64>) + Send + Sync>;

#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
    directory_id: String,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What handles, readers and the writer share. Lock order: a group's state, then `queue` or `segments`; no lock is
/// held across I/O.
pub(super) struct Shared {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) queue: Mutex<Queue>,
    pub(super) wake: Condvar,
    pub(super) groups: Mutex<HashMap<u32, Arc<Group>>>,
    pub(super) segments: RwLock<BTreeMap<u32, Arc<Segment>>>,
    pub(super) indexes: Mutex<Cache>,
    pub(super) on_damage: Mutex<Option<Arc<OnDamage>>>,
    pub(super) scrub: Stop,
    pub(super) counters: Counters,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) syncs: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) frames: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) waiting: AtomicUsize,
    pub(super) scrubbed_bytes: AtomicU64,
    pub(super) scrub_rounds: AtomicU64,
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

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { disk, queue, .. } = self;
        write!(f, "Shared {{ {disk:?}, {queue:?} }}")
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
    /// Opens the directory's log, creating it for `owner` when the directory is new or empty. Reads and verifies the
    /// newest segment, and the directories of the others: call it where blocking is allowed.
    ///
    /// Entries that older segments have lost do not hinder it: see [`GroupLog::holes`].
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
        // The names found may be those that a process gave which died, or failed, before they were durable.
        disk.sync_dir().map_err(Error::io("sync", &dir))?;
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
            indexes: Mutex::new(Cache::new(options.index_bytes)),
            on_damage: Mutex::default(),
            scrub: Stop::default(),
            counters: Counters::default(),
        });
        let mut threads = vec![spares_thread];
        let scrub_rate = options.scrub_bytes_per_second;
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
        // The writer ends first: its end is what the spares wait for.
        threads.insert(0, thread);
        let scrubber = scrub::start(&shared, scrub_rate);
        let scrubber = scrubber.map_err(|error| {
            shared.stop();
            Error::io("start a thread for", &dir)(error)
        })?;
        threads.extend(scrubber);
        Ok(Self(Arc::new(Handle {
            shared,
            directory_id: identity.directory_id,
            threads: Mutex::new(threads),
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
        GroupLog::new(
            self.clone(),
            groups.entry(group.0).or_insert_with(new).clone(),
        )
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
        let shared = &self.0.shared;
        let counters = &shared.counters;
        let holes = shared.holes();
        let segments = shared.segments();
        Stats {
            syncs: counters.syncs.load(Relaxed),
            batches: counters.batches.load(Relaxed),
            frames: counters.frames.load(Relaxed),
            bytes: counters.bytes.load(Relaxed),
            waiting_bytes: counters.waiting.load(Relaxed),
            segments: segments.len(),
            bytes_on_disk: segments
                .values()
                .map(|segment| segment.size.load(Relaxed))
                .sum(),
            holes,
            scrubbed_bytes: counters.scrubbed_bytes.load(Relaxed),
            scrub_rounds: counters.scrub_rounds.load(Relaxed),
        }
    }

    /// Whether the log still takes records. Once a write or sync has failed it never does again, until opened anew.
    ///
    /// # Errors
    /// What made it fail.
    pub fn health(&self) -> io::Result<()> {
        match &locked(&self.0.shared.queue).condition {
            failed @ Condition::Failed(..) => Err(failed.error()),
            Condition::Open | Condition::Closed => Ok(()),
        }
    }

    /// Has `callback` told of every entry that turns out to be unreadable from now on, by a reader or by the
    /// scrubber. Replaces the one before. Entries known to be missing already: [`GroupLog::holes`].
    pub fn on_damage(&self, callback: OnDamage) {
        *locked(&self.0.shared.on_damage) = Some(Arc::new(callback));
    }

    /// Reads all sealed segments once, as fast as it goes, and verifies every frame. Damage found is reported and
    /// turned into holes as when entries are read. Blocks.
    ///
    /// # Errors
    /// When the log is closed while it runs.
    pub fn scrub_now(&self) -> io::Result<Scrubbed> {
        scrub::round(&self.0.shared, |_| !self.0.shared.scrub.is_set())
            .ok_or_else(|| Condition::Closed.error())
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
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
        self.health()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

/// Makes what was recovered durable, and goes on from there.
///
/// What nobody has vouched for may be in the page cache only: because whoever wrote it died before the sync, or because
/// the sync failed, after which the kernel takes it for written and no later sync touches it. So it is written again.
fn writer(start: Start, segments: &[Arc<Segment>], end: Option<End>) -> io::Result<Writer> {
    let (Some(newest), Some(end)) = (segments.last(), end) else {
        return Writer::create(start, 1);
    };
    let End {
        at,
        unsure: mut bytes,
        closed,
        torn,
    } = end;
    if torn {
        tracing::warn!(
            segment = newest.number,
            at,
            "leaving out writes that a crash interrupted; nobody was told of them"
        );
    }
    let from = at - bytes.len() as u64;
    if !closed {
        // Tells what stands behind now from what will.
        Frame::bare(Kind::Close).encode(newest.incarnation, from, &mut bytes);
    }
    newest.file.write_at(&bytes, from)?;
    newest.file.sync()?;
    let end = from + bytes.len() as u64;
    newest.size.fetch_max(end, Relaxed);
    Ok(Writer::resume(start, newest.clone(), end))
}

impl Shared {
    fn stop(&self) {
        let mut queue = locked(&self.queue);
        if queue.condition == Condition::Open {
            queue.condition = Condition::Closed;
        }
        drop(queue);
        self.wake.notify_all();
        self.scrub.set();
    }

    pub(super) fn segments(&self) -> RwLockReadGuard<'_, BTreeMap<u32, Arc<Segment>>> {
        self.segments.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// All groups, in order.
    pub(super) fn all_groups(&self) -> Vec<Arc<Group>> {
        let mut groups: Vec<_> = locked(&self.groups).values().cloned().collect();
        groups.sort_unstable_by_key(|group| group.number);
        groups
    }

    /// Entries that exist and cannot be read.
    pub(super) fn holes(&self) -> u64 {
        let groups = self.all_groups();
        groups
            .iter()
            .map(|group| locked(&group.state).holes().len())
            .sum()
    }

    /// Lets `change` alter a group and, in the same moment, queues the record it returns, if any. So the queue has a
    /// group's records in the order in which its readers saw them take effect.
    pub(super) fn submit(
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
