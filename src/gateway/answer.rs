//! Answers of the REST door: bodies in the client's format, errors in the protocol's form.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde::Serialize;

use crate::gateway::page::Page;
use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::{self, ErrorBody, Format};

/// The format a client wants its answer in: the first in `Accept` that is spoken, else `format` in the query, else JSON.
pub(super) fn wanted_format(headers: &HeaderMap, query: Option<&str>) -> Format {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    let mut ranges = accept.unwrap_or_default().split(',');
    let spoken = |range: &str| {
        let media_type = range.split(';').next().unwrap_or_default().trim();
        let formats = [Format::Json, Format::MsgPack];
        let mut formats = formats.into_iter();
        formats.find(|format| format.media_type().eq_ignore_ascii_case(media_type))
    };
    let accepted = ranges.find_map(spoken);
    accepted.unwrap_or(match query {
        Some("msgpack") => Format::MsgPack,
        _ => Format::Json,
    })
}

/// An answer with a value as its body. The content type stands alone: client libraries compare it whole.
pub(super) fn answer<T: Serialize + ?Sized>(
    status: StatusCode,
    format: Format,
    value: &T,
) -> Response<Body> {
    body(
        status,
        format,
        Body::from(ably::encode_value(format, value)),
    )
}

pub(super) fn body(status: StatusCode, format: Format, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let media_type = HeaderValue::from_static(format.media_type());
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, media_type);
    allow_everyone(response)
}

#[derive(Serialize)]
struct Failure {
    error: ErrorBody,
}

pub(super) fn failure(format: Format, error: &ErrorInfo) -> Response<Body> {
    let status = StatusCode::from_u16(error.code.status());
    let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let failure = Failure {
        error: ErrorBody::from(error),
    };
    let mut response = answer(status, format, &failure);
    let headers = response.headers_mut();
    headers.insert("x-ably-errorcode", HeaderValue::from(error.code.code()));
    headers.insert("x-ably-errormessage", header_text(&error.message));
    response
}

/// A text with a `?` in place of every character that no header can have.
fn header_text(text: &str) -> HeaderValue {
    let plain = |c: char| {
        if c == ' ' || c.is_ascii_graphic() {
            c
        } else {
            '?'
        }
    };
    let text: String = text.chars().map(plain).collect();
    HeaderValue::from_str(&text).expect("visible ASCII can stand in a header")
}

/// A page of a list, with its links.
pub(super) fn page<T: Serialize>(format: Format, page: &Page<T>) -> Response<Body> {
    let mut response = answer(StatusCode::OK, format, &page.items);
    for link in &page.links {
        response
            .headers_mut()
            .append(header::LINK, header_text(link));
    }
    response
}

/// Done, and there is nothing to say.
pub(super) fn nothing() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    allow_everyone(response)
}

/// Lets pages of any origin read the answer: what protects a channel is its key, never the page's address.
pub(super) fn allow_everyone(mut response: Response<Body>) -> Response<Body> {
    const HEADERS: [(&str, &str); 5] = [
        ("access-control-allow-origin", "*"),
        (
            "access-control-allow-methods",
            "GET, POST, PATCH, PUT, DELETE, OPTIONS",
        ),
        (
            "access-control-allow-headers",
            "Authorization, Content-Type, Accept, Ably-Agent, X-Ably-Version, X-Ably-ClientId, X-Ably-Lib, \
             X-Ably-MessageId, X-Ably-Name, X-Ably-Encoding, X-Ably-ConnectionKey",
        ),
        (
            "access-control-expose-headers",
            "Link, X-Ably-ErrorCode, X-Ably-ErrorMessage",
        ),
        // As long as browsers keep it, so that not every request costs two.
        ("access-control-max-age", "7200"),
    ];
    for (name, value) in HEADERS {
        let value = HeaderValue::from_static(value);
        response.headers_mut().insert(name, value);
    }
    response
}

pub(super) fn not_found(format: Format) -> Response<Body> {
    failure(
        format,
        &ErrorInfo::new(ErrorCode::NotFound, "no such resource"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_format_accepted_is_the_answers() {
        for (accept, query, wanted) in [
            (None, None, Format::Json),
            (None, Some("msgpack"), Format::MsgPack),
            (None, Some("html"), Format::Json),
            (Some("*/*"), Some("msgpack"), Format::MsgPack),
            (Some("application/json"), Some("msgpack"), Format::Json),
            (
                Some("text/html, Application/X-MsgPack;q=0.9"),
                None,
                Format::MsgPack,
            ),
            (
                Some("application/x-msgpack,application/json"),
                None,
                Format::MsgPack,
            ),
            (
                Some("application/json, application/x-msgpack"),
                None,
                Format::Json,
            ),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            }
            assert_eq!(
                wanted_format(&headers, query),
                wanted,
                "{accept:?} {query:?}"
            );
        }
    }

    #[test]
    fn a_failure_says_so_in_status_headers_and_body() {
        let error = ErrorInfo::new(ErrorCode::MessageTooLarge, "\u{fc}ber\r\nlong");
        let response = failure(Format::Json, &error);
        assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
        let headers = response.headers();
        assert_eq!(headers["x-ably-errorcode"], "40009");
        assert_eq!(headers["x-ably-errormessage"], "?ber??long");
        assert_eq!(headers["content-type"], "application/json");
        assert_eq!(headers["access-control-allow-origin"], "*");
    }
}
