//! Messages as they are stored in a record's body, and as subscribers and history readers get them back; presence events
//! likewise: see `presence`.

mod presence;

use bytes::Bytes;
use prost::Message as _;

use crate::types::{ErrorCode, ErrorInfo, Serial};
use crate::wire::ably::{Action, Data, Frame, Message, MessageAction, Version};
use crate::wire::entry;

pub use presence::{decode_presence, encode_leaves, encode_presence, member, presence_frame};

/// Why a stored body cannot be read. Never a client's fault: what was stored was checked.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    #[error("body is damaged: {0}")]
    Damaged(#[from] prost::DecodeError),
    #[error("body has version {0}, newer than this build reads")]
    Version(u32),
    #[error("extras are not a JSON object: {0}")]
    Extras(#[from] serde_json::Error),
    #[error("body holds {0} messages, more than a record can number")]
    Count(usize),
}

impl From<BodyError> for ErrorInfo {
    fn from(error: BodyError) -> Self {
        Self::new(ErrorCode::Internal, error.to_string())
    }
}

type Extras = serde_json::Map<String, serde_json::Value>;

/// Keeps id, name, data, encoding, client id and extras; the rest of a message belongs to its record or,
/// like the connection key, to nobody.
#[must_use]
pub fn encode_body(messages: &[Message]) -> Bytes {
    let body = entry::Body {
        version: entry::VERSION,
        messages: messages.iter().map(stored).collect(),
    };
    body.encode_to_vec().into()
}

/// # Errors
/// When the body is damaged or of a version that this build does not know.
pub fn decode_body(body: &[u8]) -> Result<Vec<Message>, BodyError> {
    stored_messages(body)?.into_iter().map(restored).collect()
}

/// Decoding shares nothing with `body`: a subscriber that keeps a message must not keep a whole segment.
fn stored_messages(body: &[u8]) -> Result<Vec<entry::Message>, BodyError> {
    let body = entry::Body::decode(body)?;
    match body.version {
        entry::VERSION => Ok(body.messages),
        version => Err(BodyError::Version(version)),
    }
}

/// The MESSAGE frame that every subscriber of `channel` gets for one record. `channel` is the name as the
/// subscriber wrote it; `stamp_ms` is the time of the record's entry.
///
/// Ids that no client chose are left out: clients derive `id:n` from the frame's.
///
/// # Errors
/// When the body cannot be read.
pub fn record_frame(
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
        messages: placed(serial, publish, stamp_ms)?,
        ..Frame::of_channel(Action::Message, channel)
    })
}

/// The messages of one record as history gives them: nothing is left to derive.
///
/// # Errors
/// When the body cannot be read.
pub fn record_messages(
    serial: Serial,
    publish: &entry::Publish,
    stamp_ms: u64,
) -> Result<Vec<Message>, BodyError> {
    let mut messages = placed(serial, publish, stamp_ms)?;
    for (place, message) in messages.iter_mut().enumerate() {
        message
            .id
            .get_or_insert_with(|| format!("{}:{place}", publish.id));
        message.connection_id = connection_id(publish);
        message.timestamp = Some(stamp_ms);
    }
    Ok(messages)
}

/// The messages with what their place in the log gives them.
fn placed(
    serial: Serial,
    publish: &entry::Publish,
    stamp_ms: u64,
) -> Result<Vec<Message>, BodyError> {
    let mut messages = decode_body(&publish.body)?;
    let count = messages.len();
    for (place, message) in messages.iter_mut().enumerate() {
        let offset = u16::try_from(place).map_err(|_| BodyError::Count(count))?;
        let serial = serial.message(offset).to_string();
        message.action = Some(MessageAction::Create);
        message.version = Some(Version {
            serial: Some(serial.clone()),
            timestamp: Some(stamp_ms),
        });
        message.serial = Some(serial);
    }
    Ok(messages)
}

fn connection_id(publish: &entry::Publish) -> Option<String> {
    (!publish.connection_id.is_empty()).then(|| publish.connection_id.clone())
}

fn stored(message: &Message) -> entry::Message {
    entry::Message {
        id: message.id.clone(),
        name: message.name.clone(),
        encoding: message.encoding.clone(),
        client_id: message.client_id.clone(),
        extras: message.extras.as_ref().map(extras_out),
        data: message.data.as_ref().map(data_out),
        ..entry::Message::default()
    }
}

fn extras_out(extras: &Extras) -> String {
    serde_json::to_string(extras).expect("a JSON object has text keys, so it has a text")
}

fn extras_in(extras: Option<&str>) -> Result<Option<Extras>, serde_json::Error> {
    extras.map(serde_json::from_str).transpose()
}

fn data_out(data: &Data) -> entry::message::Data {
    match data {
        Data::Text(text) => entry::message::Data::Text(text.clone()),
        Data::Binary(bytes) => entry::message::Data::Binary(bytes.clone()),
    }
}

