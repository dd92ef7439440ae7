//! The thread that writes: it takes everything that waits, writes it, syncs once, and tells everybody.
//!
//! There is no timer: while the disk syncs, the next batch gathers.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::storage::disk::DirLock;
use crate::storage::frame::{self, Frame, Kind};
use crate::storage::group::{Group, Placed};
use crate::storage::index::Slot;
use crate::storage::log::{Condition, Shared};
use crate::storage::outgoing::{Outgoing, Stamp};
use crate::storage::seal::{ALWAYS, PER_ENTRY, PER_STRETCH};
use crate::storage::segment::{self, Segment};
use crate::storage::spares::{Need, Spares};
use crate::storage::track::{Sheet, Track};
use crate::storage::{Done, Entry, LogId, Options, locked};

/// A segment of which half was filled sooner is taken for one of a bulk transfer: a node that catches up.
const BULK: Duration = Duration::from_millis(300);

/// A batch is handed to the file in pieces of about this size.
pub(super) const PIECE: usize = 1 << 20;

/// Something to be written, in the order in which it was handed in.
pub(super) struct Record {
    pub(super) group: Arc<Group>,
    pub(super) what: What,
    /// Whoever waits for it to be durable. A batch in which nobody waits is not synced.
    pub(super) done: Option<Done>,
}

pub(super) enum What {
    /// Entries, and the stamp of the first.
    Entries(u64, Summed),
    Vote(Bytes),
    Truncate(Option<LogId>),
    Purge(LogId),
    /// Replacements for entries that were lost.
    Repair(Summed),
    /// Nothing of its own: durable when everything before it is.
    Barrier,
}

/// Entries with [`frame::sum_of`] of each payload: summed by whoever hands them in, while the disk is busy.
pub(super) struct Summed {
    pub(super) entries: Vec<Entry>,
    sums: Vec<u32>,
}

impl Summed {
    pub(super) fn new(entries: Vec<Entry>) -> Self {
        let sums = entries.iter().map(|entry| frame::sum_of(&entry.payload));
        Self {
            sums: sums.collect(),
            entries,
        }
    }

    fn iter(&self) -> impl Iterator<Item = (&Entry, u32)> {
        self.entries.iter().zip(self.sums.iter().copied())
    }
}

impl Record {
    /// Bytes it will take in a segment.
    pub(super) fn size(&self) -> usize {
        match &self.what {
            What::Entries(_, Summed { entries, .. }) | What::Repair(Summed { entries, .. }) => {
                let payloads: usize = entries.iter().map(|entry| entry.payload.len()).sum();
                payloads + entries.len() * frame::HEADER
            }
            What::Vote(vote) => vote.len() + frame::HEADER,
            What::Truncate(_) | What::Purge(_) => frame::HEADER,
            What::Barrier => 0,
        }
    }
}

/// Everything that waited at one moment.
#[derive(Default)]
struct Batch {
    records: VecDeque<Record>,
    /// The newest committed mark of each group.
    committed: HashMap<u32, Option<LogId>>,
}

/// Owns the end of the log. What it holds in `tracks` is the state as of the last record it took.
pub(super) struct Writer {
    pub(super) shared: Arc<Shared>,
    options: Options,
    spares: Spares,
    tracks: HashMap<u32, Track>,
    pub(super) active: Arc<Segment>,
    /// Where `buffer` goes in the active segment.
    end: u64,
    /// How far the active segment is durable.
    synced: u64,
    /// End of the active segment's head.
    head_end: u64,
    /// About what sealing the active segment will add to it.
    ending: u64,
    pub(super) buffer: Outgoing,
    /// Repaired entries that are not durable yet.
    repaired: Vec<(Arc<Group>, LogId, Placed)>,
    asked_for_spare: bool,
    /// When the active segment became that.
    began: Instant,
    /// Something happened since the last sync that may have freed a segment.
    may_free: bool,
    /// Payloads in memory that the disk has too, oldest first.
    tail: VecDeque<Kept>,
    tail_bytes: usize,
    batch: Batch,
    _lock: DirLock,
}

struct Kept {
    group: Arc<Group>,
    stamp: u64,
    bytes: usize,
}

/// What a writer starts from.
pub(super) struct Start {
    pub(super) shared: Arc<Shared>,
    pub(super) options: Options,
    pub(super) spares: Spares,
    pub(super) tracks: HashMap<u32, Track>,
    pub(super) lock: DirLock,
}

