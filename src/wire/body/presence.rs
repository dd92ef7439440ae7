//! Presence events in a record's body. An event has the id `recordId:place` unless it was stored with one of its own.

use bytes::Bytes;
use prost::Message as _;

use crate::types::Serial;
use crate::wire::ably::{Action, Frame, PresenceAction, PresenceMessage};
use crate::wire::body::{
    BodyError, connection_id, data_in, data_out, extras_in, extras_out, stored_messages,
};
use crate::wire::entry;

/// Keeps all of the events but their timestamps, which are their record's.
#[must_use]
pub fn encode_presence(events: &[PresenceMessage]) -> Bytes {
    let body = entry::Body {
        version: entry::VERSION,
        messages: events.iter().map(stored).collect(),
    };
    body.encode_to_vec().into()
}

/// A body of leaves for members, each given as its connection id and its last event, an encoded [`entry::Message`]: they
/// leave with the data that they had.
///
/// # Errors
/// When an event cannot be read.
pub fn encode_leaves<'a>(
    members: impl IntoIterator<Item = (&'a str, &'a Bytes)>,
) -> Result<Bytes, BodyError> {
    let leave = |(connection_id, event): (&str, &Bytes)| {
        let last = entry::Message::decode(event.clone())?;
        Ok(entry::Message {
            id: None,
            presence_action: action_out(PresenceAction::Leave),
            connection_id: Some(connection_id.to_owned()),
            ..last
        })
    };
    let messages: Result<_, BodyError> = members.into_iter().map(leave).collect();
    let body = entry::Body {
        version: entry::VERSION,
        messages: messages?,
    };
    Ok(body.encode_to_vec().into())
}

/// The presence events of one record as history gives them: nothing is left to derive. `stamp_ms` is the time of the
/// record's entry.
///
/// # Errors
/// When the body cannot be read.
pub fn decode_presence(
    publish: &entry::Publish,
    stamp_ms: u64,
) -> Result<Vec<PresenceMessage>, BodyError> {
    let mut events = restored_all(publish)?;
    for (place, event) in events.iter_mut().enumerate() {
        event
            .id
            .get_or_insert_with(|| format!("{}:{place}", publish.id));
        event.connection_id = event
            .connection_id
            .take()
            .or_else(|| connection_id(publish));
        event.timestamp = Some(stamp_ms);
    }
    Ok(events)
}

/// The PRESENCE frame that every subscriber of `channel` gets for one record, like
/// [`record_frame`](crate::wire::body::record_frame).
///
/// # Errors
/// When the body cannot be read.
pub fn presence_frame(
    channel: &str,
    serial: Serial,
    publish: &entry::Publish,
    stamp_ms: u64,
) -> Result<Frame, BodyError> {
    Ok(Frame {
        id: Some(publish.id.clone()),
        connection_id: connection_id(publish),
        channel_serial: Some(serial.to_string()),
        timestamp: Some(stamp_ms),
        presence: restored_all(publish)?,
        ..Frame::of_channel(Action::Presence, channel)
    })
}

/// A member as a SYNC or a list of members shows it. `event` is its last event, an encoded [`entry::Message`], at place
/// `offset` of the record with idempotency key `id`, stored at `stamp_ms`.
///
/// # Errors
/// When the event cannot be read.
pub fn member(
    event: &[u8],
    id: &str,
    offset: u32,
    connection_id: String,
    stamp_ms: u64,
) -> Result<PresenceMessage, BodyError> {
    let event = restored(entry::Message::decode(event)?)?;
    Ok(PresenceMessage {
        id: event.id.or_else(|| Some(format!("{id}:{offset}"))),
        action: Some(PresenceAction::Present),
        connection_id: Some(connection_id),
        timestamp: Some(stamp_ms),
        ..event
    })
}

fn restored_all(publish: &entry::Publish) -> Result<Vec<PresenceMessage>, BodyError> {
    let events = stored_messages(&publish.body)?;
    events.into_iter().map(restored).collect()
}

fn action_out(action: PresenceAction) -> u32 {
    u32::try_from(action.number()).unwrap_or(0)
}

