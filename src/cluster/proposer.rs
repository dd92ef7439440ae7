//! The leader's side of publishing: gathers what waits for a shard into one Raft entry at a time.
//!
//! One entry is in flight per shard. While it is made durable the next one gathers, so throughput comes from the
//! size of entries; and an entry that fails can never be overtaken by a later one that succeeds, which is what
//! keeps each publisher's order.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::channel::Outcome;
use crate::cluster::clock::Clock;
use crate::cluster::replica::State;
use crate::cluster::upkeep::Upkeep;
use crate::raft::{Group, Response};
use crate::types::{ChannelKey, ChannelName};
use crate::wire::entry;

/// Bytes of publishes in one entry; a single larger publish goes alone.
const ENTRY_BYTES: usize = 512 * 1024;
/// Publishes in one entry.
const ENTRY_PUBLISHES: usize = 8192;
/// How long an entry may take to be committed.
const PROPOSE_PATIENCE: Duration = Duration::from_secs(5);
/// How often a leader looks whether something is due beside publishes.
const TICK: Duration = Duration::from_secs(1);
/// Batches that wait for the proposer beyond the entry in flight. What they hold is paid for by the lanes.
const QUEUE: usize = 256;

/// The session's publishes from here on were not proposed, or their fate is unknown: send them again, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

pub(super) type Answer = Result<Vec<Outcome>, Broken>;

struct Batch {
    session_epoch: u64,
    publishes: Vec<entry::Publish>,
    answer_tx: mpsc::UnboundedSender<Answer>,
}

/// A handle to a shard's proposer.
#[derive(Clone, Debug)]
pub(super) struct Proposer {
    batch_tx: mpsc::Sender<Batch>,
    epoch: Arc<AtomicU64>,
}

/// One publisher's ordered way into the proposer.
///
/// Invariant: answers come in the order of the publishes; after `Broken` nothing sent on this session is proposed.
#[derive(Debug)]
pub(super) struct Session {
    proposer: Proposer,
    epoch: u64,
    answer_tx: mpsc::UnboundedSender<Answer>,
}

impl Proposer {
    /// The handle, and the task's body.
    pub(super) fn new(group: Group, state: State, upkeep: Upkeep, clock: Clock) -> (Self, Task) {
        let (batch_tx, batch_rx) = mpsc::channel(QUEUE);
        let epoch = Arc::new(AtomicU64::new(0));
        let task = Task {
            group,
            state,
            upkeep,
            clock,
            batch_rx,
            epoch: epoch.clone(),
        };
        (Self { batch_tx, epoch }, task)
    }

    /// Opens a session. The answers' channel is unbounded: a session never has more in flight than its lane paid
    /// for.
    pub(super) fn open(&self) -> (Session, mpsc::UnboundedReceiver<Answer>) {
        let (answer_tx, answer_rx) = mpsc::unbounded_channel();
        let session = Session {
            proposer: self.clone(),
            epoch: self.epoch.load(Ordering::Acquire),
            answer_tx,
        };
        (session, answer_rx)
    }
}

impl Session {
    /// Waits while the proposer has too much. `Err` when the node stops. Cancel-safe.
    pub(super) async fn room(&self) -> Result<Room<'_>, Broken> {
        let permit = self.proposer.batch_tx.reserve().await;
        let permit = permit.map_err(|_| Broken)?;
        Ok(Room {
            session: self,
            permit,
        })
    }

    /// Hands publishes over, waiting while the proposer has too much. `Err` when the node stops.
    pub(super) async fn send(&self, publishes: Vec<entry::Publish>) -> Result<(), Broken> {
        self.room().await?.send(publishes);
        Ok(())
    }
}

/// A place in the proposer's queue.
pub(super) struct Room<'a> {
    session: &'a Session,
    permit: mpsc::Permit<'a, Batch>,
}

impl Room<'_> {
    pub(super) fn send(self, publishes: Vec<entry::Publish>) {
        self.permit.send(Batch {
            session_epoch: self.session.epoch,
            publishes,
            answer_tx: self.session.answer_tx.clone(),
        });
    }
}

/// The proposer's state, owned by its task.
pub(super) struct Task {
    group: Group,
    state: State,
    upkeep: Upkeep,
    clock: Clock,
    batch_rx: mpsc::Receiver<Batch>,
    epoch: Arc<AtomicU64>,
}

