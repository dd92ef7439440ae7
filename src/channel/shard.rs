//! A shard: all its channels, and the positions of the Kafka sources that feed them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;

use crate::channel::archive::{Archive, Archived, ChannelId, Place};
use crate::channel::held::UINT48_MAX;
use crate::channel::index::Index;
use crate::channel::ledger::{Ledger, Mixer};
use crate::channel::presence::Attendant;
use crate::channel::publish::decode;
use crate::channel::read::RecordRef;
use crate::stdx::stable_hash;
use crate::types::{ChannelKey, Serial};
use crate::wire::entry;

/// Entries given to the archive at a time.
const PUT_MAX: usize = 1024;

/// Checks remembered.
const CHECKS_MAX: usize = 8;

/// What may be forgotten is noted once for so many log indexes.
const FORGET_SPAN: u64 = 16;

/// What a replica may choose for itself: nothing that shows in the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Records whose index entries are in memory, for all the shard's channels; older ones go to the archive.
    pub records_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            records_max: 65_536,
        }
    }
}

/// A committed entry that this replica cannot apply. It must stop: going on would make it differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("entry {index} cannot be decoded: {reason}")]
    Undecodable { index: u64, reason: String },
    #[error(
        "entry {index} has version {found}; this build applies up to {}",
        entry::VERSION_MAX
    )]
    NewerVersion { index: u64, found: u32 },
    #[error("entry {index} was applied already; the newest applied is {applied}")]
    OutOfOrder { index: u64, applied: u64 },
    #[error("entry {index} holds more publishes than positions")]
    TooManyPublishes { index: u64 },
    #[error("entry {index} lies beyond the last index there can be")]
    TooFar { index: u64 },
    /// The state is applied in part, and of no use any more: it is to be had from a checkpoint again.
    #[error("entry {index}: the index of older records cannot be used: {reason}")]
    Archive { index: u64, reason: String },
}

/// What became of one publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Stored(Serial),
    /// Seen before; the first one's serial where it is known by id rather than by source position.
    Duplicate(Option<Serial>),
    /// Read from Kafka by an owner that has been replaced.
    Fenced,
    /// Read from Kafka, and the record it must follow is not here. To be sent again after that one.
    Gap,
    /// Names an app or channel that cannot exist; a correct proposer never sends it.
    Invalid,
    /// Presence events that would bring in more members than the channel may have. Nothing was stored.
    Full,
    /// Presence events of which none has an effect, or none at all: no record.
    Unchanged,
    /// A retained record that was appended again, or one that is no longer retained: no record of its own.
    Moved,
}

/// A channel moved on.
#[derive(Clone, Debug)]
pub struct Event {
    pub key: ChannelKey,
    pub record: RecordRef,
    pub publish: entry::Publish,
}

/// What applying one entry did.
#[derive(Debug, Default)]
pub struct Applied {
    /// One for each publish of the entry, in order.
    pub outcomes: Vec<Outcome>,
    pub events: Vec<Event>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SourceState {
    pub(super) epoch: u64,
    pub(super) offset: i64,
}

/// Bridge, topic, partition.
pub(super) type SourceKey = (String, String, i32);

/// Entries `from..=through` were stamped before the clock, which stood at `stamp_ms`: so are their records. A replica
/// that rebuilds records from a horizon between them cannot learn that from the entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Late {
    pub(super) from: u64,
    pub(super) through: u64,
    pub(super) stamp_ms: u64,
}

