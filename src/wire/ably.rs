//! The frames and messages of the Ably client protocol, in JSON and in MessagePack.
//!
//! Invariants of everything encoded here: absent fields are omitted, never null; MessagePack maps have text
//! keys and integers in their shortest form; binary data is `bin` in MessagePack and base64 text with a
//! `base64` encoding step in JSON. Decoding ignores unknown fields, takes null for absent and numbers of any
//! width, and never recurses deeper than [`DEPTH_MAX`].
//! Source: client protocol reference, §2.3.

mod few;
mod frame;
mod lenient;
mod message;
mod payload;
mod presence;

use std::io::Cursor;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use few::Few;
pub use frame::{Action, Auth, ConnectionDetails, ErrorBody, Frame, PublishResult, flags};
pub use message::{Message, MessageAction, Version};
pub use payload::Data;
pub use presence::{PresenceAction, PresenceMessage};

use crate::types::{ErrorCode, ErrorInfo};

/// How values are written on one connection or in one HTTP body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Format {
    #[default]
    Json,
    MsgPack,
}

impl Format {
    /// The media type, exactly as client libraries compare it.
    #[must_use]
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::MsgPack => "application/x-msgpack",
        }
    }
}

/// Bytes that are not what they should be. Nothing of them may be acted on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DecodeError(String);

impl From<DecodeError> for ErrorInfo {
    fn from(error: DecodeError) -> Self {
        Self::new(ErrorCode::InvalidBody, error.0)
    }
}

/// Deepest nesting of arrays and maps that is decoded. `serde_json` stops at 128 by itself; this is the
/// bound for MessagePack, so that a bomb of brackets costs neither stack nor time.
pub const DEPTH_MAX: usize = 128;

/// Longest part of a decoder's complaint that is told to a client.
const COMPLAINT_CHARS_MAX: usize = 200;

/// One frame of a WebSocket.
///
/// # Errors
/// When the bytes are not exactly one value of this format with the shape of a frame.
pub fn decode(format: Format, bytes: &[u8]) -> Result<Frame, DecodeError> {
    decode_value(format, bytes)
}

/// The bytes of one WebSocket frame: UTF-8 for [`Format::Json`].
#[must_use]
pub fn encode(format: Format, frame: &Frame) -> Bytes {
    encode_value(format, frame)
}

/// The body of a REST publish: one message or an array of them.
///
/// # Errors
/// When the bytes are not exactly one value of this format with that shape.
pub fn decode_messages(format: Format, bytes: &[u8]) -> Result<Vec<Message>, DecodeError> {
    decode_value::<message::OneOrMany>(format, bytes).map(|messages| messages.0)
}

/// The body of a request that brings frames: an array of them.
///
/// # Errors
/// When the bytes are not exactly one value of this format with that shape.
pub fn decode_frames(format: Format, bytes: &[u8]) -> Result<Vec<Frame>, DecodeError> {
    decode_value::<Few<Frame>>(format, bytes).map(|frames| frames.0)
}

/// The body of a page of messages: always an array.
#[must_use]
pub fn encode_messages(format: Format, messages: &[Message]) -> Bytes {
    encode_value(format, messages)
}

/// The body of a page of presence events or members: always an array.
#[must_use]
pub fn encode_presence(format: Format, presence: &[PresenceMessage]) -> Bytes {
    encode_value(format, presence)
}

/// Any value that a door takes in the same two formats.
///
/// # Errors
/// When the bytes are not exactly one value of this format with the shape of a `T`.
pub fn decode_value<T: DeserializeOwned>(format: Format, bytes: &[u8]) -> Result<T, DecodeError> {
    let complain = |what: String| DecodeError(what.chars().take(COMPLAINT_CHARS_MAX).collect());
    match format {
        Format::Json => serde_json::from_slice(bytes).map_err(|e| complain(e.to_string())),
        Format::MsgPack => {
            let mut decoder = rmp_serde::Deserializer::new(Cursor::new(bytes));
            decoder.set_max_depth(DEPTH_MAX);
            let value = T::deserialize(&mut decoder).map_err(|e| complain(e.to_string()))?;
            if usize::try_from(decoder.position()) != Ok(bytes.len()) {
                return Err(complain("bytes follow the value".to_owned()));
            }
            Ok(value)
        }
    }
}

/// Any value of this module, or of a door that answers in the same two formats.
///
/// # Panics
/// When the value's own `Serialize` fails, or has map keys that are not text: a mistake in this program.
#[must_use]
pub fn encode_value<T: Serialize + ?Sized>(format: Format, value: &T) -> Bytes {
    let bytes = match format {
        Format::Json => serde_json::to_vec(value)
            .expect("map keys are text and no Serialize here fails, so JSON cannot fail"),
        Format::MsgPack => {
            let mut bytes = Vec::with_capacity(256);
            let mut encoder = rmp_serde::Serializer::new(&mut bytes).with_struct_map();
            value
                .serialize(&mut encoder)
                .expect("writing to memory, no Serialize here fails");
            bytes
        }
    };
    bytes.into()
}

#[cfg(test)]
pub(crate) mod tests;
