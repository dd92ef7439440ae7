//! One presence event, or one member in a SYNC (§2.3.7).

use std::borrow::Cow;

use serde::de::{Deserialize, Deserializer};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::wire::ably::lenient::{Natural, Whole, from_map};
use crate::wire::ably::payload::{self, Data, DataToWrite, WireData};

/// What happened to a member, or that it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PresenceAction {
    Absent,
    /// Only in snapshots of members.
    Present,
    Enter,
    Leave,
    Update,
    /// A number that this build does not know.
    Unknown(i64),
}

impl PresenceAction {
    #[must_use]
    pub const fn number(self) -> i64 {
        match self {
            Self::Absent => 0,
            Self::Present => 1,
            Self::Enter => 2,
            Self::Leave => 3,
            Self::Update => 4,
            Self::Unknown(number) => number,
        }
    }

    #[must_use]
    pub const fn from_number(number: i64) -> Self {
        match number {
            0 => Self::Absent,
            1 => Self::Present,
            2 => Self::Enter,
            3 => Self::Leave,
            4 => Self::Update,
            other => Self::Unknown(other),
        }
    }
}

impl Serialize for PresenceAction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i64(self.number())
    }
}

impl From<Whole> for Option<PresenceAction> {
    fn from(Whole(number): Whole) -> Self {
        Some(PresenceAction::from_number(number))
    }
}

/// One presence event. A member is a connection id and a client id together.
///
/// Invariant of a decoded one: as of [`Message`](crate::wire::ably::Message), its encoding ends in `base64` only when its
/// data is not base64 at all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PresenceMessage {
    /// `connectionId:msgSerial:index` of an event that the member's connection made; another form of one made for it.
    pub id: Option<String>,
    pub action: Option<PresenceAction>,
    pub client_id: Option<String>,
    pub connection_id: Option<String>,
    pub data: Option<Data>,
    /// Steps still applied to the data, the last applied rightmost.
    pub encoding: Option<String>,
    pub extras: Option<Map<String, Value>>,
    /// Milliseconds since 1970.
    pub timestamp: Option<u64>,
}

impl PresenceMessage {
    /// Bytes that count against the limit of one publish: client id, data and extras as JSON.
    #[must_use]
    pub fn size(&self) -> usize {
        let texts = [&self.client_id, &None];
        payload::size(texts, self.data.as_ref(), self.extras.as_ref())
    }

    /// Whether the encoding promises base64 that the data is not.
    #[must_use]
    pub fn has_invalid_base64(&self) -> bool {
        payload::has_invalid_base64(self.data.as_ref(), self.encoding.as_deref())
    }
}

/// The fields of an event as they are written; data still as the format has it.
#[derive(Default)]
struct Written {
    id: Option<String>,
    action: Option<PresenceAction>,
    client_id: Option<String>,
    connection_id: Option<String>,
    data: Option<WireData>,
    encoding: Option<String>,
    extras: Option<Map<String, Value>>,
    timestamp: Option<u64>,
}

from_map!(Written, "a presence event (a map)", {
    "id" => id: String,
    "action" => action: Whole,
    "clientId" => client_id: String,
    "connectionId" => connection_id: String,
    "data" => data: WireData,
    "encoding" => encoding: String,
    "extras" => extras: Map<String, Value>,
    "timestamp" => timestamp: Natural,
});

impl<'de> Deserialize<'de> for PresenceMessage {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let written = Written::deserialize(deserializer)?;
        let (data, encoding) = payload::normalise(written.data, written.encoding);
        Ok(Self {
            id: written.id,
            action: written.action,
            client_id: written.client_id,
            connection_id: written.connection_id,
            data,
            encoding,
            extras: written.extras,
            timestamp: written.timestamp,
        })
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ToWrite<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    action: Option<PresenceAction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    client_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    connection_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<DataToWrite<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    extras: Option<&'a Map<String, Value>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp: Option<u64>,
}

impl Serialize for PresenceMessage {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (data, encoding) = payload::written(
            self.data.as_ref(),
            self.encoding.as_deref(),
            serializer.is_human_readable(),
        );
        ToWrite {
            id: self.id.as_deref(),
            action: self.action,
            client_id: self.client_id.as_deref(),
            connection_id: self.connection_id.as_deref(),
            data,
            encoding,
            extras: self.extras.as_ref(),
            timestamp: self.timestamp,
        }
        .serialize(serializer)
    }
}
