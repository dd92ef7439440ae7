//! Kafka records ⇄ messages of the log, both ways, without a Kafka.

use bytes::Bytes;
use prost::Message as _;

use crate::bridge::mapping;
use crate::types::{AppId, ChannelKey, ChannelName, Serial};
use crate::wire::entry;

pub(super) const ID: &str = "firth-id";
pub(super) const ORIGIN: &str = "firth-origin";
const NAME: &str = "firth-name";
const ENCODING: &str = "firth-encoding";
const CLIENT_ID: &str = "firth-client-id";
const SERIAL: &str = "firth-serial";
const EXTRAS: &str = "firth-extras";

/// A record to be produced. Order within one (topic, key) is the order of the channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) topic: String,
    /// `None` for a channel that is a whole topic, `/matches`.
    pub(super) key: Option<String>,
    /// `None` is a tombstone: a message without data.
    pub(super) value: Option<Bytes>,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) timestamp_ms: i64,
}

impl Outgoing {
    /// What it takes in memory and, about, on the wire.
    pub(super) fn bytes(&self) -> usize {
        const OVERHEAD: usize = 64;
        let headers = |h: &(&str, String)| h.0.len() + h.1.len();
        OVERHEAD
            + self.topic.len()
            + self.key.as_ref().map_or(0, String::len)
            + self.value.as_ref().map_or(0, Bytes::len)
            + self.headers.iter().map(headers).sum::<usize>()
    }
}

/// A record as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Incoming {
    pub(super) topic: String,
    pub(super) partition: i32,
    pub(super) offset: i64,
    pub(super) key: Option<Vec<u8>>,
    pub(super) value: Option<Vec<u8>>,
    pub(super) headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Incoming {
    pub(super) fn bytes(&self) -> usize {
        const OVERHEAD: usize = 128;
        let headers = |h: &(String, Option<Vec<u8>>)| h.0.len() + h.1.as_ref().map_or(0, Vec::len);
        OVERHEAD
            + self.topic.len()
            + self.key.as_ref().map_or(0, Vec::len)
            + self.value.as_ref().map_or(0, Vec::len)
            + self.headers.iter().map(headers).sum::<usize>()
    }

    /// The last header of that name, as text.
    fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().rev().find(|(n, _)| n == name)?;
        std::str::from_utf8(found.1.as_deref()?)
            .ok()
            .filter(|text| !text.is_empty())
    }
}

/// What becomes of a record that was read.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Import {
    Publish {
        channel: ChannelName,
        id: String,
        body: Bytes,
    },
    /// It came from this cluster: it is in its channel already.
    OwnOrigin,
    /// It has no place in Firth.
    Unmappable(String),
}

/// Maps a record that was read from Kafka.
pub(super) fn import(record: &Incoming, cluster_id: &str) -> Import {
    if record.header(ORIGIN) == Some(cluster_id) {
        return Import::OwnOrigin;
    }
    let channel = match mapping::channel_of(&record.topic, record.key.as_deref()) {
        Ok(channel) => channel,
        Err(reason) => return Import::Unmappable(reason.to_string()),
    };
    let header = |name| record.header(name).map(str::to_owned);
    let own_id = header(ID);
    let data = record
        .value
        .as_ref()
        .map(|value| match std::str::from_utf8(value) {
            Ok(text) => entry::message::Data::Text(text.to_owned()),
            Err(_) => entry::message::Data::Binary(Bytes::copy_from_slice(value)),
        });
    let extras = header(EXTRAS);
    if let Some(extras) = &extras
        && serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(extras).is_err()
    {
        return Import::Unmappable(format!("header {EXTRAS} is not a JSON object"));
    }
    let message = entry::Message {
        id: own_id.clone(),
        name: header(NAME),
        data,
        encoding: header(ENCODING),
        client_id: header(CLIENT_ID),
        extras,
        presence_action: 0,
        connection_id: None,
    };
    let body = entry::Body {
        version: entry::VERSION,
        messages: vec![message],
    };
    let Incoming {
        topic,
        partition,
        offset,
        ..
    } = record;
    Import::Publish {
        channel,
        id: own_id.unwrap_or_else(|| format!("kafka:{topic}:{partition}:{offset}")),
        body: body.encode_to_vec().into(),
    }
}

