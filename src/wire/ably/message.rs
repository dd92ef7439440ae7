//! One message: what an application publishes.

use std::borrow::Cow;
use std::fmt;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::wire::ably::lenient::{Natural, Whole, from_map};
use crate::wire::ably::payload::{self, Data, DataToWrite, WireData};

/// What a message does to the channel (§2.3.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MessageAction {
    #[default]
    Create,
    Update,
    Delete,
    Meta,
    Summary,
    Append,
    /// A number that this build does not know.
    Unknown(i64),
}

impl MessageAction {
    #[must_use]
    pub const fn number(self) -> i64 {
        match self {
            Self::Create => 0,
            Self::Update => 1,
            Self::Delete => 2,
            Self::Meta => 3,
            Self::Summary => 4,
            Self::Append => 5,
            Self::Unknown(number) => number,
        }
    }

    #[must_use]
    pub const fn from_number(number: i64) -> Self {
        match number {
            0 => Self::Create,
            1 => Self::Update,
            2 => Self::Delete,
            3 => Self::Meta,
            4 => Self::Summary,
            5 => Self::Append,
            other => Self::Unknown(other),
        }
    }
}

impl Serialize for MessageAction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i64(self.number())
    }
}

impl From<Whole> for Option<MessageAction> {
    fn from(Whole(number): Whole) -> Self {
        Some(MessageAction::from_number(number))
    }
}

/// Which version of a message this is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Version {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<u64>,
}

from_map!(Version, "a message version", { "serial" => serial: String, "timestamp" => timestamp: Natural, });

/// One message.
///
/// Invariant of a decoded message: its encoding does not end in a `base64` step, whichever format it came in,
/// unless its data is not base64 at all, which [`Message::has_invalid_base64`] tells.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    pub id: Option<String>,
    pub name: Option<String>,
    pub data: Option<Data>,
    /// Steps still applied to the data, the last applied rightmost: `utf-8/cipher+aes-256-cbc`.
    pub encoding: Option<String>,
    pub client_id: Option<String>,
    pub connection_id: Option<String>,
    /// Only in a REST publish on behalf of a connection; a secret, so it is never encoded.
    pub connection_key: Option<String>,
    pub extras: Option<Map<String, Value>>,
    /// Milliseconds since 1970.
    pub timestamp: Option<u64>,
    pub action: Option<MessageAction>,
    pub serial: Option<String>,
    pub version: Option<Version>,
}

impl Message {
    /// Bytes that count against the limit of one publish: name, client id, data and extras as JSON (TM6).
    #[must_use]
    pub fn size(&self) -> usize {
        let texts = [&self.name, &self.client_id];
        payload::size(texts, self.data.as_ref(), self.extras.as_ref())
    }

    /// Whether the encoding promises base64 that the data is not.
    #[must_use]
    pub fn has_invalid_base64(&self) -> bool {
        payload::has_invalid_base64(self.data.as_ref(), self.encoding.as_deref())
    }
}

/// The fields of a message as they are written; data still as the format has it.
#[derive(Default)]
struct Written {
    id: Option<String>,
    name: Option<String>,
    data: Option<WireData>,
    encoding: Option<String>,
    client_id: Option<String>,
    connection_id: Option<String>,
    connection_key: Option<String>,
    extras: Option<Map<String, Value>>,
    timestamp: Option<u64>,
    action: Option<MessageAction>,
    serial: Option<String>,
    version: Option<Version>,
}

from_map!(Written, "a message (a map)", {
    "id" => id: String,
    "name" => name: String,
    "data" => data: WireData,
    "encoding" => encoding: String,
    "clientId" => client_id: String,
    "connectionId" => connection_id: String,
    "connectionKey" => connection_key: String,
    "extras" => extras: Map<String, Value>,
    "timestamp" => timestamp: Natural,
    "action" => action: Whole,
    "serial" => serial: String,
    "version" => version: Version,
});

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = Written::deserialize(deserializer)?;
        let (data, encoding) = payload::normalise(written.data, written.encoding);
        Ok(Self {
            id: written.id,
            name: written.name,
            data,
            encoding,
            client_id: written.client_id,
            connection_id: written.connection_id,
            connection_key: written.connection_key,
            extras: written.extras,
            timestamp: written.timestamp,
            action: written.action,
            serial: written.serial,
            version: written.version,
        })
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ToWrite<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<DataToWrite<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connection_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extras: Option<&'a Map<String, Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<MessageAction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    serial: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'a Version>,
}

impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (data, encoding) = payload::written(
            self.data.as_ref(),
            self.encoding.as_deref(),
            serializer.is_human_readable(),
        );
        ToWrite {
            id: self.id.as_deref(),
            name: self.name.as_deref(),
            data,
            encoding,
            client_id: self.client_id.as_deref(),
            connection_id: self.connection_id.as_deref(),
            extras: self.extras.as_ref(),
            timestamp: self.timestamp,
            action: self.action,
            serial: self.serial.as_deref(),
            version: self.version.as_ref(),
        }
        .serialize(serializer)
    }
}

/// A REST body: one message, or an array of them.
pub(super) struct OneOrMany(pub(super) Vec<Message>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BodyVisitor;

        impl<'de> Visitor<'de> for BodyVisitor {
            type Value = OneOrMany;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a message or an array of messages")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<OneOrMany, A::Error> {
                let message = Message::deserialize(MapAccessDeserializer::new(map))?;
                Ok(OneOrMany(vec![message]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<OneOrMany, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(OneOrMany)
            }
        }

        deserializer.deserialize_any(BodyVisitor)
    }
}
