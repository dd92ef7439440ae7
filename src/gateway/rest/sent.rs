//! The body of a request, in whichever form it was sent: JSON, MessagePack, a form, or bare data.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Map, Value};

use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::{self, Data, Format, Message};

/// How long a request's body may take.
const BODY_PATIENCE: Duration = Duration::from_secs(10);

/// What a body's content type says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Encoded(Format),
    /// `name=value&…`
    Form,
    Text,
    /// It names another type.
    Other,
    /// It names none.
    Unsaid,
}

impl Kind {
    fn of(headers: &HeaderMap) -> Self {
        let Some(value) = headers.get(header::CONTENT_TYPE) else {
            return Self::Unsaid;
        };
        let value = value.to_str().unwrap_or_default();
        let media_type = value.split(';').next().unwrap_or_default().trim();
        match media_type.to_ascii_lowercase().as_str() {
            "" => Self::Unsaid,
            "application/json" => Self::Encoded(Format::Json),
            "application/x-msgpack" => Self::Encoded(Format::MsgPack),
            "application/x-www-form-urlencoded" => Self::Form,
            text if text.starts_with("text/") => Self::Text,
            _ => Self::Other,
        }
    }
}

/// A request's body.
#[derive(Debug)]
pub(super) struct Sent {
    kind: Kind,
    bytes: Bytes,
}

impl Sent {
    /// # Errors
    /// `MessageTooLarge` beyond `max_bytes`, `BadRequest` when it does not come in time.
    pub(super) async fn read(
        headers: &HeaderMap,
        body: Body,
        max_bytes: usize,
    ) -> Result<Self, ErrorInfo> {
        let bytes = axum::body::to_bytes(body, max_bytes);
        let bytes = tokio::time::timeout(BODY_PATIENCE, bytes).await;
        let slow = |_| ErrorInfo::new(ErrorCode::BadRequest, "body came too slowly");
        let large = |_| {
            let what = format!("body is larger than {max_bytes} bytes, or broke off");
            ErrorInfo::new(ErrorCode::MessageTooLarge, what)
        };
        Ok(Self {
            kind: Kind::of(headers),
            bytes: bytes.map_err(slow)?.map_err(large)?,
        })
    }

    pub(super) const fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// What the body says; of a form, an object of texts. A body of a type that is not understood is read as JSON.
    ///
    /// # Errors
    /// `InvalidBody` when it is not of that form.
    pub(super) fn value<T: DeserializeOwned>(&self) -> Result<T, ErrorInfo> {
        let read = match self.kind {
            Kind::Form => {
                let object = ably::encode_value(Format::Json, &form(&self.bytes));
                ably::decode_value(Format::Json, &object)
            }
            Kind::Encoded(format) => ably::decode_value(format, &self.bytes),
            Kind::Text | Kind::Other | Kind::Unsaid => {
                ably::decode_value(Format::Json, &self.bytes)
            }
        };
        Ok(read?)
    }

    /// The message whose data the body is.
    ///
    /// # Errors
    /// `InvalidBody` for what is not of the form that its content type says.
    pub(super) fn data(&self) -> Result<Message, ErrorInfo> {
        let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).map(Data::Text);
        let not_text = |_| ErrorInfo::new(ErrorCode::InvalidBody, "body is not UTF-8");
        let data = match self.kind {
            Kind::Encoded(Format::Json) => {
                // A value and nothing else: not the end of the object around it.
                ably::decode_value::<IgnoredAny>(Format::Json, &self.bytes)?;
                let object = [&b"{\"data\":"[..], &self.bytes[..], b"}"].concat();
                return Ok(ably::decode_value(Format::Json, &object)?);
            }
            Kind::Encoded(Format::MsgPack) => {
                let object = [&b"\x81\xa4data"[..], &self.bytes[..]].concat();
                return Ok(ably::decode_value(Format::MsgPack, &object)?);
            }
            // What command-line tools say when they are told nothing.
            Kind::Form | Kind::Text => text(&self.bytes).map_err(not_text)?,
            Kind::Unsaid => text(&self.bytes).unwrap_or_else(|_| Data::Binary(self.bytes.clone())),
            Kind::Other => Data::Binary(self.bytes.clone()),
        };
        Ok(Message {
            data: Some(data),
            ..Message::default()
        })
    }
}

