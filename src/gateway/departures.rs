//! Who leaves: presence members whose connection is over, or whose socket was gone for too long. It outlives the
//! conversation they were members in.

use std::time::Duration;

use crate::broker::{Broker, Publish, PublishError};
use crate::stdx::Backoff;
use crate::tasks::{OnError, Tasks};
use crate::types::ChannelKey;
use crate::wire::ably::{PresenceAction, PresenceMessage};
use crate::wire::body::encode_presence;
use crate::wire::entry;

/// Pauses between tries to have members leave.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(5);
/// By then this node is taken for dead by whoever leads the channel, which has its members leave.
const PATIENCE: Duration = Duration::from_secs(60);

/// The node's desk for departures.
#[derive(Clone, Debug)]
pub(crate) struct Departures {
    broker: Broker,
    tasks: Tasks,
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
    pub(super) const fn new(broker: Broker, tasks: Tasks) -> Self {
        Self { broker, tasks }
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
        self.tasks
            .spawn("gateway.departure", OnError::Log, move |token| async move {
                let done = async {
                    if let When::UnlessAttended(grace) = when {
                        tokio::time::sleep(grace).await;
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

/// Hands the publish in again until its fate is known. The same id makes sure that it counts once.
async fn persist(broker: &Broker, publish: &Publish, mut error: Option<PublishError>) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_LONGEST);
    while let Some(PublishError::Busy(_) | PublishError::Indeterminate(_)) = error {
        if tokio::time::Instant::now() >= deadline {
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
