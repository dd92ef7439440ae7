//! One message: what an application publishes, and its data in both formats.

use std::borrow::Cow;
use std::fmt;

use base64::alphabet;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};
use base64::engine::{DecodePaddingMode, Engine};
use bytes::Bytes;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::wire::ably::lenient::{Natural, Whole, from_map};

/// The last encoding step of binary data in JSON.
const BASE64: &str = "base64";

/// Standard alphabet; written with padding, read with or without.
const BASE64_CODEC: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A message's payload as it is between the formats: the same whichever format it came in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    Text(String),
    Binary(Bytes),
}

impl Data {
    /// Bytes of the payload itself, without what a format adds.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
        }
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

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
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let extras = self
            .extras
            .as_ref()
            .map_or(0, |extras| json_text(extras).len());
        let data = self.data.as_ref().map_or(0, Data::len);
        text(&self.name) + text(&self.client_id) + data + extras
    }

    /// Whether the encoding promises base64 that the data is not.
    #[must_use]
    pub fn has_invalid_base64(&self) -> bool {
        self.data.is_some()
            && self
                .encoding
                .as_deref()
                .is_some_and(|e| strip_step(e, BASE64).is_some())
    }

    /// Brings what a format allows into the one form kept inside.
    fn normalise(&mut self, wire_data: Option<WireData>) {
        self.data = wire_data.map(|data| match data {
            WireData::Plain(data) => data,
            WireData::Json(text) => {
                let encoding = self.encoding.take().unwrap_or_default();
                self.encoding = Some(match strip_step(&encoding, "json") {
                    Some(_) => encoding,
                    None => with_step(&encoding, "json"),
                });
                Data::Text(text)
            }
        });
        while let (Some(data), Some(encoding)) = (&self.data, &self.encoding) {
            let Some(rest) = strip_step(encoding, BASE64) else {
                break;
            };
            let text = match data {
                Data::Text(text) => text.as_bytes(),
                Data::Binary(bytes) => bytes,
            };
            let Ok(bytes) = BASE64_CODEC.decode(text) else {
                break;
            };
            let rest = (!rest.is_empty()).then(|| rest.to_owned());
            self.data = Some(Data::Binary(bytes.into()));
            self.encoding = rest;
        }
        if self.encoding.as_deref() == Some("") {
            self.encoding = None;
        }
    }
}

/// What precedes the last step of an encoding, if that is `step`.
fn strip_step<'a>(encoding: &'a str, step: &str) -> Option<&'a str> {
    let rest = encoding.strip_suffix(step)?;
    if rest.is_empty() {
        Some(rest)
    } else {
        rest.strip_suffix('/')
    }
}

fn with_step(encoding: &str, step: &str) -> String {
    if encoding.is_empty() {
        step.to_owned()
    } else {
        format!("{encoding}/{step}")
    }
}

fn json_text(extras: &Map<String, Value>) -> String {
    serde_json::to_string(extras).expect("a JSON object has text keys, so it has a text")
}

/// Data as a decoder meets it. `Json` is the text of a value that should have been text or binary.
#[derive(Debug)]
enum WireData {
    Plain(Data),
    Json(String),
}

impl<'de> Deserialize<'de> for WireData {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DataVisitor;

        impl<'de> Visitor<'de> for DataVisitor {
            type Value = WireData;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text, binary or a JSON value")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<WireData, E> {
                self.visit_string(text.to_owned())
            }

            fn visit_string<E: Error>(self, text: String) -> Result<WireData, E> {
                Ok(WireData::Plain(Data::Text(text)))
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<WireData, E> {
                Ok(WireData::Plain(Data::Binary(Bytes::copy_from_slice(bytes))))
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<WireData, E> {
                Ok(WireData::Json(value.to_string()))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<WireData, E> {
                Ok(WireData::Json(value.to_string()))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<WireData, E> {
                Ok(WireData::Json(value.to_string()))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<WireData, E> {
                Ok(WireData::Json(Value::from(value).to_string()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<WireData, A::Error> {
                let value = Value::deserialize(SeqAccessDeserializer::new(seq))?;
                Ok(WireData::Json(value.to_string()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<WireData, A::Error> {
                let value = Value::deserialize(MapAccessDeserializer::new(map))?;
                Ok(WireData::Json(value.to_string()))
            }
        }

        deserializer.deserialize_any(DataVisitor)
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
        let mut message = Self {
            id: written.id,
            name: written.name,
            data: None,
            encoding: written.encoding,
            client_id: written.client_id,
            connection_id: written.connection_id,
            connection_key: written.connection_key,
            extras: written.extras,
            timestamp: written.timestamp,
            action: written.action,
            serial: written.serial,
            version: written.version,
        };
        message.normalise(written.data);
        Ok(message)
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

enum DataToWrite<'a> {
    Text(Cow<'a, str>),
    Binary(&'a [u8]),
}

impl Serialize for DataToWrite<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => serializer.serialize_str(text),
            Self::Binary(bytes) => serializer.serialize_bytes(bytes),
        }
    }
}

impl Serialize for Message {
    /// A human-readable format is JSON here: there, binary data is base64 text.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut encoding = self.encoding.as_deref().map(Cow::Borrowed);
        let data = self.data.as_ref().map(|data| match data {
            Data::Text(text) => DataToWrite::Text(Cow::Borrowed(text)),
            Data::Binary(bytes) if serializer.is_human_readable() => {
                let steps = self.encoding.as_deref().unwrap_or_default();
                encoding = Some(Cow::Owned(with_step(steps, BASE64)));
                DataToWrite::Text(Cow::Owned(BASE64_CODEC.encode(bytes)))
            }
            Data::Binary(bytes) => DataToWrite::Binary(bytes),
        });
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
