//! The publisher's side: one ordered lane from this node to whoever leads a shard.
//!
//! A lane keeps every publish until its outcome is known. When the leader changes or the way to it breaks, it opens
//! a new session and sends all of them again, in order; what was stored already is recognised by its idempotency
//! key. So a publish may travel twice but is stored once, and a publisher's order survives every leader.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::channel::Outcome;
use crate::cluster::forward::{self, Inward, Outward};
use crate::cluster::proposer::{Answer, Broken, Proposer, Session};
use crate::stdx::{Backoff, ByteBudget, ByteGrant};
use crate::transport::Transport;
use crate::types::{GroupId, Leadership, NodeId};
use crate::wire::entry;

/// How long a publish waits for an outcome. Longer than an election, shorter than a client's patience.
const PATIENCE: Duration = Duration::from_secs(12);
/// Bytes sent at a time.
const CHUNK_BYTES: usize = 256 * 1024;

/// What a waiting publish costs beside its encoded form, about.
const PENDING_BYTES: usize = 300;

/// Why a publish was not answered with an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too much waits for this shard. Nothing was stored.
    #[error("too much is waiting for the shard")]
    Busy,
    /// No leader was found in time. Nothing was stored.
    #[error("no leader was found in time")]
    NoLeader,
    /// It was sent, and no outcome came in time: it may or may not be stored.
    #[error("no outcome came in time")]
    Indeterminate,
}

pub type Submitted = oneshot::Receiver<Result<Outcome, SubmitError>>;

struct Pending {
    publish: entry::Publish,
    bytes: usize,
    /// `None` once the publisher has been told that time ran out.
    reply_tx: Option<oneshot::Sender<Result<Outcome, SubmitError>>>,
    deadline: Instant,
    sent: bool,
    _grant: ByteGrant,
}

/// A handle to a lane.
#[derive(Clone, Debug)]
pub(super) struct Lane {
    pending_tx: mpsc::UnboundedSender<Pending>,
    budget: ByteBudget,
}

impl Lane {
    /// The handle, and the task's body. `budget` bounds the bytes that wait in this lane.
    pub(super) fn new(ways: Ways, budget: ByteBudget) -> (Self, Task) {
        let (pending_tx, pending_rx) = mpsc::unbounded_channel();
        let task = Task {
            ways,
            pending_rx,
            pending: VecDeque::new(),
        };
        (Self { pending_tx, budget }, task)
    }

    /// Takes a publish in; the order of calls is the order in the log.
    pub(super) fn submit(&self, publish: entry::Publish) -> Result<Submitted, SubmitError> {
        let bytes = publish.encoded_len() + PENDING_BYTES;
        let grant = self.budget.try_take(bytes).ok_or(SubmitError::Busy)?;
        let (reply_tx, reply_rx) = oneshot::channel();
        let pending = Pending {
            publish,
            bytes,
            reply_tx: Some(reply_tx),
            deadline: Instant::now() + PATIENCE,
            sent: false,
            _grant: grant,
        };
        // The task ends with the node only; the dropped reply then says so.
        (self.pending_tx.send(pending)).map_err(|_| SubmitError::NoLeader)?;
        Ok(reply_rx)
    }
}

/// How a lane reaches leaders.
pub(super) struct Ways {
    pub(super) node: NodeId,
    pub(super) group: GroupId,
    pub(super) leadership: watch::Receiver<Leadership>,
    pub(super) proposer: Proposer,
    pub(super) transport: Transport,
}

/// An open session with a leader. Its halves are apart so that one can be waited for while the other is.
struct Way {
    out: Out,
    back: Back,
}

enum Out {
    Here(Session),
    There(Outward),
}

enum Back {
    Here(mpsc::UnboundedReceiver<Answer>),
    There(Inward),
}

/// Publishes on their way out, in the form the way wants.
enum Chunk {
    Here(Vec<entry::Publish>),
    There(Bytes),
}

impl Ways {
    async fn open(&self, leader: NodeId) -> Result<Way, Broken> {
        if leader == self.node {
            let (session, answer_rx) = self.proposer.open();
            return Ok(Way {
                out: Out::Here(session),
                back: Back::Here(answer_rx),
            });
        }
        let opened = forward::open(&self.transport, leader, self.group).await;
        let (outward, inward) = opened.map_err(|err| {
            tracing::debug!(group = %self.group, %leader, error = %err, "leader not reached");
            Broken
        })?;
        Ok(Way {
            out: Out::There(outward),
            back: Back::There(inward),
        })
    }
}

impl Out {
    fn pack(&mut self, publishes: Vec<entry::Publish>) -> Chunk {
        match self {
            Self::Here(_) => Chunk::Here(publishes),
            Self::There(outward) => Chunk::There(outward.pack(&publishes)),
        }
    }

    /// Hands the chunk over and leaves `None`. Waits for room. Cancel-safe: the chunk went whole or is still there.
    async fn send(&mut self, chunk: &mut Option<Chunk>) -> Result<(), Broken> {
        match (self, &*chunk) {
            (Self::Here(session), Some(Chunk::Here(_))) => {
                let room = session.room().await?;
                if let Some(Chunk::Here(publishes)) = chunk.take() {
                    room.send(publishes);
                }
            }
            (Self::There(outward), Some(Chunk::There(frame))) => {
                outward.send(frame.clone()).await?;
                *chunk = None;
            }
            (_, Some(_)) => return Err(Broken),
            (_, None) => {}
        }
        Ok(())
    }
}

impl Back {
    /// The next outcomes, in the order sent. Cancel-safe.
    async fn answer(&mut self) -> Answer {
        match self {
            Self::Here(answer_rx) => answer_rx.recv().await.unwrap_or(Err(Broken)),
            Self::There(inward) => inward.answer().await,
        }
    }
}