/// A form's fields. `extras`, which is an object elsewhere, is the text of one here.
fn form(bytes: &[u8]) -> Map<String, Value> {
    let text = String::from_utf8_lossy(bytes).replace('+', " ");
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let parts = text.split('&').filter(|part| !part.is_empty());
    let field = |part: &str| {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let (name, value) = (decode(name), decode(value));
        let object = (name == "extras").then(|| serde_json::from_str(&value).ok());
        let value = object.flatten().unwrap_or(Value::String(value));
        (name, value)
    };
    parts.map(field).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    async fn sent(content_type: Option<&'static str>, body: &'static [u8]) -> Sent {
        let mut headers = HeaderMap::new();
        if let Some(content_type) = content_type {
            let value = HeaderValue::from_static(content_type);
            headers.insert(header::CONTENT_TYPE, value);
        }
        Sent::read(&headers, Body::from(body), 64).await.unwrap()
    }

    fn text(text: &str) -> Option<Data> {
        Some(Data::Text(text.to_owned()))
    }

    #[tokio::test]
    async fn messages_come_in_every_form() {
        for (content_type, body) in [
            (None, &b"{\"name\":\"n\",\"data\":\"a b\"}"[..]),
            (
                Some("application/json; charset=utf-8"),
                b"{\"name\":\"n\",\"data\":\"a b\"}",
            ),
            (Some("text/plain"), b"{\"name\":\"n\",\"data\":\"a b\"}"),
            (
                Some("application/x-msgpack"),
                b"\x82\xa4name\xa1n\xa4data\xa3a b",
            ),
            (
                Some("application/x-www-form-urlencoded"),
                b"name=n&data=a+b",
            ),
            (
                Some("application/x-www-form-urlencoded"),
                b"name=n&data=a%20b",
            ),
        ] {
            let message: Message = sent(content_type, body).await.value().unwrap();
            assert_eq!(
                (message.name.as_deref(), message.data),
                (Some("n"), text("a b"))
            );
        }
        let form = sent(
            Some("application/x-www-form-urlencoded"),
            b"extras=%7B%22headers%22:%7B%7D%7D",
        )
        .await;
        assert!(form.value::<Message>().unwrap().extras.is_some());
        let bad = sent(None, b"{").await.value::<Message>().unwrap_err();
        assert_eq!(bad.code, ErrorCode::InvalidBody);
    }

    #[tokio::test]
    async fn a_bare_body_is_data() {
        let binary = Some(Data::Binary(Bytes::from_static(b"\xff\x00")));
        for (content_type, body, data, encoding) in [
            (
                Some("text/plain"),
                &b"just text"[..],
                text("just text"),
                None,
            ),
            (None, b"just text", text("just text"), None),
            (None, b"\xff\x00", binary.clone(), None),
            (Some("application/octet-stream"), b"\xff\x00", binary, None),
            (
                Some("application/json"),
                b"{\"a\":1}",
                text("{\"a\":1}"),
                Some("json"),
            ),
            (Some("application/json"), b"\"a\"", text("a"), None),
            (Some("application/x-msgpack"), b"\xa1a", text("a"), None),
            (
                Some("application/x-www-form-urlencoded"),
                b"a=b+c",
                text("a=b+c"),
                None,
            ),
        ] {
            let message = sent(content_type, body).await.data().unwrap();
            assert_eq!(
                (message.data, message.encoding.as_deref()),
                (data, encoding)
            );
        }
        for (content_type, body) in [
            ("text/plain", &b"\xff"[..]),
            ("application/json", b"1,\"clientId\":\"eve\""),
            ("application/json", b""),
            ("application/x-msgpack", b"\xa1a\xa1b"),
        ] {
            assert!(
                sent(Some(content_type), body).await.data().is_err(),
                "{body:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_body_beyond_the_limit_is_too_large() {
        let headers = HeaderMap::new();
        let read = Sent::read(&headers, Body::from(vec![b'x'; 65]), 64);
        assert_eq!(read.await.unwrap_err().code, ErrorCode::MessageTooLarge);
    }
}