fn data_in(data: entry::message::Data) -> Data {
    match data {
        entry::message::Data::Text(text) => Data::Text(text),
        entry::message::Data::Binary(bytes) => Data::Binary(bytes),
    }
}

fn restored(message: entry::Message) -> Result<Message, BodyError> {
    Ok(Message {
        id: message.id,
        name: message.name,
        data: message.data.map(data_in),
        encoding: message.encoding,
        client_id: message.client_id,
        extras: extras_in(message.extras.as_deref())?,
        ..Message::default()
    })
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::wire::ably::{Format, encode, encode_messages, tests::message};

    fn publish(messages: &[Message]) -> entry::Publish {
        entry::Publish {
            app: "app".into(),
            channel: "c".into(),
            id: "conn1:4".into(),
            connection_id: "conn1".into(),
            count: u32::try_from(messages.len()).unwrap(),
            body: encode_body(messages),
            ..entry::Publish::default()
        }
    }

    const SERIAL: Serial = Serial {
        incarnation: 1,
        index: 0x1f,
        position: 2,
    };

    fn two_messages() -> [Message; 2] {
        let first = Message {
            name: Some("a".into()),
            data: Some(Data::Binary(Bytes::from_static(&[1, 2, 3]))),
            ..Message::default()
        };
        let second = Message {
            id: Some("own:1".into()),
            client_id: Some("me".into()),
            extras: serde_json::json!({"headers": {"h": 1}})
                .as_object()
                .cloned(),
            connection_key: Some("secret".into()),
            ..Message::default()
        };
        [first, second]
    }

    #[test]
    fn a_subscriber_gets_one_frame_per_record() {
        let frame = record_frame("c", SERIAL, &publish(&two_messages()), 1000).unwrap();
        let text = encode(Format::Json, &frame);
        assert_eq!(
            text,
            concat!(
                r#"{"action":15,"id":"conn1:4","connectionId":"conn1","channel":"c","#,
                r#""channelSerial":"0001-000000000000001f-0002","timestamp":1000,"messages":["#,
                r#"{"name":"a","data":"AQID","encoding":"base64","action":0,"#,
                r#""serial":"0001-000000000000001f-0002:000","#,
                r#""version":{"serial":"0001-000000000000001f-0002:000","timestamp":1000}},"#,
                r#"{"id":"own:1","clientId":"me","extras":{"headers":{"h":1}},"action":0,"#,
                r#""serial":"0001-000000000000001f-0002:001","#,
                r#""version":{"serial":"0001-000000000000001f-0002:001","timestamp":1000}}]}"#
            )
        );
    }

    #[test]
    fn history_leaves_nothing_to_derive() {
        let mut publish = publish(&two_messages());
        let messages = record_messages(SERIAL, &publish, 1000).unwrap();
        let ids: Vec<_> = messages.iter().map(|m| m.id.as_deref().unwrap()).collect();
        assert_eq!(ids, ["conn1:4:0", "own:1"]);
        for message in &messages {
            assert_eq!(message.connection_id.as_deref(), Some("conn1"));
            assert_eq!(message.timestamp, Some(1000));
        }
        publish.connection_id.clear();
        let frame = record_frame("c", SERIAL, &publish, 1000).unwrap();
        assert_eq!(frame.connection_id, None);
        let messages = record_messages(SERIAL, &publish, 1000).unwrap();
        let text = encode_messages(Format::Json, &messages);
        assert!(!text.windows(12).any(|w| w == b"connectionId"));
    }

    #[test]
    fn other_versions_and_damage_are_refused() {
        let newer = entry::Body {
            version: entry::VERSION + 1,
            messages: vec![],
        };
        let error = decode_body(&newer.encode_to_vec()).unwrap_err();
        assert!(matches!(error, BodyError::Version(version) if version == entry::VERSION + 1));
        assert!(matches!(decode_body(b"\xff"), Err(BodyError::Damaged(_))));
        assert!(matches!(decode_body(b""), Err(BodyError::Version(0))));
        let bad_extras = entry::Body {
            version: entry::VERSION,
            messages: vec![entry::Message {
                extras: Some("[]".into()),
                ..entry::Message::default()
            }],
        };
        let error = decode_body(&bad_extras.encode_to_vec()).unwrap_err();
        assert!(matches!(error, BodyError::Extras(_)));
    }

    proptest! {
        #[test]
        fn bodies_round_trip(messages in vec(message(), 0..5)) {
            let kept: Vec<Message> = messages
                .iter()
                .cloned()
                .map(|m| Message {
                    id: m.id,
                    name: m.name,
                    data: m.data,
                    encoding: m.encoding,
                    client_id: m.client_id,
                    extras: m.extras,
                    ..Message::default()
                })
                .collect();
            prop_assert_eq!(decode_body(&encode_body(&messages)).unwrap(), kept);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..100)) {
            drop(decode_body(&bytes));
        }
    }
}
