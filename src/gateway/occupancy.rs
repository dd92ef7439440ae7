//! How a channel's occupancy looks to clients: over REST, and in-band to who attached for it (§2.10).

use serde::Serialize;

use crate::session::Occupancy;
use crate::types::{Counts, Metrics};
use crate::wire::ably::{Action, Data, Frame, Message, flags};

/// The name of messages that tell of it.
const NAME: &str = "[meta]occupancy";

/// What an attachment with these modes counts as.
pub(super) fn counts(modes: u64) -> Counts {
    let has = |mode: u64| u32::from(modes & mode != 0);
    Counts {
        connections: 1,
        publishers: has(flags::PUBLISH),
        subscribers: has(flags::SUBSCRIBE),
        presence_connections: has(flags::PRESENCE),
        presence_subscribers: has(flags::PRESENCE_SUBSCRIBE),
    }
}

/// Every category under its name in the protocol.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Shown {
    connections: u32,
    publishers: u32,
    subscribers: u32,
    presence_connections: u32,
    presence_members: u32,
    presence_subscribers: u32,
    /// There are no objects on this server.
    object_publishers: u32,
    object_subscribers: u32,
}

impl Shown {
    pub(super) const fn of(metrics: &Metrics) -> Self {
        let counts = &metrics.counts;
        Self {
            connections: counts.connections,
            publishers: counts.publishers,
            subscribers: counts.subscribers,
            presence_connections: counts.presence_connections,
            presence_members: metrics.presence_members,
            presence_subscribers: counts.presence_subscribers,
            object_publishers: 0,
            object_subscribers: 0,
        }
    }
}

/// The frame that tells a client, which calls the channel `name`, what it asked to hear.
pub(super) fn frame(name: &str, asked: Occupancy, metrics: &Metrics, now_ms: u64) -> Frame {
    let mut shown = serde_json::to_value(Shown::of(metrics)).expect("numbers are JSON");
    if let (Occupancy::Metric(category), Some(all)) = (asked, shown.as_object_mut()) {
        all.retain(|name, _| name == category);
    }
    let data = serde_json::json!({ "metrics": shown }).to_string();
    let message = Message {
        name: Some(NAME.to_owned()),
        data: Some(Data::Text(data)),
        encoding: Some("json".to_owned()),
        timestamp: Some(now_ms),
        ..Message::default()
    };
    Frame {
        channel: Some(name.to_owned()),
        messages: vec![message],
        ..Frame::new(Action::Message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: Metrics = Metrics {
        counts: Counts {
            connections: 5,
            publishers: 4,
            subscribers: 3,
            presence_connections: 2,
            presence_subscribers: 1,
        },
        presence_members: 7,
    };

    #[test]
    fn modes_decide_what_an_attachment_counts_as() {
        let some = counts(flags::PUBLISH | flags::PRESENCE);
        let expected = Counts {
            connections: 1,
            publishers: 1,
            presence_connections: 1,
            ..Counts::default()
        };
        assert_eq!(some, expected);
        assert_eq!(counts(flags::SUBSCRIBE).subscribers, 1);
        assert_eq!(counts(flags::PRESENCE_SUBSCRIBE).presence_subscribers, 1);
    }

    #[test]
    fn a_client_hears_all_or_the_category_it_asked_for() {
        let told = |asked| {
            let frame = frame("[?x=y]c", asked, &METRICS, 9);
            assert_eq!(frame.channel.as_deref(), Some("[?x=y]c"));
            let message = &frame.messages[0];
            assert_eq!(message.name.as_deref(), Some(NAME));
            assert_eq!(message.encoding.as_deref(), Some("json"));
            match &message.data {
                Some(Data::Text(text)) => text.clone(),
                other => panic!("{other:?}"),
            }
        };
        let all = r#"{"metrics":{"connections":5,"objectPublishers":0,"objectSubscribers":0,"presenceConnections":2,"presenceMembers":7,"presenceSubscribers":1,"publishers":4,"subscribers":3}}"#;
        let sorted = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(sorted(&told(Occupancy::Metrics)), sorted(all));
        assert_eq!(
            told(Occupancy::Metric("presenceMembers")),
            r#"{"metrics":{"presenceMembers":7}}"#
        );
    }
}