/// What a bridge exports, and under which names.
#[derive(Clone, Debug)]
pub(super) struct ExportRule {
    pub(super) bridge: String,
    pub(super) app: AppId,
    pub(super) cluster_id: String,
}

impl ExportRule {
    /// The records one stored record becomes: none when it is another app's, outside the convention, or was read by
    /// this very bridge.
    ///
    /// # Errors
    /// When the stored record cannot be understood; exporting must stop there.
    pub(super) fn export(
        &self,
        serial: Serial,
        stamp_ms: u64,
        publish: &entry::Publish,
    ) -> Result<Vec<Outgoing>, String> {
        let from_here = |source: &entry::Source| source.bridge == self.bridge;
        if publish.app != self.app.as_str() || publish.source.as_ref().is_some_and(from_here) {
            return Ok(Vec::new());
        }
        let Some((topic, key)) = mapping::topic_of(&publish.channel) else {
            return Ok(Vec::new());
        };
        let body = entry::Body::decode(publish.body.clone())
            .map_err(|err| format!("record {serial} cannot be decoded: {err}"))?;
        if body.version > entry::VERSION {
            return Err(format!(
                "record {serial} has version {}, newer than this build's {}",
                body.version,
                entry::VERSION
            ));
        }
        let outgoing = |(n, message): (usize, entry::Message)| Outgoing {
            topic: topic.to_owned(),
            key: key.map(str::to_owned),
            headers: self.headers(serial, n, &publish.id, &message),
            value: message.data.map(|data| match data {
                entry::message::Data::Text(text) => text.into(),
                entry::message::Data::Binary(binary) => binary,
            }),
            timestamp_ms: i64::try_from(stamp_ms).unwrap_or(i64::MAX),
        };
        Ok(body
            .messages
            .into_iter()
            .enumerate()
            .map(outgoing)
            .collect())
    }

    fn headers(
        &self,
        serial: Serial,
        n: usize,
        base: &str,
        message: &entry::Message,
    ) -> Vec<(&'static str, String)> {
        let id = message.id.clone().unwrap_or_else(|| format!("{base}:{n}"));
        let offset = u16::try_from(n).unwrap_or(u16::MAX);
        let mut headers = vec![
            (ID, id),
            (ORIGIN, self.cluster_id.clone()),
            (SERIAL, serial.message(offset).to_string()),
        ];
        let optional = [
            (NAME, &message.name),
            (ENCODING, &message.encoding),
            (CLIENT_ID, &message.client_id),
            (EXTRAS, &message.extras),
        ];
        headers.extend(
            optional
                .into_iter()
                .filter_map(|(k, v)| Some((k, v.clone()?))),
        );
        headers
    }
}

