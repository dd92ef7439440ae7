//! One shard on its way into topics: when to begin, produce, commit, abort, go back, build anew.
//!
//! The records of a transaction and the cursor that says so become visible together or not at all; whoever takes over
//! first shuts out the former producer and then reads the cursor. So whatever happens, going back to the last
//! committed cursor is right, and when it is not known which one that is, opening anew tells.

use std::time::{Duration, Instant};

use crate::bridge::cursor::Cursor;
use crate::bridge::status::State;
use crate::stdx::Backoff;

/// When a transaction ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// An open transaction holds back every `read_committed` reader, so it is short.
    pub(super) open_for: Duration,
    pub(super) bytes: usize,
    /// Log entries without anything to export after which the cursor is committed alone, so that a successor need
    /// not read them all again and the log may let go of them.
    pub(super) idle_entries: u64,
    /// Pause before a fenced producer tries again while it still leads: long enough for a former leader to have
    /// noticed, so that two do not take turns.
    pub(super) fenced_pause: Duration,
}

/// A page of the log, ready to be produced.
#[derive(Clone, Debug)]
pub(super) struct Batch<R> {
    pub(super) records: Vec<R>,
    pub(super) bytes: usize,
    /// Complete through this log index.
    pub(super) through: u64,
    /// Of the page's newest record; `None` for a page without records.
    pub(super) incarnation: Option<u16>,
}

/// What to do next; its result comes back through the `on_*` method of the same name, or [`Exporter::on_fault`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step<R> {
    /// Build a producer, shut out the former one, read the cursor back.
    Open,
    /// Read the log after this index; `wait`: until there is something.
    Read {
        after: u64,
        wait: bool,
    },
    Begin,
    Produce(Vec<R>),
    /// Produce the cursor record, then commit.
    Commit(Cursor),
    /// The same commit again: the cursor record is in the transaction already.
    CommitAgain,
    Abort,
    /// Throw the producer away; nothing more is known about it.
    Close,
    Sleep(Duration),
}

/// What a failure asks for, as librdkafka classifies it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The same call may work.
    Retry(String),
    /// The transaction is lost, the producer is not.
    Abort(String),
    /// The producer is lost; whether the transaction was committed is not known.
    Fatal(String),
    /// Someone with the same transactional id came later.
    Fenced,
    /// It will fail again until somebody changes something.
    Blocked(String),
}

/// Totals since this leadership began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) records: u64,
    pub(super) transactions: u64,
    pub(super) aborts: u64,
    pub(super) rebuilds: u64,
}

#[derive(Debug)]
enum Phase<R> {
    Closed,
    /// Between transactions.
    Idle,
    /// A batch waits for its transaction.
    Beginning(Batch<R>),
    Producing(Batch<R>),
    /// Produced; there may be room for more.
    Filling,
    Committing {
        tries: u32,
    },
    Aborting {
        tries: u32,
    },
    Closing,
}

/// The exporter of one shard during one leadership.
///
/// Invariants: `committed` never is ahead of what Kafka has; `position` ≥ `committed.index`, and every exportable
/// record between them is in the open transaction.
#[derive(Debug)]
pub(super) struct Exporter<R> {
    limits: Limits,
    phase: Phase<R>,
    committed: Cursor,
    position: u64,
    incarnation: u16,
    opened: Instant,
    bytes: usize,
    in_transaction: u64,
    pause: Option<Duration>,
    backoff: Backoff,
    state: State,
    /// Blocked by something in a transaction: only a commit shows that it is over.
    stuck: bool,
    counters: Counters,
}

/// Tries of one commit or abort before the producer is given up; each is bounded by the caller's time limit.
const TRIES_MAX: u32 = 10;

impl<R> Exporter<R> {
    pub(super) fn new(limits: Limits, now: Instant) -> Self {
        Self {
            limits,
            phase: Phase::Closed,
            committed: Cursor::default(),
            position: 0,
            incarnation: 0,
            opened: now,
            bytes: 0,
            in_transaction: 0,
            pause: None,
            backoff: Backoff::new(Duration::from_millis(50), Duration::from_secs(10)),
            state: State::Connecting,
            stuck: false,
            counters: Counters::default(),
        }
    }

