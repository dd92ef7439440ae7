//! Who leaves: presence members whose connection is over, or whose socket was gone for too long. It outlives the
//! conversation they were members in.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::broker::{Attended, Broker, Publish, PublishError};
use crate::gateway::live::Live;
use crate::stdx::Backoff;
use crate::tasks::{OnError, Tasks};
use crate::types::ChannelKey;
use crate::wire::ably::{PresenceAction, PresenceMessage};
use crate::wire::body::encode_presence;
use crate::wire::entry;

/// Pauses between tries to have members leave.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(5);
/// After this the audit goes on with it.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the log is compared with who is here.
const AUDIT: Duration = Duration::from_secs(5);
/// For how long nobody must be here for a connection before its members leave: longer than they stay by themselves.
const LOST_AFTER: Duration = Duration::from_secs(20);
/// Connections on channels that one audit looks at.
const AUDITED: usize = 1024;

/// The node's desk for departures.
#[derive(Clone, Debug)]
pub(crate) struct Departures {
    broker: Broker,
    tasks: Tasks,
    live: Live,
    pending: Pending,
}

/// Connections whose members are about to leave.
#[derive(Clone, Debug, Default)]
struct Pending(Arc<Mutex<HashMap<String, About>>>);

#[derive(Debug, Default)]
struct About {
    /// From how many channels.
    departures: usize,
    /// The connection is here again: those that wait for its grace need not go on.
    came_back: CancellationToken,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, About>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more, and what tells that the connection came back after this.
    fn add(&self, connection_id: &str) -> (OnePending, CancellationToken) {
        let mut pending = self.lock();
        let about = pending.entry(connection_id.to_owned()).or_default();
        about.departures += 1;
        let came_back = about.came_back.clone();
        (
            OnePending(self.clone(), connection_id.to_owned()),
            came_back,
        )
    }

    fn came_back(&self, connection_id: &str) {
        if let Some(about) = self.lock().get_mut(connection_id) {
            std::mem::take(&mut about.came_back).cancel();
        }
    }

    fn has(&self, connection_id: &str) -> bool {
        self.lock().contains_key(connection_id)
    }
}

struct OnePending(Pending, String);

impl Drop for OnePending {
    fn drop(&mut self) {
        let mut pending = self.0.lock();
        if let Some(about) = pending.get_mut(&self.1) {
            about.departures -= 1;
            if about.departures == 0 {
                pending.remove(&self.1);
            }
        }
    }
}

/// Members of one connection that leave one channel.
#[derive(Clone, Debug)]
pub(super) struct Departure {
    pub(super) key: ChannelKey,
    pub(super) connection_id: String,
    pub(super) members: Vec<PresenceMessage>,
}

/// Under what condition members leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// Whatever happens.
    Now,
    /// After this, unless another node or another socket attends the connection by then.
    UnlessAttended(Duration),
}

impl Departures {
    /// `live` tells whose socket is here.
    pub(super) fn new(broker: Broker, live: Live, tasks: Tasks) -> Self {
        let this = Self {
            broker,
            tasks,
            live,
            pending: Pending::default(),
        };
        let audited = this.clone();
        this.tasks
            .spawn("gateway.audit", OnError::StopNode, |token| {
                audited.audit(token)
            });
        this
    }

    /// Has members leave that the log says this process attends, of connections that nobody is here for: a session that was
    /// superseded before its successor knew of them, one that failed, a departure that found no leader for long.
    async fn audit(self, token: CancellationToken) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(AUDIT);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut lost_since = LostSince::default();
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                _ = tick.tick() => {}
            }
            let nobody_here = |id: &str| !self.live.has(id) && !self.pending.has(id);
            let lost = self.broker.attended_here(nobody_here, AUDITED);
            let due = lost_since.due(lost, Attended::place, Instant::now());
            if due.is_empty() {
                continue;
            }
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                members = self.broker.let_go_here(due) => {
                    tracing::info!(members, "members whom nobody here attends leave");
                }
            }
        }
    }

    /// A connection has a socket here, which attends its members from now on.
    pub(super) fn came_back(&self, connection_id: &str) {
        self.pending.came_back(connection_id);
    }

    /// Sees to it that the members leave. What the same connection published before is stored before; the rest is done
    /// when this has returned, and outlives the conversation.
    pub(super) fn leave(&self, departure: &Departure, when: When) {
        if departure.members.is_empty() {
            return;
        }
        let publish = self.publish(departure, when != When::Now);
        let first = match when {
            // Handed in here and now, so that it keeps its place behind the connection's publishes.
            When::Now => Some(self.broker.publish(publish.clone())),
            When::UnlessAttended(_) => None,
        };
        let broker = self.broker.clone();
        let (live, connection_id) = (self.live.clone(), departure.connection_id.clone());
        let (pending, came_back) = match when {
            When::Now => (None, CancellationToken::new()),
            When::UnlessAttended(_) => {
                let (pending, came_back) = self.pending.add(&connection_id);
                (Some(pending), came_back)
            }
        };
        self.tasks
            .spawn("gateway.departure", OnError::Log, move |token| async move {
                let done = async {
                    if let When::UnlessAttended(grace) = when {
                        // It came back here: who attends it is the same in the log, and so could not tell. It may be gone
                        // again by now, and is given the whole grace anew. Whom it does not know of by its end, the audit
                        // finds.
                        tokio::select! {
                            () = tokio::time::sleep(grace) => {}
                            () = came_back.cancelled() => return,
                        }
                        if live.has(&connection_id) {
                            return;
                        }
                    }
                    let outcome = match first {
                        Some(first) => first.outcome().await,
                        None => broker.publish(publish.clone()).outcome().await,
                    };
                    persist(&broker, &publish, outcome.err()).await;
                };
                tokio::select! {
                    () = done => {}
                    // Members of a node that is gone leave by themselves.
                    () = token.cancelled() => {}
                }
                drop(pending);
                Ok(())
            });
    }

    fn publish(&self, departure: &Departure, if_attended: bool) -> Publish {
        let Departure {
            key,
            connection_id,
            members,
        } = departure;
        let leaves: Vec<_> = members
            .iter()
            .map(|member| PresenceMessage {
                // The record's own, which does not begin with the connection's.
                id: None,
                action: Some(PresenceAction::Leave),
                connection_id: Some(connection_id.clone()),
                timestamp: None,
                ..member.clone()
            })
            .collect();
        Publish {
            key: key.clone(),
            id: Broker::left_id(),
            connection_id: String::new(),
            count: u32::try_from(leaves.len()).unwrap_or(u32::MAX),
            body: encode_presence(&leaves),
            source: None,
            presence: Some(entry::Presence {
                changes: changes(&leaves),
                if_attended,
                ..entry::Presence::default()
            }),
            ephemeral: false,
        }
    }
}

