//! Answers of the REST door: bodies in the client's format, errors in the protocol's form.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde::Serialize;

use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::{self, ErrorBody, Format};

/// The format a client wants its answer in: `Accept`, else `format` in the query, else JSON.
pub(super) fn wanted_format(headers: &HeaderMap, query: Option<&str>) -> Format {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    let msgpack = |text: &str| text.contains(Format::MsgPack.media_type());
    match (accept, query) {
        (Some(accept), _) if msgpack(accept) => Format::MsgPack,
        (Some(accept), _) if accept.contains(Format::Json.media_type()) => Format::Json,
        (_, Some("msgpack")) => Format::MsgPack,
        (_, _) => Format::Json,
    }
}

/// The format a request's body is in, by its content type; JSON where it says nothing.
pub(super) fn body_format(headers: &HeaderMap) -> Format {
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    match content_type {
        Some(value) if value.starts_with(Format::MsgPack.media_type()) => Format::MsgPack,
        _ => Format::Json,
    }
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
    if let Ok(message) = HeaderValue::from_str(&error.message) {
        headers.insert("x-ably-errormessage", message);
    }
    response
}

/// Lets pages of any origin read the answer: what protects a channel is its key, never the page's address.
pub(super) fn allow_everyone(mut response: Response<Body>) -> Response<Body> {
    const HEADERS: [(&str, &str); 4] = [
        ("access-control-allow-origin", "*"),
        ("access-control-allow-methods", "GET, POST, OPTIONS"),
        (
            "access-control-allow-headers",
            "Authorization, Content-Type, Accept, X-Ably-Version, X-Ably-ClientId, Ably-Agent",
        ),
        (
            "access-control-expose-headers",
            "Link, X-Ably-ErrorCode, X-Ably-ErrorMessage",
        ),
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
