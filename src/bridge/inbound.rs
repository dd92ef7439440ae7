//! One Kafka partition on its way into channels: what to submit, when to go back, how far the floor has come.
//!
//! A window of records is submitted in offset order and pipelined. When one fails, nothing more is submitted until
//! the rest of the window has settled; then everything unsettled is submitted again, from memory. Each submission
//! names its predecessor in the same shard, so the replicated state refuses whatever overtook a failed one. That
//! makes "duplicate" always mean "stored", and the floor (below it all records are in their channels) honest.
//!
//! Offsets are sparse (compaction, control records): only their order means anything.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::bridge::status::State;
use crate::bridge::upstream::{Outcome, PublishError};
use crate::stdx::Backoff;
use crate::types::{Retry, ShardId};

/// How much of a partition may be held at a time; one record is always allowed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) records: usize,
    pub(super) bytes: usize,
}

/// What is to be done with a record that was read.
#[derive(Debug)]
pub(super) enum Work<T> {
    Submit {
        shard: ShardId,
        payload: T,
    },
    /// Its offset counts as done.
    Skip,
    /// Nothing at or after it may be submitted.
    Stop(String),
}

/// One submission; its outcome comes back through [`Partition::on_outcome`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Submission<T> {
    pub(super) offset: i64,
    /// The partition's previous record submitted to the same shard.
    pub(super) after: Option<i64>,
    pub(super) payload: T,
}

/// Totals since this owner began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) stored: u64,
    pub(super) duplicates: u64,
    pub(super) skipped: u64,
    pub(super) retries: u64,
}

#[derive(Debug)]
struct Held<T> {
    offset: i64,
    bytes: usize,
    work: Work<T>,
    progress: Progress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Waiting,
    InFlight,
    Done,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// A submission failed; the others settle first.
    Draining,
    Pausing {
        until: Instant,
    },
    /// A newer owner exists: this one is over.
    Fenced,
    Blocked(String),
}

/// One owned partition, from one epoch's beginning to its end.
///
/// Invariants: `window` is in offset order and its front is not done; `window[..submitted]` are in flight, done, or
/// (while draining) failed; nothing is in flight at or after `submitted`.
#[derive(Debug)]
pub(super) struct Partition<T> {
    limits: Limits,
    floor: Option<i64>,
    next: Option<i64>,
    window: VecDeque<Held<T>>,
    bytes: usize,
    submitted: usize,
    in_flight: usize,
    phase: Phase,
    /// Newest offset submitted to (or known to be in) each shard since the last time everything was settled.
    chain: BTreeMap<ShardId, i64>,
    backoff: Backoff,
    counters: Counters,
}

impl<T: Clone> Partition<T> {
    /// `floor` as a former owner left it; `None` when there was none.
    pub(super) fn new(floor: Option<i64>, limits: Limits) -> Self {
        Self {
            limits,
            floor,
            next: floor,
            window: VecDeque::new(),
            bytes: 0,
            submitted: 0,
            in_flight: 0,
            phase: Phase::Running,
            chain: BTreeMap::new(),
            backoff: Backoff::new(Duration::from_millis(20), Duration::from_secs(5)),
            counters: Counters::default(),
        }
    }

    /// Every record below it is in its channel; `None` while nothing is known.
    pub(super) fn floor(&self) -> Option<i64> {
        self.floor
    }

