//! Following a channel: a cursor that is woken, never a queue.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::broker::feed::{Feed, Hub, Record};
use crate::channel::{Member, ReadError, Shard};
use crate::cluster::Cluster;
use crate::types::{ChannelKey, ErrorCode, ErrorInfo, Serial};
use crate::wire::ably::PresenceMessage;
use crate::wire::body;

/// Collects which of a connection's followers have something to poll for. Bounded by their number.
#[derive(Debug, Default)]
pub struct Waker {
    ready: Mutex<Vec<u32>>,
    notify: Notify,
}

impl Waker {
    /// Waits until some follower is ready, and takes the slots of all that are. Cancel-safe.
    pub async fn ready(&self) -> Vec<u32> {
        loop {
            let ready = std::mem::take(&mut *self.lock());
            if !ready.is_empty() {
                return ready;
            }
            self.notify.notified().await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        self.ready.lock().unwrap_or_else(|err| err.into_inner())
    }
}

/// What a feed knows of a follower.
#[derive(Debug)]
pub(super) struct Follow {
    number: u64,
    waker: Arc<Waker>,
    slot: u32,
    /// The slot is among the waker's ready ones already.
    woken: AtomicBool,
}

impl Follow {
    fn new(waker: Arc<Waker>, slot: u32) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Self {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            waker,
            slot,
            woken: AtomicBool::new(false),
        }
    }

    /// Unique in this process.
    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            self.waker.lock().push(self.slot);
            self.waker.notify.notify_one();
        }
    }
}

/// Where a follower begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum From {
    #[default]
    Present,
    /// From after this serial; from the present where what follows it is gone.
    After(Serial),
    /// So many messages back from the present, and not further than so many milliseconds.
    Rewind {
        count: usize,
        within_ms: Option<u64>,
    },
}

/// How a follower is to begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Start {
    pub from: From,
    /// Whether the channel's members are wanted.
    pub members: bool,
}

/// A follower that began.
#[derive(Debug)]
pub struct Started {
    pub follower: Follower,
    pub continuity: Continuity,
    /// The channel's members, in the order of client id and connection id, where they were wanted: as of the moment in
    /// which the follower began. Everything that changes them later comes through it.
    pub members: Vec<PresenceMessage>,
    /// That moment: what the members are shows every presence record up to it.
    pub as_of: Serial,
}

/// How a follower began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuity {
    /// From the present, as asked; with `backlog` a rewind found something.
    Fresh { backlog: bool },
    /// From where the reader was; with `backlog` there are records to catch up on.
    Resumed { backlog: bool },
    /// What follows the reader's serial is no longer retained: from the present.
    Lost,
}

/// What a poll found.
#[derive(Debug, Default)]
pub struct Polled {
    /// In order, without a gap after the cursor.
    pub records: Vec<Arc<Record>>,
    /// There may be more at once; otherwise the waker tells.
    pub more: bool,
}

/// The follower cannot go on without a gap. `at` is where it stands now: the present.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{error}")]
pub struct Lost {
    pub at: Serial,
    pub error: ErrorInfo,
}

/// A reader of one channel, on this node.
///
/// Invariant: everything up to `cursor` was handed out or is not wanted, nothing after it was.
#[derive(Debug)]
pub struct Follower {
    cluster: Cluster,
    hub: Arc<Hub>,
    key: ChannelKey,
    feed: Arc<Feed>,
    follow: Arc<Follow>,
    cursor: Serial,
    /// The feed's tail reaches back to the cursor, so far as is known.
    live: bool,
    /// Of what a rewind shows, up to here, ephemeral messages are no part.
    rewound_to: Option<Serial>,
}

impl Follower {
    pub(super) fn start(
        cluster: Cluster,
        hub: &Arc<Hub>,
        key: ChannelKey,
        start: Start,
        waker: Arc<Waker>,
        slot: u32,
    ) -> Started {
        let follow = Arc::new(Follow::new(waker, slot));
        // Joined before the state is read: what is applied in between is found in both and handed out once.
        let feed = hub.join(&key, follow.clone());
        let now_ms = cluster.now_ms();
        let (cursor, continuity, members, as_of) = {
            let state = cluster.state(cluster.shard_of(&key));
            let (cursor, continuity) = begin(&state, &key, start.from, now_ms);
            let members = match start.members {
                true => state.members(&key),
                false => Vec::new(),
            };
            (cursor, continuity, members, state.now())
        };
        let follower = Self {
            cluster,
            hub: hub.clone(),
            key,
            feed,
            follow,
            cursor,
            live: continuity == Continuity::Fresh { backlog: false },
            rewound_to: matches!(start.from, From::Rewind { .. }).then_some(as_of),
        };
        if !follower.live {
            follower.follow.wake();
        }
        Started {
            follower,
            continuity,
            members: listed(members),
            as_of,
        }
    }