/// The key of a channel in a bridge's app.
pub(super) fn channel_key(app: &AppId, name: ChannelName) -> ChannelKey {
    ChannelKey {
        app: app.clone(),
        name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule() -> ExportRule {
        ExportRule {
            bridge: "b".into(),
            app: "app".parse().unwrap(),
            cluster_id: "home".into(),
        }
    }

    fn message(data: Option<entry::message::Data>) -> entry::Message {
        entry::Message {
            name: Some("goal".into()),
            data,
            encoding: Some("json".into()),
            client_id: Some("ann".into()),
            extras: Some(r#"{"headers":{"a":"1"}}"#.into()),
            ..Default::default()
        }
    }

    fn publish(messages: Vec<entry::Message>) -> entry::Publish {
        let body = entry::Body {
            version: entry::VERSION,
            messages,
        };
        entry::Publish {
            app: "app".into(),
            channel: "/matches/football/5".into(),
            id: "conn:7".into(),
            body: body.encode_to_vec().into(),
            ..Default::default()
        }
    }

    fn read_back(sent: &Outgoing) -> Incoming {
        Incoming {
            topic: sent.topic.clone(),
            partition: 3,
            offset: 41,
            key: sent.key.clone().map(Into::into),
            value: sent.value.as_ref().map(|v| v.to_vec()),
            headers: (sent.headers.iter())
                .map(|(k, v)| ((*k).to_owned(), Some(v.clone().into())))
                .collect(),
        }
    }

    #[test]
    fn several_messages_become_several_records_and_come_back_elsewhere() {
        let messages = vec![
            message(Some(entry::message::Data::Text("{}".into()))),
            message(Some(entry::message::Data::Binary(Bytes::from_static(&[
                0xff, 0,
            ])))),
            message(None),
        ];
        let sent = rule()
            .export(Serial::default(), 5, &publish(messages.clone()))
            .unwrap();
        assert_eq!(sent.len(), 3);
        for (n, (sent, message)) in sent.iter().zip(messages).enumerate() {
            assert_eq!((sent.topic.as_str(), sent.timestamp_ms), ("matches", 5));
            let id = format!("conn:7:{n}");
            let Import::Publish {
                channel,
                id: theirs,
                body,
            } = import(&read_back(sent), "elsewhere")
            else {
                panic!("not mapped");
            };
            assert_eq!((channel.as_str(), &theirs), ("/matches/football/5", &id));
            let expected = entry::Message {
                id: Some(id),
                ..message
            };
            assert_eq!(entry::Body::decode(body).unwrap().messages, [expected]);
            assert_eq!(import(&read_back(sent), "home"), Import::OwnOrigin);
        }
    }

    #[test]
    fn a_foreign_record_is_named_by_its_place() {
        let record = Incoming {
            topic: "t".into(),
            partition: 1,
            offset: 9,
            ..Default::default()
        };
        let Import::Publish { id, body, .. } = import(&record, "home") else {
            panic!("not mapped");
        };
        assert_eq!(id, "kafka:t:1:9");
        let messages = entry::Body::decode(body).unwrap().messages;
        assert_eq!(
            messages,
            [entry::Message::default()],
            "a tombstone has no data"
        );
    }

    #[test]
    fn what_has_no_place_is_named_not_dropped() {
        let mut record = Incoming {
            topic: "t".into(),
            key: Some(vec![0xff]),
            ..Default::default()
        };
        assert!(matches!(import(&record, "home"), Import::Unmappable(_)));
        record.key = None;
        record.headers = vec![(EXTRAS.into(), Some(b"[]".to_vec()))];
        assert!(matches!(import(&record, "home"), Import::Unmappable(_)));
        let mut newer = publish(Vec::new());
        let body = entry::Body {
            version: entry::VERSION + 1,
            ..Default::default()
        };
        newer.body = body.encode_to_vec().into();
        assert!(rule().export(Serial::default(), 0, &newer).is_err());
    }

    #[test]
    fn only_this_apps_own_messages_go_out() {
        let exported = |change: fn(&mut entry::Publish)| {
            let mut publish = publish(vec![message(None)]);
            change(&mut publish);
            rule().export(Serial::default(), 0, &publish).unwrap().len()
        };
        let source = |bridge: &str| {
            Some(entry::Source {
                bridge: bridge.into(),
                ..Default::default()
            })
        };
        assert_eq!(exported(|_| ()), 1);
        assert_eq!(exported(|p| p.app = "other".into()), 0);
        assert_eq!(exported(|p| p.channel = "matches".into()), 0);
        let mut looped = publish(vec![message(None)]);
        looped.source = source("b");
        assert!(
            rule()
                .export(Serial::default(), 0, &looped)
                .unwrap()
                .is_empty()
        );
        looped.source = source("another");
        assert_eq!(
            rule().export(Serial::default(), 0, &looped).unwrap().len(),
            1
        );
    }
}