    /// Where to read on; `None` means from the earliest.
    pub(super) fn next(&self) -> Option<i64> {
        self.next
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    pub(super) fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Nothing more should be read for now.
    pub(super) fn is_full(&self) -> bool {
        self.is_over()
            || self.window.len() >= self.limits.records
            || self.bytes >= self.limits.bytes
    }

    /// Half of the window is free: reading may go on.
    pub(super) fn has_room(&self) -> bool {
        !self.is_over()
            && self.window.len() <= self.limits.records / 2
            && self.bytes <= self.limits.bytes / 2
    }

    pub(super) fn state(&self) -> State {
        match &self.phase {
            Phase::Running | Phase::Draining | Phase::Pausing { .. } => State::Running,
            Phase::Fenced => State::Fenced,
            Phase::Blocked(reason) => State::Blocked(reason.clone()),
        }
    }

    /// Stops the partition for a reason found outside, such as a topic that was created anew.
    pub(super) fn block(&mut self, reason: String) {
        self.end(Phase::Blocked(reason));
    }

    /// Nothing more comes of this ownership: what it holds is let go of, the floor stays.
    fn end(&mut self, phase: Phase) {
        self.phase = phase;
        self.window.clear();
        (self.bytes, self.submitted, self.in_flight) = (0, 0, 0);
    }

    fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Fenced | Phase::Blocked(_))
    }

    /// Kafka itself no longer holds anything below `offset`.
    pub(super) fn skip_to(&mut self, offset: i64) {
        self.next = self.next.max(Some(offset));
        if self.window.is_empty() {
            self.floor = self.floor.max(Some(offset));
        }
    }

    /// Takes the next record that was read. One that was read before is ignored.
    pub(super) fn offer(&mut self, offset: i64, bytes: usize, work: Work<T>) {
        if self.is_over() || self.next.is_some_and(|next| offset < next) {
            return;
        }
        self.next = Some(offset + 1);
        self.bytes += bytes;
        let progress = match work {
            Work::Skip => Progress::Done,
            Work::Submit { .. } | Work::Stop(_) => Progress::Waiting,
        };
        self.counters.skipped += u64::from(progress == Progress::Done);
        self.window.push_back(Held {
            offset,
            bytes,
            work,
            progress,
        });
        self.settle();
    }

    /// The next thing to submit, in offset order.
    pub(super) fn poll(&mut self, now: Instant) -> Option<Submission<T>> {
        if let Phase::Pausing { until } = self.phase
            && until <= now
        {
            self.phase = Phase::Running;
        }
        if self.phase != Phase::Running {
            return None;
        }
        while let Some(held) = self.window.get_mut(self.submitted) {
            match &held.work {
                Work::Stop(reason) => {
                    let reason = format!("record at offset {}: {reason}", held.offset);
                    if self.submitted == 0 {
                        self.block(reason);
                    }
                    return None;
                }
                Work::Skip => self.submitted += 1,
                Work::Submit { shard, payload } => {
                    let after = self.chain.insert(*shard, held.offset);
                    self.submitted += 1;
                    if held.progress == Progress::Done {
                        continue;
                    }
                    held.progress = Progress::InFlight;
                    self.in_flight += 1;
                    return Some(Submission {
                        offset: held.offset,
                        after,
                        payload: payload.clone(),
                    });
                }
            }
        }
        None
    }

    /// When to poll again although nothing happened.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Pausing { until } => Some(until),
            _ => None,
        }
    }

    /// What became of a submission. Returns whether the floor moved.
    pub(super) fn on_outcome(
        &mut self,
        offset: i64,
        outcome: Result<Outcome, PublishError>,
        now: Instant,
    ) -> bool {
        let Ok(at) = self.window.binary_search_by_key(&offset, |h| h.offset) else {
            return false;
        };
        let held = &mut self.window[at];
        if held.progress != Progress::InFlight {
            return false;
        }
        self.in_flight -= 1;
        held.progress = Progress::Waiting;
        match outcome {
            Ok(outcome) => {
                held.progress = Progress::Done;
                match outcome {
                    Outcome::Stored(_) => self.counters.stored += 1,
                    Outcome::Duplicate(_) => self.counters.duplicates += 1,
                }
            }
            Err(PublishError::Fenced) => {
                self.end(Phase::Fenced);
                return false;
            }
            Err(PublishError::Refused(why)) if why.code.retry() == Retry::Never => {
                held.work = Work::Stop(why.to_string());
                self.drain();
            }
            Err(PublishError::Refused(_) | PublishError::Busy | PublishError::Indeterminate(_)) => {
                self.drain();
            }
        }
        let moved = self.settle();
        self.on_drained(now);
        moved
    }

    fn drain(&mut self) {
        if self.phase == Phase::Running {
            self.phase = Phase::Draining;
        }
    }

    /// Once nothing is in flight after a failure: go back to the first unsettled record, after a pause.
    fn on_drained(&mut self, now: Instant) {
        if self.phase == Phase::Draining && self.in_flight == 0 {
            self.submitted = 0;
            self.chain.clear();
            self.counters.retries += 1;
            let until = now + self.backoff.pause();
            self.phase = Phase::Pausing { until };
        }
    }

    /// Lets go of what is done at the front; the floor follows.
    fn settle(&mut self) -> bool {
        let before = self.floor;
        while let Some(front) = self.window.front()
            && front.progress == Progress::Done
        {
            self.floor = Some(front.offset + 1);
            self.bytes -= front.bytes;
            self.submitted = self.submitted.saturating_sub(1);
            self.window.pop_front();
        }
        if self.floor != before && self.phase == Phase::Running {
            self.backoff.reset();
        }
        self.floor != before
    }
}

#[cfg(test)]
mod tests;