/// The replicated state of one shard at one log position.
///
/// While `applied < decided` it is being *rebuilt*: all but the records is as of `decided` already, and the records
/// come back from the entries of the log, which decide nothing anew.
///
/// Invariant: unless it is being rebuilt, `timers` holds exactly one element for each channel, at its index's next
/// change; stamps never go back (`clock_ms` is their maximum); no retained record's payload is at or below `horizon`;
/// `attending` is what the channels' attendances add up to.
#[derive(Debug)]
pub struct Shard {
    pub(super) incarnation: u16,
    pub(super) options: Options,
    pub(super) archive: Arc<dyn Archive>,
    pub(super) applied: u64,
    pub(super) decided: u64,
    pub(super) horizon: u64,
    pub(super) clock_ms: u64,
    pub(super) channels: BTreeMap<ChannelKey, Index>,
    pub(super) timers: BTreeSet<(u64, ChannelKey)>,
    pub(super) sources: BTreeMap<SourceKey, SourceState>,
    /// Publishes in the log above the horizon that became no record: whoever reads the log itself must skip them.
    pub(super) dropped: BTreeSet<(u64, u16)>,
    /// Ascending, above the horizon.
    pub(super) late: Vec<Late>,
    pub(super) forgotten: Option<Place>,
    pub(super) ledger: Ledger,
    /// Wrapping sum of the channels' digests.
    pub(super) channels_digest: u64,
    pub(super) checks: Vec<(u64, u64)>,
    /// Connections with members, by who attends them.
    pub(super) attending: BTreeMap<Attendant, BTreeSet<(ChannelKey, String)>>,
    /// Where filling the archive goes on.
    hand: Option<ChannelKey>,
    /// The archive's mark when this state last put something there.
    pub(super) mark: u64,
    /// Channels with archived records that were moved since.
    pub(super) moved_cold: BTreeSet<ChannelKey>,
    /// Up to where the archive may forget a channel, once a checkpoint of the end of a span of entries is durable.
    gone: BTreeMap<(u64, ChannelId), Place>,
}

impl Shard {
    /// An empty shard over an archive that holds nothing of it.
    #[must_use]
    pub fn new(incarnation: u16, options: Options, archive: Arc<dyn Archive>) -> Self {
        Self {
            incarnation,
            options,
            archive,
            applied: 0,
            decided: 0,
            horizon: 0,
            clock_ms: 0,
            channels: BTreeMap::new(),
            timers: BTreeSet::new(),
            sources: BTreeMap::new(),
            dropped: BTreeSet::new(),
            late: Vec::new(),
            forgotten: None,
            ledger: Ledger::default(),
            channels_digest: 0,
            checks: Vec::new(),
            attending: BTreeMap::new(),
            hand: None,
            mark: 0,
            moved_cold: BTreeSet::new(),
            gone: BTreeMap::new(),
        }
    }

    /// Applies the entry at log `index`.
    ///
    /// # Errors
    /// When the entry is not one this build understands: nothing was changed then. When the archive fails: the state
    /// must be dropped then.
    pub fn apply(&mut self, index: u64, payload: Bytes) -> Result<Applied, Error> {
        if index <= self.applied {
            let applied = self.applied;
            return Err(Error::OutOfOrder { index, applied });
        }
        if index > UINT48_MAX {
            return Err(Error::TooFar { index });
        }
        let entry = decode(index, payload)?;
        self.applied = index;
        let applied = match index <= self.decided {
            true => self.rebuild(index, entry),
            false => self.decide(index, entry),
        };
        let applied = applied.and_then(|applied| self.spill().map(|()| applied));
        applied.map_err(|err| archive_error(index, &err))
    }

    /// Notes that an entry without publishes (blank, membership) lies at `index`.
    pub fn skip(&mut self, index: u64) {
        let rebuilding = self.is_rebuilding();
        self.applied = self.applied.max(index);
        if rebuilding && !self.is_rebuilding() {
            self.derive();
        }
    }

    fn decide(&mut self, index: u64, entry: entry::Entry) -> io::Result<Applied> {
        let stamp_ms = entry.stamp_ms.min(UINT48_MAX);
        self.note_late(index, stamp_ms);
        self.clock_ms = self.clock_ms.max(stamp_ms);
        let mut applied = Applied::default();
        for (position, publish) in (0_u16..).zip(entry.publishes) {
            let at = Place { index, position };
            let outcome = self.on_publish(at, publish, &mut applied.events)?;
            applied.outcomes.push(outcome);
        }
        self.expire()?;
        self.raise_horizon(entry.horizon.min(index - 1));
        if entry.check {
            if self.checks.len() == CHECKS_MAX {
                self.checks.remove(0);
            }
            self.checks.push((index, self.digest()));
        }
        Ok(applied)
    }