impl Writer {
    /// Continues the segment at `end`, which is durable so far.
    pub(super) fn resume(start: Start, active: Arc<Segment>, end: u64) -> Self {
        let sheets = start.tracks.values().map(|track| &track.sheet);
        let entries = |sheet: &Sheet| (sheet.slots.len() + sheet.repaired.len()) as u64;
        let stretches =
            |sheet: &Sheet| (usize::from(!sheet.slots.is_empty()) + sheet.repaired.len()) as u64;
        let ending =
            sheets.map(|sheet| entries(sheet) * PER_ENTRY + stretches(sheet) * PER_STRETCH);
        let ending = ALWAYS + ending.sum::<u64>();
        Self {
            shared: start.shared,
            options: start.options,
            spares: start.spares,
            tracks: start.tracks,
            active,
            end,
            synced: end,
            head_end: 0,
            ending,
            buffer: Outgoing::default(),
            repaired: Vec::new(),
            asked_for_spare: false,
            began: Instant::now(),
            may_free: true,
            tail: VecDeque::new(),
            tail_bytes: 0,
            batch: Batch::default(),
            _lock: start.lock,
        }
    }

    /// Begins with a new segment of this number.
    pub(super) fn create(start: Start, number: u32) -> io::Result<Self> {
        let (active, end) = begin(&start.shared, &start.spares, &start.tracks, number)?;
        let mut writer = Self::resume(start, active, end);
        writer.head_end = end;
        Ok(writer)
    }