fn stored(event: &PresenceMessage) -> entry::Message {
    entry::Message {
        id: event.id.clone(),
        name: None,
        encoding: event.encoding.clone(),
        client_id: event.client_id.clone(),
        extras: event.extras.as_ref().map(extras_out),
        data: event.data.as_ref().map(data_out),
        presence_action: event.action.map_or(0, action_out),
        connection_id: event.connection_id.clone(),
    }
}

fn restored(event: entry::Message) -> Result<PresenceMessage, BodyError> {
    let action = PresenceAction::from_number(event.presence_action.into());
    Ok(PresenceMessage {
        id: event.id,
        action: Some(action).filter(|action| *action != PresenceAction::Absent),
        client_id: event.client_id,
        connection_id: event.connection_id,
        data: event.data.map(data_in),
        encoding: event.encoding,
        extras: extras_in(event.extras.as_deref())?,
        timestamp: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ably::{Data, Format, encode};
    use proptest::prelude::*;

    const SERIAL: Serial = Serial {
        incarnation: 1,
        index: 0x1f,
        position: 2,
    };

    fn event(action: PresenceAction, client_id: &str) -> PresenceMessage {
        PresenceMessage {
            action: Some(action),
            client_id: Some(client_id.into()),
            data: Some(Data::Text("hi".into())),
            ..PresenceMessage::default()
        }
    }

    fn publish(id: &str, connection_id: &str, body: Bytes) -> entry::Publish {
        entry::Publish {
            id: id.into(),
            connection_id: connection_id.into(),
            body,
            ..entry::Publish::default()
        }
    }

    #[test]
    fn a_subscriber_gets_one_frame_per_record() {
        let events = [
            event(PresenceAction::Enter, "me"),
            event(PresenceAction::Update, "you"),
        ];
        let publish = publish("conn1:4", "conn1", encode_presence(&events));
        let frame = presence_frame("c", SERIAL, &publish, 1000).unwrap();
        assert_eq!(
            encode(Format::Json, &frame),
            concat!(
                r#"{"action":14,"id":"conn1:4","connectionId":"conn1","channel":"c","#,
                r#""channelSerial":"0001-000000000000001f-0002","timestamp":1000,"presence":["#,
                r#"{"action":2,"clientId":"me","data":"hi"},{"action":4,"clientId":"you","data":"hi"}]}"#
            )
        );
        let listed = decode_presence(&publish, 1000).unwrap();
        assert_eq!(listed[1].id.as_deref(), Some("conn1:4:1"));
        assert_eq!(listed[1].connection_id.as_deref(), Some("conn1"));
        assert_eq!(listed[1].timestamp, Some(1000));
    }

    #[test]
    fn who_is_let_go_leaves_with_its_last_data_and_an_id_of_another_form() {
        let entered = stored(&event(PresenceAction::Enter, "me"));
        let last: Bytes = entered.encode_to_vec().into();
        let there = member(&last, "conn1:4", 3, "conn1".into(), 7).unwrap();
        assert_eq!(there.id.as_deref(), Some("conn1:4:3"));
        assert_eq!(there.action, Some(PresenceAction::Present));
        let leaves = encode_leaves([("conn1", &last)]).unwrap();
        let listed = decode_presence(&publish("left-a:0", "", leaves), 9).unwrap();
        let expected = PresenceMessage {
            id: Some("left-a:0:0".into()),
            connection_id: Some("conn1".into()),
            timestamp: Some(9),
            ..event(PresenceAction::Leave, "me")
        };
        assert_eq!(listed, [expected]);
        let garbled = Bytes::from_static(b"\xff");
        assert!(encode_leaves([("conn1", &garbled)]).is_err());
    }

    proptest! {
        #[test]
        fn events_round_trip(
            id: Option<String>, number in 1..9_i64, client_id: Option<String>, connection_id: Option<String>,
            binary: Option<Vec<u8>>, text: Option<String>, encoding: Option<String>,
        ) {
            let data = binary.map(|bytes| Data::Binary(bytes.into())).or(text.map(Data::Text));
            let extras = serde_json::json!({"headers": {"n": number}}).as_object().cloned();
            let action = Some(PresenceAction::from_number(number));
            let event = PresenceMessage { id, action, client_id, connection_id, data, encoding, extras, timestamp: None };
            let publish = publish("r", "", encode_presence(std::slice::from_ref(&event)));
            prop_assert_eq!(restored_all(&publish).unwrap(), vec![event]);
        }
    }
}