    fn note_late(&mut self, index: u64, stamp_ms: u64) {
        if stamp_ms >= self.clock_ms {
            return;
        }
        match self.late.last_mut() {
            Some(late) if late.stamp_ms == self.clock_ms => late.through = index,
            _ => self.late.push(Late {
                from: index,
                through: index,
                stamp_ms: self.clock_ms,
            }),
        }
    }

    /// Never past a retained record, whatever the proposer says.
    fn raise_horizon(&mut self, to: u64) {
        self.horizon = self.horizon.max(to.min(self.live_floor()));
        while let Some(oldest) = self.dropped.first()
            && oldest.0 <= self.horizon
        {
            self.dropped.pop_first();
        }
        let gone = (self.late).partition_point(|late| late.through <= self.horizon);
        self.late.drain(..gone);
    }

    fn expire(&mut self) -> io::Result<()> {
        while let Some((due_ms, _)) = self.timers.first()
            && *due_ms <= self.clock_ms
        {
            let Some((_, key)) = self.timers.pop_first() else {
                break;
            };
            let Some(index) = self.channels.get_mut(&key) else {
                continue;
            };
            self.channels_digest = self.channels_digest.wrapping_sub(index.digest());
            let gone = index.expire(self.clock_ms, &mut self.ledger, &*self.archive)?;
            if let Some((id, through)) = gone {
                let span = self.applied / FORGET_SPAN;
                self.gone.insert((span, id), through);
            }
            let needed = !index.is_empty() || index.has_members();
            if !needed && index.forget_ms <= self.clock_ms {
                self.forgotten = self.forgotten.max(index.head);
                self.channels.remove(&key);
            } else {
                self.channels_digest = self.channels_digest.wrapping_add(index.digest());
                self.timers.insert((index.next_change_ms(), key));
            }
        }
        Ok(())
    }

    /// Brings what memory holds below its bound: the older half of one channel's records after the other's, so that
    /// a busy channel does not drive out the quiet ones, nor they it.
    fn spill(&mut self) -> io::Result<()> {
        let max = self.options.records_max;
        if self.ledger.in_memory <= max {
            return Ok(());
        }
        // Somewhat below, so that entries go in batches.
        let target = max - (max / 16).min(PUT_MAX);
        let mut batch = Vec::new();
        while self.ledger.in_memory > target {
            let after = self.hand.take();
            let after = after.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
            let rest = self.channels.range_mut((after, Bound::Unbounded));
            for (key, index) in rest.filter(|(_, index)| !index.records.is_empty()) {
                index.spill(key, &mut self.ledger, &mut batch);
                if batch.len() >= PUT_MAX || self.ledger.in_memory <= target {
                    self.hand = Some(key.clone());
                    break;
                }
            }
            self.put(&mut batch)?;
        }
        Ok(())
    }

    pub(super) fn put(&mut self, batch: &mut Vec<(ChannelId, Archived)>) -> io::Result<()> {
        for part in batch.chunks(PUT_MAX) {
            self.archive.put(part)?;
        }
        self.mark = self.archive.mark();
        batch.clear();
        Ok(())
    }

    /// Notes that a checkpoint of this shard with this `applied`, or a newer one, is durable, so that no older one
    /// will be decoded again. The archive then learns what it may forget, and where archived records were moved to:
    /// not before, since an older checkpoint relies on what was there in its time.
    ///
    /// # Errors
    /// When the archive fails, as for `apply`.
    pub fn checkpointed(&mut self, applied: u64) -> Result<(), Error> {
        while let Some(entry) = self.gone.first_entry()
            && (entry.key().0 + 1) * FORGET_SPAN <= applied
        {
            let ((_, id), through) = entry.remove_entry();
            self.archive.forget(id, through);
        }
        self.flush_moves(applied)
            .map_err(|err| archive_error(self.applied, &err))
    }

    fn flush_moves(&mut self, applied: u64) -> io::Result<()> {
        let mut batch = Vec::new();
        for key in std::mem::take(&mut self.moved_cold) {
            let Some(index) = self.channels.get_mut(&key) else {
                continue;
            };
            if index.flush_moves(applied, &*self.archive, &mut batch)? {
                self.moved_cold.insert(key);
            }
        }
        if batch.is_empty() {
            return Ok(());
        }
        self.put(&mut batch)
    }

