//! Metachannels: channels and connections that open and close, told to who attached to hear of it (§2.10).
//!
//! Told once and without promise: an event that nobody hears, or too many at a time, is dropped.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::broker::{Broker, Publish};
use crate::gateway::random_id;
use crate::tasks::{OnError, Tasks};
use crate::types::{AppId, ChannelKey, ChannelName, OccupancyChange};
use crate::wire::ably::{Data, Message};
use crate::wire::body::encode_body;

/// Connections' events that may wait to be told.
const WAITING_MAX: usize = 4096;
/// Events that come within this are told together.
const GATHER: Duration = Duration::from_millis(100);
/// Events of one publish.
const EVENTS_MAX: usize = 100;

/// Takes what connections have to tell.
#[derive(Clone, Debug)]
pub(crate) struct Lifecycle(mpsc::Sender<Event>);

/// One event: where it is told, its name and its data.
#[derive(Debug, PartialEq)]
struct Event {
    key: ChannelKey,
    name: &'static str,
    data: Value,
}

impl Lifecycle {
    pub(super) fn start(broker: &Broker, tasks: &Tasks) -> Self {
        let (sender, events) = mpsc::channel(WAITING_MAX);
        let broker = broker.clone();
        tasks.spawn("gateway.lifecycle", OnError::StopNode, |token| {
            tell(broker, events, token)
        });
        Self(sender)
    }

    /// A client came, or came back.
    pub(super) fn connection_opened(
        &self,
        app: &AppId,
        connection_id: &str,
        client_id: Option<&str>,
    ) {
        self.connection(app, "connection.opened", connection_id, client_id);
    }

    /// A client's conversation is over; it may come back.
    pub(super) fn connection_closed(
        &self,
        app: &AppId,
        connection_id: &str,
        client_id: Option<&str>,
    ) {
        self.connection(app, "connection.closed", connection_id, client_id);
    }

    fn connection(
        &self,
        app: &AppId,
        name: &'static str,
        connection_id: &str,
        client_id: Option<&str>,
    ) {
        let key = ChannelKey {
            app: app.clone(),
            name: ChannelName::connection_lifecycle(),
        };
        let data = json!({ "connectionId": connection_id, "clientId": client_id });
        let _ = self.0.try_send(Event { key, name, data });
    }
}

/// `None` for channels that are not told of.
fn of_channel(change: &OccupancyChange) -> Option<Event> {
    let (channel, name, is_active) = match change {
        OccupancyChange::Opened(key) => (key, "channel.opened", true),
        OccupancyChange::Closed(key) => (key, "channel.closed", false),
    };
    if channel.name.metachannel().is_some() || Broker::is_internal(&channel.app) {
        return None;
    }
    let id = channel.name.as_str();
    Some(Event {
        key: ChannelKey {
            app: channel.app.clone(),
            name: ChannelName::channel_lifecycle(),
        },
        name,
        data: json!({ "channelId": id, "name": id, "status": { "isActive": is_active } }),
    })
}

async fn tell(
    broker: Broker,
    mut connections: mpsc::Receiver<Event>,
    token: CancellationToken,
) -> anyhow::Result<()> {
    let Some(mut channels) = broker.take_occupancy_changes() else {
        anyhow::bail!("another door listens to what channels do");
    };
    loop {
        let mut events = Vec::new();
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            Some(event) = connections.recv() => events.push(event),
            Some(change) = channels.recv() => events.extend(of_channel(&change)),
        }
        tokio::time::sleep(GATHER).await;
        while let Ok(event) = connections.try_recv() {
            events.push(event);
        }
        while let Ok(change) = channels.try_recv() {
            events.extend(of_channel(&change));
        }
        let mut metachannels: BTreeMap<ChannelKey, Vec<Message>> = BTreeMap::new();
        for event in events {
            metachannels.entry(event.key).or_default().push(Message {
                name: Some(event.name.to_owned()),
                data: Some(Data::Text(event.data.to_string())),
                encoding: Some("json".to_owned()),
                ..Message::default()
            });
        }
        for (key, messages) in metachannels {
            publish(&broker, &key, &messages).await;
        }
    }
}

/// If somebody is there to hear it.
async fn publish(broker: &Broker, key: &ChannelKey, messages: &[Message]) {
    let heard = broker.metrics(key).await;
    if !heard.is_ok_and(|metrics| metrics.counts.subscribers > 0) {
        return;
    }
    for messages in messages.chunks(EVENTS_MAX) {
        let published = broker.publish(Publish {
            key: key.clone(),
            id: format!("meta-{}", random_id()),
            connection_id: String::new(),
            count: u32::try_from(messages.len()).unwrap_or(u32::MAX),
            body: encode_body(messages),
            source: None,
            presence: None,
            ephemeral: true,
        });
        if let Err(error) = published.outcome().await {
            tracing::debug!(channel = %key, %error, "what became of channels or connections was not told");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_are_told_of_and_metachannels_are_not() {
        let key = |name| ChannelKey {
            app: "app".parse().unwrap(),
            name,
        };
        let channel = ChannelName::parse("a:b").unwrap();
        let event = of_channel(&OccupancyChange::Opened(key(channel.clone()))).unwrap();
        assert_eq!(
            (event.key.name.as_str(), event.name),
            ("[meta]channel.lifecycle", "channel.opened")
        );
        assert_eq!(
            event.data,
            json!({ "channelId": "a:b", "name": "a:b", "status": { "isActive": true } })
        );
        let event = of_channel(&OccupancyChange::Closed(key(channel))).unwrap();
        assert_eq!(
            (event.name, &event.data["status"]["isActive"]),
            ("channel.closed", &json!(false))
        );
        let meta = OccupancyChange::Opened(key(ChannelName::channel_lifecycle()));
        assert_eq!(of_channel(&meta), None);
    }
}