impl Task {
    pub(super) async fn run(mut self, token: CancellationToken) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(TICK);
        loop {
            let first = tokio::select! {
                () = token.cancelled() => return Ok(()),
                batch = self.batch_rx.recv() => match batch {
                    Some(batch) => Some(batch),
                    None => return Ok(()),
                },
                _ = tick.tick() => None,
            };
            match first {
                Some(first) => self.on_batch(first).await,
                None => self.on_tick().await,
            }
        }
    }

    async fn on_batch(&mut self, first: Batch) {
        let mut batches = vec![first];
        let size = |batch: &Batch| {
            batch
                .publishes
                .iter()
                .map(entry::Publish::encoded_len)
                .sum()
        };
        let mut bytes: usize = size(&batches[0]);
        let mut publishes = batches[0].publishes.len();
        while bytes < ENTRY_BYTES && publishes < ENTRY_PUBLISHES {
            let Ok(batch) = self.batch_rx.try_recv() else {
                break;
            };
            bytes += size(&batch);
            publishes += batch.publishes.len();
            batches.push(batch);
        }
        let epoch = self.epoch.load(Ordering::Acquire);
        batches.retain(|batch| {
            let alive = batch.session_epoch == epoch;
            if !alive {
                answer(batch, Err(Broken));
            }
            alive
        });
        self.propose(batches).await;
    }

    async fn propose(&mut self, mut batches: Vec<Batch>) {
        let counts: Vec<usize> = batches.iter().map(|batch| batch.publishes.len()).collect();
        let mut plan = Plan::default();
        {
            let state = self.state.read();
            for publish in batches
                .iter_mut()
                .flat_map(|batch| batch.publishes.drain(..))
            {
                // A retry of what is stored already needs no entry: retries cost nothing but this look.
                let seen = match makes_record(&publish) && publish.source.is_none() {
                    true => key_of(&publish)
                        .and_then(|key| state.seen(&key, &publish.id, &publish.connection_id)),
                    false => None,
                };
                plan.add(publish, seen);
            }
        }
        let outcomes = match plan.entry(self.clock.now_ms()) {
            None => plan.merge(Vec::new()),
            Some(entry) => match self.propose_in_time(entry).await {
                Some(proposed) => plan.merge(proposed),
                None => None,
            },
        };
        let Some(mut outcomes) = outcomes else {
            // Everything gathered for this epoch may depend on what just failed.
            self.epoch.fetch_add(1, Ordering::AcqRel);
            batches.iter().for_each(|batch| answer(batch, Err(Broken)));
            return;
        };
        for (batch, count) in batches.iter().zip(counts) {
            let rest = outcomes.split_off(count);
            answer(batch, Ok(std::mem::replace(&mut outcomes, rest)));
        }
    }

    /// `None` when the entry's fate is unknown or it was not appended. A leader that is cut off from its majority never
    /// hears of its entries again, so the wait ends with its leadership, and in any case.
    async fn propose_in_time(&self, entry: Bytes) -> Option<Vec<Outcome>> {
        let mut leadership = self.group.leadership();
        let term = leadership.borrow_and_update().term;
        let proposed = tokio::select! {
            proposed = self.group.propose(entry) => proposed,
            _ = leadership.wait_for(|now| now.term != term) => return None,
            () = tokio::time::sleep(PROPOSE_PATIENCE) => return None,
        };
        match proposed {
            Ok((_, Response::Publishes(outcomes))) => Some(outcomes),
            Ok((_, response)) => {
                tracing::error!(?response, "a publish entry was answered as something else");
                None
            }
            Err(err) => {
                tracing::debug!(group = %self.group.id(), error = %err, "entry failed");
                None
            }
        }
    }

    /// Does what is due for the shard's log beside publishing. Publishers get their turn between two entries of it.
    async fn on_tick(&mut self) {
        let mut moved_bytes = 0;
        self.upkeep.note_usage();
        while self.group.leads() {
            let Some(due) = self
                .upkeep
                .look(self.clock.now_ms(), &mut moved_bytes)
                .await
            else {
                return;
            };
            let entry = entry::Entry {
                version: entry::version_of(&due.entry.publishes),
                stamp_ms: self.clock.now_ms(),
                ..due.entry
            };
            let proposed = self.propose_in_time(entry.encode_to_vec().into()).await;
            if proposed.is_none() || !due.more {
                return;
            }
            if let Ok(batch) = self.batch_rx.try_recv() {
                self.on_batch(batch).await;
            }
        }
    }
}

fn answer(batch: &Batch, answer: Answer) {
    // A session that is gone needs no answer.
    let _ = batch.answer_tx.send(answer);
}

/// What of a batch goes into the entry, and what is answered without one.
#[derive(Default)]
struct Plan {
    /// In the order of the publishes; `None`: the entry decides.
    known: Vec<Option<Outcome>>,
    proposed: Vec<entry::Publish>,
}

impl Plan {
    fn add(&mut self, publish: entry::Publish, seen: Option<crate::types::Serial>) {
        self.known
            .push(seen.map(|first| Outcome::Duplicate(Some(first))));
        if seen.is_none() {
            self.proposed.push(publish);
        }
    }

    /// The encoded entry; `None` when nothing is to be proposed.
    fn entry(&mut self, stamp_ms: u64) -> Option<Bytes> {
        let publishes = std::mem::take(&mut self.proposed);
        let entry = entry::Entry {
            version: entry::version_of(&publishes),
            stamp_ms,
            publishes,
            ..Default::default()
        };
        (!entry.publishes.is_empty()).then(|| entry.encode_to_vec().into())
    }

    /// All outcomes in order; `None` when the entry's do not fit the plan.
    fn merge(self, proposed: Vec<Outcome>) -> Option<Vec<Outcome>> {
        let mut proposed = proposed.into_iter();
        let merged = self
            .known
            .into_iter()
            .map(|known| known.or_else(|| proposed.next()));
        let merged: Option<Vec<Outcome>> = merged.collect();
        merged.filter(|_| proposed.next().is_none())
    }
}

/// Whether the publish holds anything; without, it only says who attends the connection.
fn makes_record(publish: &entry::Publish) -> bool {
    (publish.presence.as_ref()).is_none_or(|presence| !presence.changes.is_empty())
}

/// The channel a publish names, if it is one that can exist.
fn key_of(publish: &entry::Publish) -> Option<ChannelKey> {
    Some(ChannelKey {
        app: publish.app.parse().ok()?,
        name: ChannelName::parse(&publish.channel).ok()?,
    })
}