    /// Whether records are still to come back from the log: reads are refused until then.
    #[must_use]
    pub const fn is_rebuilding(&self) -> bool {
        self.applied < self.decided
    }

    /// Newest log index applied.
    #[must_use]
    pub const fn applied(&self) -> u64 {
        self.applied
    }

    /// Log index that everything but the records is as of; more than `applied` only while the shard is being rebuilt.
    #[must_use]
    pub fn decided(&self) -> u64 {
        self.decided.max(self.applied)
    }

    /// Entries up to this log index are needed by no record, and by nobody else who has a say.
    #[must_use]
    pub const fn horizon(&self) -> u64 {
        self.horizon
    }

    /// The greatest log index applied that no retained record's payload lies at or below.
    #[must_use]
    pub fn live_floor(&self) -> u64 {
        let first = self.ledger.live.first();
        first.map_or(self.applied, |first| (first - 1).min(self.applied))
    }

    /// Bytes of the retained records' publishes.
    #[must_use]
    pub const fn live_bytes(&self) -> u64 {
        self.ledger.bytes
    }

    /// Newest stamp applied, milliseconds since 1970.
    #[must_use]
    pub const fn clock_ms(&self) -> u64 {
        self.clock_ms
    }

    /// The place after everything applied: where an attachment that wants only what is to come starts.
    #[must_use]
    pub const fn now(&self) -> Serial {
        let index = self.applied;
        let position = u16::MAX;
        Place { index, position }.serial(self.incarnation)
    }

    /// Whether time alone will change something here; a leader without publishes then proposes an empty entry.
    #[must_use]
    pub fn has_due(&self, now_ms: u64) -> bool {
        self.timers.first().is_some_and(|(due, _)| *due <= now_ms)
    }

    /// Newest record of the channel ever, if the channel is remembered.
    #[must_use]
    pub fn head(&self, key: &ChannelKey) -> Option<Serial> {
        let head = self.channels.get(key)?.head?;
        Some(head.serial(self.incarnation))
    }

    /// Whether the publish at this place of the log, above the horizon, became no record. Publishes with `moved` are
    /// never records of their own, whatever this says of them.
    #[must_use]
    pub fn is_dropped(&self, index: u64, position: u16) -> bool {
        self.dropped.contains(&(index, position))
    }

    /// Channels remembered, and records retained in all of them.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        let records = self.ledger.in_memory + self.ledger.archived;
        (self.channels.len(), records)
    }

    /// Records whose index entries are in memory, and in the archive.
    #[must_use]
    pub const fn tiers(&self) -> (usize, usize) {
        (self.ledger.in_memory, self.ledger.archived)
    }

    /// Log index and digest of the last few entries that asked for a check, oldest first.
    #[must_use]
    pub fn checks(&self) -> &[(u64, u64)] {
        &self.checks
    }

    /// A hash of the state, the same on all replicas that applied the same entries, whatever lies in which tier.
    /// Takes time for sources and dropped publishes, not for channels and records.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut mixer = Mixer::new(u64::from(self.incarnation))
            .word(self.clock_ms)
            .word(self.horizon)
            .maybe(self.forgotten)
            .word(self.channels.len() as u64)
            .word(self.channels_digest)
            .word(self.ledger.digest)
            .word(self.ledger.bytes);
        for ((bridge, topic, partition), state) in &self.sources {
            let names = stable_hash(&[bridge.as_bytes(), topic.as_bytes()]);
            mixer = (mixer.word(names))
                .word(u64::from(partition.cast_unsigned()))
                .word(state.offset.cast_unsigned())
                .word(state.epoch);
        }
        for (index, position) in &self.dropped {
            mixer = mixer.word(*index).word(u64::from(*position));
        }
        for late in &self.late {
            mixer = (mixer.word(late.from).word(late.through)).word(late.stamp_ms);
        }
        mixer.finish()
    }
}

fn archive_error(index: u64, err: &io::Error) -> Error {
    let reason = err.to_string();
    Error::Archive { index, reason }
}