    /// Runs until the log is closed or fails.
    pub(super) fn run(mut self) {
        let result = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let failure = match result {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => io::Error::other("a callback of the log panicked"),
        };
        tracing::error!(error = %failure, "the log cannot be written; nothing more is acknowledged");
        let condition = Condition::failed(&failure);
        let waiting = {
            let mut queue = locked(&self.shared.queue);
            queue.condition = condition.clone();
            std::mem::take(&mut queue.records)
        };
        self.shared.counters.waiting.store(0, Relaxed);
        for done in self
            .batch
            .records
            .drain(..)
            .chain(waiting)
            .filter_map(|record| record.done)
        {
            done(Err(condition.error()));
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        while self.wait() {
            self.write_batch()?;
            let size = self.batch.records.iter().map(Record::size).sum();
            self.shared.counters.waiting.fetch_sub(size, Relaxed);
            while let Some(record) = self.batch.records.pop_front() {
                if let Some(done) = record.done {
                    done(Ok(()));
                }
            }
        }
        self.close()
    }

    /// Takes what waits, as soon as somebody waits for it. `false` when the log is closing and nothing is left.
    fn wait(&mut self) -> bool {
        let mut queue = locked(&self.shared.queue);
        while !queue.urgent && queue.condition == Condition::Open {
            queue = (self.shared.wake.wait(queue)).unwrap_or_else(PoisonError::into_inner);
        }
        queue.urgent = false;
        self.batch.records = std::mem::take(&mut queue.records).into();
        self.batch.committed = std::mem::take(&mut queue.committed);
        !(self.batch.records.is_empty() && self.batch.committed.is_empty())
    }

    fn write_batch(&mut self) -> io::Result<()> {
        let mut batch = std::mem::take(&mut self.batch);
        let result = self.put_batch(&batch);
        batch.committed.clear();
        let awaited = batch.records.iter().any(|record| record.done.is_some());
        self.batch = batch;
        result?;
        self.flush()?;
        if awaited {
            self.sync()?;
            self.free_segments();
        }
        self.evict();
        self.shared.counters.batches.fetch_add(1, Relaxed);
        Ok(())
    }

    fn put_batch(&mut self, batch: &Batch) -> io::Result<()> {
        for record in &batch.records {
            self.put_record(record)?;
        }
        for (group, id) in &batch.committed {
            self.put(&Frame::mark(Kind::Committed, *group, *id))?;
            self.tracks.entry(*group).or_default().committed = *id;
        }
        Ok(())
    }

    fn put_record(&mut self, record: &Record) -> io::Result<()> {
        let group = record.group.number;
        match &record.what {
            What::Entries(stamp, summed) => self.put_entries(&record.group, *stamp, summed)?,
            What::Vote(vote) => {
                self.put(&Frame {
                    group,
                    payload: vote,
                    ..Frame::bare(Kind::Vote)
                })?;
                self.track(group).vote = Some(vote.clone());
            }
            What::Truncate(keep) => {
                self.put(&Frame::mark(Kind::Truncate, group, *keep))?;
                self.track(group).truncate(*keep);
                self.may_free = true;
            }
            What::Purge(upto) => {
                self.put(&Frame::mark(Kind::Purge, group, Some(*upto)))?;
                self.track(group).purge(*upto);
                self.may_free = true;
            }
            What::Repair(summed) => self.put_repaired(&record.group, summed)?,
            What::Barrier => {}
        }
        Ok(())
    }

    fn put_entries(&mut self, group: &Arc<Group>, stamp: u64, summed: &Summed) -> io::Result<()> {
        let mut places = Vec::with_capacity(summed.entries.len());
        let mut placed = 0;
        for (entry, sum) in summed.iter() {
            let frame = entry_frame(Kind::Entry, group.number, entry);
            if self.is_full_for(&frame) {
                // Sealing must know of all that the segment holds.
                locked(&group.state).place(stamp + placed, &places);
                placed += places.len() as u64;
                places.clear();
            }
            let place = self.put_summed(&frame, &entry.payload, sum)?;
            let slot = Slot::of(place.1, entry)?;
            let track = self.track(group.number);
            track.append(entry.id, slot);
            let begins = track.sheet.slots.len() == 1;
            self.ending += PER_ENTRY + if begins { PER_STRETCH } else { 0 };
            places.push(place);
        }
        locked(&group.state).place(stamp + placed, &places);
        for (stamp, entry) in (stamp..).zip(&summed.entries) {
            let bytes = entry.payload.len();
            self.tail_bytes += bytes;
            self.tail.push_back(Kept {
                group: group.clone(),
                stamp,
                bytes,
            });
        }
        Ok(())
    }

    fn put_repaired(&mut self, group: &Arc<Group>, summed: &Summed) -> io::Result<()> {
        for (entry, sum) in summed.iter() {
            let frame = entry_frame(Kind::Repaired, group.number, entry);
            let place = self.put_summed(&frame, &entry.payload, sum)?;
            let (segment, slot) = (place.0, Slot::of(place.1, entry)?);
            self.track(group.number).repair(entry.id, slot);
            self.ending += PER_ENTRY + PER_STRETCH;
            let placed = Placed { segment, slot };
            self.repaired.push((group.clone(), entry.id, placed));
        }
        Ok(())
    }

    pub(super) fn track(&mut self, group: u32) -> &mut Track {
        self.tracks.entry(group).or_default()
    }

    /// Puts a frame at the log's end, in a new segment when it no longer fits, and returns where it will stand.
    fn put(&mut self, frame: &Frame<'_>) -> io::Result<(u32, u32)> {
        self.put_with(frame, |buffer, stamp| buffer.put(frame, stamp))
    }

    /// Like [`Writer::put`], of a frame with this payload, whose sum is known.
    fn put_summed(
        &mut self,
        frame: &Frame<'_>,
        payload: &Bytes,
        sum: u32,
    ) -> io::Result<(u32, u32)> {
        self.put_with(frame, |buffer, stamp| {
            buffer.put_summed(frame, payload, sum, stamp);
        })
    }

    fn put_with(
        &mut self,
        frame: &Frame<'_>,
        put: impl FnOnce(&mut Outgoing, Stamp),
    ) -> io::Result<(u32, u32)> {
        if self.is_full_for(frame) {
            self.roll()?;
        }
        let offset = u32::try_from(self.at()).map_err(io::Error::other)?;
        let stamp = self.stamp();
        put(&mut self.buffer, stamp);
        self.shared.counters.frames.fetch_add(1, Relaxed);
        if self.buffer.len() >= PIECE {
            self.flush()?;
        }
        Ok((self.active.number, offset))
    }

    pub(super) fn stamp(&self) -> Stamp {
        Stamp {
            incarnation: self.active.incarnation,
            synced: self.synced,
        }
    }

    fn is_full_for(&self, frame: &Frame<'_>) -> bool {
        let more = frame.size() as u64 + PER_ENTRY + PER_STRETCH + self.ending;
        self.at() + more > self.options.segment_bytes && self.at() > self.head_end
    }

    /// Where the next frame goes.
    pub(super) fn at(&self) -> u64 {
        self.end + self.buffer.len() as u64
    }

    /// How far the active segment was written.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    pub(super) fn synced(&self) -> u64 {
        self.synced
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let (end, length) = (self.at(), self.buffer.len() as u64);
        self.buffer.write(&*self.active.file, self.end)?;
        self.end = end;
        self.active.size.fetch_max(end, Relaxed);
        self.shared.counters.bytes.fetch_add(length, Relaxed);
        self.buffer.shrink_to(2 * PIECE);
        if !self.asked_for_spare && self.end > self.options.segment_bytes / 2 {
            self.asked_for_spare = true;
            let need = match self.began.elapsed() < BULK {
                true => Need::Bulk,
                false => Need::Appends,
            };
            self.spares.prepare(need);
        }
        Ok(())
    }

    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.active.file.sync()?;
        self.synced = self.end;
        self.shared.counters.syncs.fetch_add(1, Relaxed);
        for (group, id, placed) in self.repaired.drain(..) {
            locked(&group.state).patch(id, placed);
        }
        Ok(())
    }

    /// Ends the active segment, durably, and goes on in the next one.
    fn roll(&mut self) -> io::Result<()> {
        self.seal()?;
        let next = self.active.number + 1;
        let (active, end) = begin(&self.shared, &self.spares, &self.tracks, next)?;
        (self.active, self.end, self.synced, self.head_end) = (active, end, end, end);
        self.ending = ALWAYS;
        self.asked_for_spare = false;
        self.began = Instant::now();
        self.may_free = true;
        Ok(())
    }

    /// Lets go of sealed segments that hold no live entry. All that made them so is durable by now.
    fn free_segments(&mut self) {
        if !std::mem::take(&mut self.may_free) {
            return;
        }
        let used: HashSet<u32> = self.tracks.values().flat_map(Track::segments).collect();
        let active = self.active.number;
        // What cannot be read may be all that is left of an entry: kept until all of them were replaced or purged,
        // durably. What readers see is ahead of that.
        let holes = self.tracks.values().any(Track::has_holes);
        let mut segments = self
            .shared
            .segments
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let freed = segments.extract_if(.., |number, segment| {
            let kept = holes && segment.damaged.load(Relaxed);
            *number != active && !used.contains(number) && !kept
        });
        for (_, segment) in freed {
            self.spares.recycle(segment);
        }
    }

    /// Keeps the tail within its limit. Only what the file has already is let go.
    fn evict(&mut self) {
        while self.tail_bytes > self.options.tail_bytes
            && let Some(oldest) = self.tail.pop_front()
        {
            self.tail_bytes -= oldest.bytes;
            locked(&oldest.group.state).evict(oldest.stamp);
        }
    }

    /// Leaves a mark by which the next start knows that everything before was durable.
    fn close(&mut self) -> io::Result<()> {
        if self.synced < self.end {
            self.sync()?;
        }
        self.put(&Frame::bare(Kind::Close))?;
        self.flush()?;
        self.sync()
    }
}

