//! One frame, a `ProtocolMessage`: what a WebSocket carries in either direction.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer};

use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::lenient::{Natural, ParamText, Whole, from_map};
use crate::wire::ably::{Few, Message, PresenceMessage};

/// Bits of [`Frame::flags`] (§2.3.3).
pub mod flags {
    pub const HAS_PRESENCE: u64 = 1 << 0;
    pub const HAS_BACKLOG: u64 = 1 << 1;
    pub const RESUMED: u64 = 1 << 2;
    pub const TRANSIENT: u64 = 1 << 4;
    /// Clients before 6.1.0 say with it that they were attached before.
    pub const ATTACH_RESUME: u64 = 1 << 5;
    pub const HAS_OBJECTS: u64 = 1 << 7;
    pub const PRESENCE: u64 = 1 << 16;
    pub const PUBLISH: u64 = 1 << 17;
    pub const SUBSCRIBE: u64 = 1 << 18;
    pub const PRESENCE_SUBSCRIBE: u64 = 1 << 19;
    pub const ANNOTATION_PUBLISH: u64 = 1 << 21;
    pub const ANNOTATION_SUBSCRIBE: u64 = 1 << 22;
    pub const OBJECT_SUBSCRIBE: u64 = 1 << 24;
    pub const OBJECT_PUBLISH: u64 = 1 << 25;
    /// Every bit that names a mode.
    pub const MODES: u64 = PRESENCE
        | PUBLISH
        | SUBSCRIBE
        | PRESENCE_SUBSCRIBE
        | ANNOTATION_PUBLISH
        | ANNOTATION_SUBSCRIBE
        | OBJECT_SUBSCRIBE
        | OBJECT_PUBLISH;
}

macro_rules! actions {
    ($($name:ident = $number:literal,)*) => {
        /// What a frame is for (§2.3.1).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Action {
            $(#[allow(missing_docs, reason = "the names are the protocol's")] $name,)*
            /// A number that this build does not know.
            Unknown(i64),
        }

        impl Action {
            /// Every known action.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            #[must_use]
            pub const fn number(self) -> i64 {
                match self { $(Self::$name => $number,)* Self::Unknown(number) => number }
            }

            #[must_use]
            pub const fn from_number(number: i64) -> Self {
                match number { $($number => Self::$name,)* other => Self::Unknown(other) }
            }
        }
    };
}

actions! {
    Heartbeat = 0, Ack = 1, Nack = 2, Connect = 3, Connected = 4, Disconnect = 5, Disconnected = 6, Close = 7,
    Closed = 8, Error = 9, Attach = 10, Attached = 11, Detach = 12, Detached = 13, Presence = 14, Message = 15,
    Sync = 16, Auth = 17, Activate = 18, Object = 19, ObjectSync = 20, Annotation = 21,
}

impl Default for Action {
    /// Only what a frame without an action is until it is refused.
    fn default() -> Self {
        Self::Unknown(-1)
    }
}

impl Serialize for Action {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_i64(self.number())
    }
}

impl From<Whole> for Action {
    fn from(Whole(number): Whole) -> Self {
        Self::from_number(number)
    }
}

/// One frame. Which fields an action uses: §2.3.1. A frame that was decoded without an action has
/// `Action::Unknown(-1)`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Frame {
    pub action: Action,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_details: Option<ConnectionDetails>,
    /// As the client wrote it in ATTACH; absent in a connection-level ERROR.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel_serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub msg_serial: Option<u64>,
    /// How many consecutive `msgSerial`s an ACK or NACK answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u64>,
    /// Server time, milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flags: Option<u64>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub params: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<Message>,
    /// Presence events, or members in SYNC.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub presence: Vec<PresenceMessage>,
    /// One element per `msgSerial` that an ACK answers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub res: Vec<PublishResult>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth: Option<Auth>,
}

impl Frame {
    /// A frame with nothing but its action.
    #[must_use]
    pub fn new(action: Action) -> Self {
        Self {
            action,
            ..Self::default()
        }
    }