/// The lane's state, owned by its task.
///
/// Invariant: `pending` holds every publish without a known outcome, in submission order; the sent ones come first.
pub(super) struct Task {
    ways: Ways,
    pending_rx: mpsc::UnboundedReceiver<Pending>,
    pending: VecDeque<Pending>,
}

impl Task {
    pub(super) async fn run(mut self, token: CancellationToken) -> anyhow::Result<()> {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(200));
        loop {
            let leader = tokio::select! {
                () = token.cancelled() => return Ok(()),
                leader = self.wait_for_work_and_leader() => match leader {
                    Some(leader) => leader,
                    None => return Ok(()),
                },
            };
            let way = tokio::select! {
                () = token.cancelled() => return Ok(()),
                way = self.ways.open(leader) => way,
            };
            if let Ok(way) = way {
                let progressed = tokio::select! {
                    () = token.cancelled() => return Ok(()),
                    progressed = self.run_session(leader, way) => progressed,
                };
                if progressed {
                    backoff.reset();
                }
            }
            let mut leadership = self.ways.leadership.clone();
            leadership.mark_unchanged();
            let pause = tokio::time::sleep(backoff.pause());
            tokio::pin!(pause);
            // Who waits meanwhile keeps being heard, and told when time is up.
            loop {
                self.expire();
                let deadline = self.next_deadline();
                tokio::select! {
                    () = token.cancelled() => return Ok(()),
                    _ = leadership.changed() => break,
                    () = &mut pause => break,
                    pending = self.pending_rx.recv() => match pending {
                        Some(pending) => self.take_in(pending),
                        None => return Ok(()),
                    },
                    () = sleep_until(deadline) => {}
                }
            }
        }
    }

    /// Waits until something is to be sent and someone leads. `None` when the node stops.
    async fn wait_for_work_and_leader(&mut self) -> Option<NodeId> {
        let mut leadership = self.ways.leadership.clone();
        loop {
            if self.pending.is_empty() {
                let pending = self.pending_rx.recv().await?;
                self.pending.push_back(pending);
            }
            if let Some(leader) = leadership.borrow_and_update().leader {
                return Some(leader);
            }
            let deadline = self.next_deadline();
            tokio::select! {
                changed = leadership.changed() => changed.ok()?,
                pending = self.pending_rx.recv() => {
                    let pending = pending?;
                    self.take_in(pending);
                }
                () = sleep_until(deadline) => self.expire(),
            }
        }
    }

    /// Sends and receives until the session breaks or another node leads. Whether any outcome came.
    async fn run_session(&mut self, leader: NodeId, mut way: Way) -> bool {
        let mut leadership = self.ways.leadership.clone();
        let mut next = 0;
        let mut chunk = None;
        let mut progressed = false;
        // Whoever was told that time ran out is not sent again.
        self.pending.retain(|pending| pending.reply_tx.is_some());
        loop {
            if chunk.is_none() && next < self.pending.len() {
                chunk = Some(way.out.pack(self.next_chunk(&mut next)));
            }
            let deadline = self.next_deadline();
            tokio::select! {
                answer = way.back.answer() => match answer {
                    Ok(outcomes) if outcomes.len() <= next => {
                        next -= outcomes.len();
                        progressed = true;
                        self.on_outcomes(outcomes);
                    }
                    _ => return progressed,
                },
                sent = way.out.send(&mut chunk), if chunk.is_some() => {
                    if sent.is_err() {
                        return progressed;
                    }
                }
                changed = leadership.changed() => {
                    let now = leadership.borrow_and_update().leader;
                    if changed.is_err() || now.is_some_and(|now| now != leader) {
                        return progressed;
                    }
                }
                pending = self.pending_rx.recv() => match pending {
                    Some(pending) => self.take_in(pending),
                    None => return progressed,
                },
                () = sleep_until(deadline) => self.on_deadline(),
            }
        }
    }

    /// Takes one publish, and whatever else has come meanwhile.
    fn take_in(&mut self, pending: Pending) {
        self.pending.push_back(pending);
        while let Ok(pending) = self.pending_rx.try_recv() {
            self.pending.push_back(pending);
        }
    }

    fn next_chunk(&mut self, next: &mut usize) -> Vec<entry::Publish> {
        let mut chunk = Vec::new();
        let mut bytes = 0;
        while let Some(pending) = self.pending.get_mut(*next)
            && (chunk.is_empty() || bytes + pending.bytes <= CHUNK_BYTES)
        {
            pending.sent = true;
            bytes += pending.bytes;
            chunk.push(pending.publish.clone());
            *next += 1;
        }
        chunk
    }

    fn on_outcomes(&mut self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            let answered = self
                .pending
                .pop_front()
                .and_then(|pending| pending.reply_tx);
            if let Some(reply_tx) = answered {
                // A publisher that is gone needs no reply.
                let _ = reply_tx.send(Ok(outcome));
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let waiting = self
            .pending
            .iter()
            .find(|pending| pending.reply_tx.is_some());
        waiting.map(|pending| pending.deadline)
    }

    /// Tells publishers whose time is over. Their publishes keep their places while a session is open, since its
    /// outcomes are counted.
    fn on_deadline(&mut self) {
        let now = Instant::now();
        for pending in &mut self.pending {
            if pending.deadline > now {
                return;
            }
            if let Some(reply_tx) = pending.reply_tx.take() {
                let err = match pending.sent {
                    true => SubmitError::Indeterminate,
                    false => SubmitError::NoLeader,
                };
                let _ = reply_tx.send(Err(err));
            }
        }
    }

    /// As `on_deadline`, between sessions: the places go too.
    fn expire(&mut self) {
        self.on_deadline();
        self.pending.retain(|pending| pending.reply_tx.is_some());
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