fn entry_frame(kind: Kind, group: u32, entry: &Entry) -> Frame<'_> {
    Frame {
        kind,
        tag: entry.kind,
        group,
        id: entry.id,
        payload: &entry.payload,
    }
}

impl Slot {
    fn of(offset: u32, entry: &Entry) -> io::Result<Self> {
        Ok(Self {
            offset,
            length: u32::try_from(entry.payload.len()).map_err(io::Error::other)?,
            kind: entry.kind,
        })
    }
}

/// Makes the next segment: header and head durable first, the name afterwards.
fn begin(
    shared: &Shared,
    spares: &Spares,
    tracks: &HashMap<u32, Track>,
    number: u32,
) -> io::Result<(Arc<Segment>, u64)> {
    let incarnation = segment::new_incarnation()?;
    let head = segment::opening(
        number,
        incarnation,
        tracks.iter().map(|(group, track)| (*group, track)),
    );
    let spare = spares.take()?;
    spare.file.write_at(&head, 0)?;
    spare.file.sync()?;
    shared.disk.rename(&spare.name, &segment::name(number))?;
    shared.disk.sync_dir()?;
    shared.counters.syncs.fetch_add(1, Relaxed);
    shared.counters.bytes.fetch_add(head.len() as u64, Relaxed);
    let segment = Arc::new(Segment::new(number, incarnation, spare.file)?);
    let mut segments = shared
        .segments
        .write()
        .unwrap_or_else(PoisonError::into_inner);
    segments.insert(number, segment.clone());
    Ok((segment, head.len() as u64))
}