    /// Where the follower stands.
    #[must_use]
    pub const fn cursor(&self) -> Serial {
        self.cursor
    }

    /// The next records, at most `limit`. Call it when woken, and again while it says `more`.
    ///
    /// # Errors
    /// When records after the cursor are gone; the follower goes on from the present.
    pub async fn poll(&mut self, limit: usize) -> Result<Polled, Lost> {
        // Cleared before looking: what comes while we look wakes again.
        self.follow.woken.store(false, Ordering::Release);
        if self.live {
            let found = self.feed.tail().after(self.cursor, true, limit);
            if let Some(records) = found {
                return Ok(self.hand_out(records, limit));
            }
            self.live = false;
        }
        let Some(records) = self.read_log(limit).await? else {
            return Ok(Polled::default());
        };
        // Once the log shows nothing after the cursor, whatever comes next comes through the feed.
        self.live = records.is_empty();
        let mut polled = self.hand_out(records, limit);
        polled.more = !self.live;
        Ok(polled)
    }

    fn hand_out(&mut self, records: Vec<Arc<Record>>, limit: usize) -> Polled {
        if let Some(last) = records.last() {
            self.cursor = last.at.serial;
        }
        let more = records.len() == limit;
        let mut polled = Polled { records, more };
        if let Some(end) = self.rewound_to {
            let is_past = |record: &Record| record.publish.ephemeral && record.at.serial <= end;
            polled.records.retain(|record| !is_past(record));
            self.rewound_to = (self.cursor < end).then_some(end);
        }
        polled
    }

    /// `None` while the state is being rebuilt: every follower is woken when it is there.
    async fn read_log(&mut self, limit: usize) -> Result<Option<Vec<Arc<Record>>>, Lost> {
        let shard = self.cluster.shard_of(&self.key);
        let refs = self
            .cluster
            .state(shard)
            .after(&self.key, self.cursor, limit);
        let refs = match refs {
            Ok(refs) if refs.is_empty() => return Ok(Some(Vec::new())),
            Ok(refs) => refs,
            Err(ReadError::Rebuilding) => return Ok(None),
            Err(err) => return Err(self.lose(&err)),
        };
        match self.cluster.read_records(shard, refs).await {
            Ok(records) => {
                let records = records.into_iter().map(|stored| Arc::new(stored.into()));
                Ok(Some(records.collect()))
            }
            Err(err) => {
                tracing::error!(channel = %self.key, error = %err, "the log cannot be read");
                Err(self.lose(&err))
            }
        }
    }

    fn lose(&mut self, why: &dyn std::fmt::Display) -> Lost {
        self.cursor = self.cluster.state(self.cluster.shard_of(&self.key)).now();
        self.live = true;
        Lost {
            at: self.cursor,
            error: ErrorInfo::new(ErrorCode::ContinuityLost, why.to_string()),
        }
    }
}

/// Where a follower of the channel begins, and how that went.
fn begin(state: &Shard, key: &ChannelKey, from: From, now_ms: u64) -> (Serial, Continuity) {
    match from {
        From::Present => (state.now(), Continuity::Fresh { backlog: false }),
        From::After(from) => match state.after(key, from, 1) {
            Ok(next) => {
                let backlog = !next.is_empty();
                (from, Continuity::Resumed { backlog })
            }
            // Whether something is gone shows when the records are all there.
            Err(ReadError::Rebuilding) => (from, Continuity::Resumed { backlog: true }),
            Err(ReadError::Behind(_) | ReadError::Archive(_)) => (state.now(), Continuity::Lost),
        },
        From::Rewind { count, within_ms } => {
            let since_ms = within_ms.map_or(0, |within_ms| now_ms.saturating_sub(within_ms));
            let found = state.rewind(key, count, since_ms).unwrap_or_else(|err| {
                // While records come back, or where they cannot be read, there is nothing to show of the past.
                tracing::debug!(channel = %key, error = %err, "nothing to rewind to");
                None
            });
            let backlog = found.is_some();
            let cursor = found.unwrap_or_else(|| state.now());
            (cursor, Continuity::Fresh { backlog })
        }
    }
}

/// Members as clients see them. One whose event cannot be read is logged and left out.
pub(super) fn listed(members: Vec<Member>) -> Vec<PresenceMessage> {
    let show = |member: Member| {
        let (id, connection_id) = (&member.id, member.connection_id.clone());
        let (offset, stamp_ms) = (member.offset, member.stamp_ms);
        body::member(&member.event, id, offset, connection_id, stamp_ms).map_err(|err| {
            let serial = member.serial;
            tracing::error!(%serial, error = %err, "a member's last event cannot be read");
        })
    };
    members
        .into_iter()
        .filter_map(|member| show(member).ok())
        .collect()
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.hub.leave(&self.key, &self.follow);
    }
}