/// Since when nobody was here for members that the log says are attended here.
#[derive(Debug, Default)]
struct LostSince(HashMap<Place, Instant>);

/// A connection on a channel.
type Place = (ChannelKey, String);

impl LostSince {
    /// Those of `lost`, which is all of them now, that have been among them for long enough.
    fn due<T>(&mut self, lost: Vec<T>, place: impl Fn(&T) -> Place, now: Instant) -> Vec<T> {
        let mut known = std::mem::take(&mut self.0);
        let mut due = Vec::new();
        for lost in lost {
            let place = place(&lost);
            let since = known.remove(&place).unwrap_or(now);
            self.0.insert(place, since);
            if now.duration_since(since) >= LOST_AFTER {
                due.push(lost);
            }
        }
        due
    }
}

/// Hands the publish in again until its fate is known. The same id makes sure that it counts once.
async fn persist(broker: &Broker, publish: &Publish, mut error: Option<PublishError>) {
    let deadline = Instant::now() + PATIENCE;
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
    while let Some(PublishError::Busy(_) | PublishError::Indeterminate(_)) = error {
        if Instant::now() >= deadline {
            tracing::warn!(channel = %publish.key, "members that left are still shown: the channel has no leader");
            return;
        }
        tokio::time::sleep(backoff.pause()).await;
        error = broker.publish(publish.clone()).outcome().await.err();
    }
}

/// What these events change among a channel's members.
pub(super) fn changes(events: &[PresenceMessage]) -> Vec<entry::Change> {
    let change = |event: &PresenceMessage| entry::Change {
        action: (event.action)
            .and_then(|action| u32::try_from(action.number()).ok())
            .unwrap_or_default(),
        client_id: event.client_id.clone().unwrap_or_default(),
        connection_id: event.connection_id.clone().unwrap_or_default(),
    };
    events.iter().map(change).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn members_are_lost_when_nobody_was_here_for_long() {
        let key = ChannelKey {
            app: "app".parse().unwrap(),
            name: crate::types::ChannelName::parse("c").unwrap(),
        };
        let place = |id: &&str| (key.clone(), (*id).to_owned());
        let began = Instant::now();
        let mut lost = LostSince::default();
        assert!(lost.due(vec!["a", "b"], place, began).is_empty());
        // Somebody came back for `b` in between.
        let soon = began + LOST_AFTER / 2;
        assert!(lost.due(vec!["a"], place, soon).is_empty());
        assert_eq!(lost.due(vec!["a", "b"], place, began + LOST_AFTER), ["a"]);
    }

    #[test]
    fn who_comes_back_is_waited_for_anew() {
        let pending = Pending::default();
        let (one, first) = pending.add("c");
        pending.came_back("d");
        assert!(!first.is_cancelled());
        pending.came_back("c");
        assert!(first.is_cancelled());
        let (other, second) = pending.add("c");
        assert!(!second.is_cancelled());
        drop(one);
        assert!(pending.has("c"));
        drop(other);
        assert!(!pending.has("c"));
    }

    #[test]
    fn a_connection_is_pending_until_its_last_channel_is_left() {
        let pending = Pending::default();
        let (first, second) = (pending.add("c"), pending.add("c"));
        drop(first);
        assert!(pending.has("c"));
        drop(second);
        assert!(!pending.has("c"));
    }
}