    pub(super) fn state(&self) -> &State {
        &self.state
    }

    #[cfg(test)]
    fn committed(&self) -> Cursor {
        self.committed
    }

    /// Through which log index there is nothing left to export, in Kafka or by its nature.
    /// The newest log index that a restart need not read again.
    pub(super) const fn committed_through(&self) -> u64 {
        self.committed.index
    }

    pub(super) fn done_through(&self) -> u64 {
        match self.phase {
            Phase::Idle => self.position,
            _ => self.committed.index,
        }
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Between transactions, where stopping costs nothing.
    pub(super) fn is_settled(&self) -> bool {
        matches!(
            self.phase,
            Phase::Closed | Phase::Idle | Phase::Beginning(_)
        )
    }

    /// The next thing to do. A page is read (not waited for) only while the transaction has room.
    pub(super) fn step(&mut self, now: Instant) -> Step<R>
    where
        R: Clone,
    {
        if let Some(pause) = self.pause.take() {
            return Step::Sleep(pause);
        }
        let after = self.position;
        match &self.phase {
            Phase::Closed => Step::Open,
            Phase::Idle => Step::Read { after, wait: true },
            Phase::Beginning(_) => Step::Begin,
            Phase::Producing(batch) => Step::Produce(batch.records.clone()),
            Phase::Filling => {
                let old = now.duration_since(self.opened) >= self.limits.open_for;
                if old || self.bytes >= self.limits.bytes {
                    return self.commit();
                }
                Step::Read { after, wait: false }
            }
            Phase::Committing { .. } => Step::CommitAgain,
            Phase::Aborting { .. } => Step::Abort,
            Phase::Closing => Step::Close,
        }
    }

    fn commit(&mut self) -> Step<R> {
        self.phase = Phase::Committing { tries: 0 };
        Step::Commit(self.cursor())
    }

    fn cursor(&self) -> Cursor {
        Cursor {
            incarnation: self.incarnation,
            index: self.position,
        }
    }

    /// The producer is the only one now, and this is where the former one ended; `None` when there never was one.
    pub(super) fn on_open(&mut self, cursor: Option<Cursor>) {
        let cursor = cursor.unwrap_or_default();
        if cursor < self.committed {
            let known = self.committed.index;
            return self.on_fault(Fault::Blocked(format!(
                "Kafka lost the cursor: it was at {known}, is at {}; going on would double what lies between",
                cursor.index
            )));
        }
        self.committed = cursor;
        self.position = self.committed.index;
        self.incarnation = self.committed.incarnation;
        self.in_transaction = 0;
        self.phase = Phase::Idle;
        self.show_running();
    }

    pub(super) fn on_read(&mut self, batch: Batch<R>) {
        let known = self.committed.index > 0;
        if let Some(incarnation) = batch.incarnation {
            if known && incarnation != self.committed.incarnation {
                let ours = self.committed.incarnation;
                return self.on_fault(Fault::Blocked(format!(
                    "the cursor in Kafka is of incarnation {ours}, the shard's log of {incarnation}"
                )));
            }
            self.incarnation = incarnation;
        }
        self.show_running();
        let through = batch.through.max(self.position);
        let nothing = batch.records.is_empty();
        let far = through.saturating_sub(self.committed.index) >= self.limits.idle_entries;
        match self.phase {
            Phase::Idle if nothing && !far => self.position = through,
            Phase::Idle => self.phase = Phase::Beginning(batch),
            Phase::Filling if nothing => {
                self.position = through;
                self.phase = Phase::Filling;
                // Nothing more is there: do not keep readers waiting for the time limit.
                self.bytes = self.limits.bytes;
            }
            Phase::Filling => self.phase = Phase::Producing(batch),
            _ => {}
        }
    }

    pub(super) fn on_begin(&mut self, now: Instant) {
        if let Phase::Beginning(batch) = std::mem::replace(&mut self.phase, Phase::Closing) {
            self.opened = now;
            self.bytes = 0;
            self.in_transaction = 0;
            self.phase = Phase::Producing(batch);
        }
    }

    pub(super) fn on_produce(&mut self) {
        if let Phase::Producing(batch) = std::mem::replace(&mut self.phase, Phase::Filling) {
            self.position = batch.through.max(self.position);
            self.bytes += batch.bytes;
            self.in_transaction += batch.records.len() as u64;
        }
    }

    pub(super) fn on_commit(&mut self) {
        self.committed = self.cursor();
        self.counters.transactions += 1;
        self.counters.records += self.in_transaction;
        self.in_transaction = 0;
        self.phase = Phase::Idle;
        self.stuck = false;
        self.backoff.reset();
        self.show_running();
    }

    pub(super) fn on_abort(&mut self) {
        self.counters.aborts += 1;
        self.go_back();
        self.phase = Phase::Idle;
    }

    pub(super) fn on_close(&mut self) {
        self.counters.rebuilds += 1;
        self.go_back();
        self.phase = Phase::Closed;
    }

    /// The step failed.
    pub(super) fn on_fault(&mut self, fault: Fault) {
        let pause = self.backoff.pause();
        self.pause = Some(pause);
        let phase = std::mem::replace(&mut self.phase, Phase::Closing);
        let (phase, state) = match (fault, phase) {
            (Fault::Fenced, _) => {
                self.pause = Some(self.limits.fenced_pause);
                (Phase::Closing, State::Fenced)
            }
            // A producer that never opened has nothing to abort, and one that is lost cannot.
            (Fault::Blocked(why), Phase::Closed) => (Phase::Closing, State::Blocked(why)),
            (Fault::Retry(why) | Fault::Abort(why) | Fault::Fatal(why), Phase::Closed) => {
                (Phase::Closing, hampered(&self.state, why))
            }
            (Fault::Fatal(why), _) => (Phase::Closing, hampered(&self.state, why)),
            (Fault::Retry(why), Phase::Committing { tries }) if tries < TRIES_MAX => {
                let tries = tries + 1;
                (Phase::Committing { tries }, State::Lagging(why))
            }
            (Fault::Retry(why) | Fault::Abort(why), Phase::Aborting { tries })
                if tries < TRIES_MAX =>
            {
                let tries = tries + 1;
                (Phase::Aborting { tries }, hampered(&self.state, why))
            }
            (Fault::Blocked(why), Phase::Idle) => (Phase::Idle, State::Blocked(why)),
            (Fault::Retry(why), Phase::Idle) => (Phase::Idle, State::Lagging(why)),
            (Fault::Retry(why), Phase::Beginning(batch)) => {
                (Phase::Beginning(batch), State::Lagging(why))
            }
            // A page that cannot be read ends the transaction but does not spoil what is in it.
            (Fault::Blocked(_) | Fault::Retry(_), Phase::Filling) => {
                self.pause = None;
                self.bytes = self.limits.bytes;
                (Phase::Filling, self.state.clone())
            }
            (Fault::Retry(why) | Fault::Abort(why), Phase::Producing(_) | Phase::Filling)
            | (Fault::Abort(why), Phase::Committing { .. }) => {
                (Phase::Aborting { tries: 0 }, State::Lagging(why))
            }
            (Fault::Blocked(why), Phase::Producing(_) | Phase::Committing { .. }) => {
                self.stuck = true;
                (Phase::Aborting { tries: 0 }, State::Blocked(why))
            }
            (Fault::Blocked(why), _) => (Phase::Closing, State::Blocked(why)),
            (Fault::Retry(why) | Fault::Abort(why), _) => {
                (Phase::Closing, hampered(&self.state, why))
            }
        };
        self.phase = phase;
        self.state = state;
    }

    fn go_back(&mut self) {
        self.position = self.committed.index;
        self.incarnation = self.committed.incarnation;
        self.in_transaction = 0;
    }

    /// Shows that it works again, unless what blocked it has not been tried again.
    fn show_running(&mut self) {
        if !self.stuck {
            self.state = State::Running;
        }
    }
}

/// A state after a failure: what is blocked stays so until it works; what never connected is still connecting.
fn hampered(before: &State, why: String) -> State {
    match before {
        State::Blocked(_) | State::Connecting => before.clone(),
        _ => State::Lagging(why),
    }
}

#[cfg(test)]
mod tests;
