//! What a request asks for, beside its body: path, query, headers; and who asks.

use axum::extract::rejection::RawPathParamsRejection;
use axum::extract::{FromRequestParts, RawPathParams};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use percent_encoding::percent_decode_str;

use crate::auth::{ClientId, Identity, Operation, Presented};
use crate::gateway::Door;
use crate::gateway::answer::{failure, wanted_format};
use crate::gateway::rest::Answer;
use crate::types::{ChannelKey, ChannelName, ErrorCode, ErrorInfo};
use crate::wire::ably::Format;

/// From this version on batches and revocations are answered with counts (§3.5).
const VERSION_OF_COUNTS: f64 = 3.0;

pub(in crate::gateway) type Pairs = Vec<(String, String)>;

/// A query's pairs, percent-decoded. A `+` is a plus sign: client libraries encode spaces as `%20`.
pub(in crate::gateway) fn pairs(query: Option<&str>) -> Pairs {
    let decode = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let parts = query
        .unwrap_or_default()
        .split('&')
        .filter(|part| !part.is_empty());
    let pair = |part: &str| match part.split_once('=') {
        Some((name, value)) => (decode(name), decode(value)),
        None => (decode(part), String::new()),
    };
    parts.map(pair).collect()
}

pub(in crate::gateway) fn find<'a>(pairs: &'a Pairs, names: &[&str]) -> Option<&'a str> {
    let found = pairs
        .iter()
        .find(|(name, _)| names.contains(&name.as_str()));
    found.map(|(_, value)| value.as_str())
}

/// A request without its body. Never shown: its headers and its query hold credentials.
pub(super) struct Asked {
    /// Of the answer.
    pub(super) format: Format,
    pub(super) pairs: Pairs,
    pub(super) headers: HeaderMap,
    /// The path's named segments, percent-decoded.
    segments: Pairs,
}

impl<S: Send + Sync> FromRequestParts<S> for Asked {
    type Rejection = Answer;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Answer> {
        let pairs = pairs(parts.uri.query());
        let format = wanted_format(&parts.headers, find(&pairs, &["format"]));
        let segments = match RawPathParams::from_request_parts(parts, state).await {
            Ok(params) => params
                .iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            Err(RawPathParamsRejection::InvalidUtf8InPathParam(_)) => {
                let what = "the path is not UTF-8";
                let error = ErrorInfo::new(ErrorCode::BadRequest, what);
                return Err(failure(format, &error));
            }
            // A path without named segments.
            Err(_) => Pairs::new(),
        };
        Ok(Self {
            format,
            pairs,
            headers: parts.headers.clone(),
            segments,
        })
    }
}

impl Asked {
    /// A named segment of the path; empty where the route has none of that name.
    pub(super) fn segment(&self, name: &str) -> &str {
        find(&self.segments, &[name]).unwrap_or_default()
    }

    /// The query's value under the first of these names that it has.
    pub(super) fn param(&self, names: &[&str]) -> Option<&str> {
        find(&self.pairs, names)
    }

    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The version of the protocol, if the request says one.
    pub(super) fn version(&self) -> Option<f64> {
        let version = self.header("x-ably-version").or(self.param(&["v"]));
        version.and_then(|version| version.parse().ok())
    }

    /// Whether the client understands answers that count what succeeded.
    pub(super) fn understands_counts(&self) -> bool {
        self.version().is_some_and(|v| v >= VERSION_OF_COUNTS)
    }

    /// What proves who asks.
    ///
    /// # Errors
    /// As [`Presented::from_request`].
    pub(super) fn presented(&self) -> Result<Presented, ErrorInfo> {
        Presented::from_request(
            self.header("authorization"),
            self.param(&["key"]),
            self.param(&["accessToken", "access_token"]),
        )
    }

    /// Who asks.
    ///
    /// # Errors
    /// When nobody does who is known.
    pub(super) fn identity(&self, door: &Door) -> Result<Identity, ErrorInfo> {
        let presented = self.presented()?;
        let wanted = self.header("x-ably-clientid");
        let wanted = wanted.map(ClientId::in_header).transpose()?;
        door.keys.authenticate(&presented, wanted.as_deref())
    }

    /// Who asks, if it may do this to the channel.
    ///
    /// # Errors
    /// When it may not, or `channel` is no name.
    pub(super) fn admit(
        &self,
        door: &Door,
        operation: Operation,
        channel: &str,
    ) -> Result<(Identity, ChannelKey), ErrorInfo> {
        let identity = self.identity(door)?;
        let key = permitted(&identity, operation, channel)?;
        Ok((identity, key))
    }

    /// As [`Self::admit`], for the channel in the path.
    ///
    /// # Errors
    /// As that.
    pub(super) fn admit_to(
        &self,
        door: &Door,
        operation: Operation,
    ) -> Result<(Identity, ChannelKey), ErrorInfo> {
        self.admit(door, operation, self.segment("channel"))
    }

    /// The answer that comes of it.
    pub(super) async fn respond(
        &self,
        work: impl Future<Output = Result<Answer, ErrorInfo>>,
    ) -> Answer {
        self.finish(work.await)
    }

    pub(super) fn finish(&self, result: Result<Answer, ErrorInfo>) -> Answer {
        result.unwrap_or_else(|err| failure(self.format, &err))
    }
}

/// The channel, if this client may do this to it.
///
/// # Errors
/// `InvalidChannelName`, `CapabilityDenied`.
pub(super) fn permitted(
    identity: &Identity,
    operation: Operation,
    channel: &str,
) -> Result<ChannelKey, ErrorInfo> {
    let name = ChannelName::parse(channel)
        .map_err(|err| ErrorInfo::new(ErrorCode::InvalidChannelName, err.to_string()))?;
    if !identity.capability.allows(operation, &name) {
        let what = format!(
            "the capability does not permit `{}` on `{name}`",
            operation.text()
        );
        return Err(ErrorInfo::new(ErrorCode::CapabilityDenied, what));
    }
    let app = identity.app.clone();
    Ok(ChannelKey { app, name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_taken_apart_before_they_are_decoded() {
        let read = pairs(Some("a=1%262&b&&c=x%3Dy=z&d=1+1"));
        let expected = [("a", "1&2"), ("b", ""), ("c", "x=y=z"), ("d", "1+1")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(read, expected);
        assert_eq!(find(&read, &["x", "c"]), Some("x=y=z"));
        assert_eq!(find(&read, &["x"]), None);
    }
}