    /// A frame about one channel.
    #[must_use]
    pub fn of_channel(action: Action, channel: impl Into<String>) -> Self {
        Self {
            channel: Some(channel.into()),
            ..Self::new(action)
        }
    }
}

from_map!(Frame, "a frame (a map with an `action`)", {
    "action" => action: Whole,
    "id" => id: String,
    "connectionId" => connection_id: String,
    "connectionDetails" => connection_details: ConnectionDetails,
    "channel" => channel: String,
    "channelSerial" => channel_serial: String,
    "msgSerial" => msg_serial: Natural,
    "count" => count: Natural,
    "timestamp" => timestamp: Natural,
    "error" => error: ErrorBody,
    "flags" => flags: Natural,
    "params" => params: Params,
    "messages" => messages: Few<Message>,
    "presence" => presence: Few<PresenceMessage>,
    "res" => res: Few<PublishResult>,
    "auth" => auth: Auth,
});

/// A map of text to text, read leniently.
#[derive(serde::Deserialize)]
#[serde(transparent)]
struct Params(BTreeMap<String, ParamText>);

impl From<Params> for BTreeMap<String, String> {
    fn from(params: Params) -> Self {
        params
            .0
            .into_iter()
            .map(|(key, ParamText(value))| (key, value))
            .collect()
    }
}

/// The serials that a publish was given, one per message; `None` for a message that got none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PublishResult {
    pub serials: Vec<Option<String>>,
}

from_map!(PublishResult, "a publish result", { "serials" => serials: Vec<Option<String>>, });

/// A credential in an AUTH frame.
#[derive(Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Auth {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_token: Option<String>,
}

impl std::fmt::Debug for Auth {
    /// Never shows the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth").finish_non_exhaustive()
    }
}

from_map!(Auth, "an auth map", { "accessToken" => access_token: String, });

/// What a client is told about its connection (§2.3.4). Times in milliseconds, sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionDetails {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_message_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_frame_size: Option<u64>,
    /// Messages per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_inbound_rate: Option<u64>,
    /// Messages per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_outbound_rate: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connection_state_ttl: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_idle_interval: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_id: Option<String>,
}

from_map!(ConnectionDetails, "connection details", {
    "clientId" => client_id: String,
    "connectionKey" => connection_key: String,
    "maxMessageSize" => max_message_size: Natural,
    "maxFrameSize" => max_frame_size: Natural,
    "maxInboundRate" => max_inbound_rate: Natural,
    "maxOutboundRate" => max_outbound_rate: Natural,
    "connectionStateTtl" => connection_state_ttl: Natural,
    "maxIdleInterval" => max_idle_interval: Natural,
    "serverId" => server_id: String,
});

/// An error as it is written (§2.3.5).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ErrorBody {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status_code: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub href: Option<String>,
}

from_map!(ErrorBody, "an error", {
    "code" => code: Natural,
    "statusCode" => status_code: Natural,
    "message" => message: String,
    "href" => href: String,
});

impl From<&ErrorInfo> for ErrorBody {
    fn from(error: &ErrorInfo) -> Self {
        Self {
            code: Some(error.code.code().into()),
            status_code: Some(error.code.status().into()),
            message: Some(error.message.clone()),
            href: None,
        }
    }
}

impl From<ErrorInfo> for ErrorBody {
    fn from(error: ErrorInfo) -> Self {
        Self::from(&error)
    }
}

impl From<&ErrorBody> for ErrorInfo {
    /// A number that the table lacks becomes the general row of its class, and stays in the message.
    fn from(body: &ErrorBody) -> Self {
        let number = body.code.unwrap_or_default();
        let text = body.message.as_deref().unwrap_or("no message");
        match u32::try_from(number).ok().and_then(ErrorCode::from_code) {
            Some(code) => Self::new(code, text),
            None if body.status_code.unwrap_or(number / 100) >= 500 => {
                Self::new(ErrorCode::Internal, format!("{text} ({number})"))
            }
            None => Self::new(ErrorCode::BadRequest, format!("{text} ({number})")),
        }
    }
}
