//! The HTTP side of the door: REST, the page, and the way to the WebSocket.

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, RawQuery, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use axum::routing::get;
use percent_encoding::percent_decode_str;
use serde::Serialize;

use crate::auth::{ClientId, Identity, Operation, Presented};
use crate::broker::Publish;
use crate::gateway::answer::{self, answer, body_format, failure, wanted_format};
use crate::gateway::history::Query;
use crate::gateway::{Door, ws};
use crate::session::admit;
use crate::types::{ChannelKey, ChannelName, ErrorCode, ErrorInfo};
use crate::wire::ably::{self, Format};
use crate::wire::body::encode_body;

/// The page that lets two tabs talk through the cluster.
const PAGE: &str = include_str!("page.html");

/// How long a request's body may take.
const BODY_PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

type Answer = Response<Body>;
pub(super) type Pairs = Vec<(String, String)>;

pub(super) fn router(door: Door) -> Router {
    Router::new()
        .route("/", get(root).options(preflight))
        .route("/time", get(time).options(preflight))
        .route(
            "/channels/{channel}/messages",
            get(history).post(publish).options(preflight),
        )
        .route(
            "/channels/{channel}/history",
            get(history).options(preflight),
        )
        .route("/firth/where", get(whereabouts).options(preflight))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .with_state(door)
}

/// A query's pairs, percent-decoded. A `+` is a plus sign: client libraries encode spaces as `%20`.
pub(super) fn pairs(query: Option<&str>) -> Pairs {
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

pub(super) fn find<'a>(pairs: &'a Pairs, names: &[&str]) -> Option<&'a str> {
    let found = pairs
        .iter()
        .find(|(name, _)| names.contains(&name.as_str()));
    found.map(|(_, value)| value.as_str())
}

/// A request's format and query.
struct Asked {
    format: Format,
    pairs: Pairs,
    headers: HeaderMap,
}

impl Asked {
    fn new(headers: HeaderMap, query: Option<&str>) -> Self {
        let pairs = pairs(query);
        Self {
            format: wanted_format(&headers, find(&pairs, &["format"])),
            pairs,
            headers,
        }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Who asks, if it may do this to the channel.
    fn admit(
        &self,
        door: &Door,
        operation: Operation,
        channel: &str,
    ) -> Result<(Identity, ChannelKey), ErrorInfo> {
        let identity = self.identity(door)?;
        let name = ChannelName::parse(channel)
            .map_err(|err| ErrorInfo::new(ErrorCode::InvalidChannelName, err.to_string()))?;
        if !identity.capability.allows(operation, &name) {
            let what = format!("the key does not permit `{}` on `{name}`", operation.text());
            return Err(ErrorInfo::new(ErrorCode::CapabilityDenied, what));
        }
        let app = identity.app.clone();
        Ok((identity, ChannelKey { app, name }))
    }

    fn identity(&self, door: &Door) -> Result<Identity, ErrorInfo> {
        let presented = Presented::from_request(
            self.header("authorization"),
            find(&self.pairs, &["key"]),
            find(&self.pairs, &["accessToken", "access_token"]),
        )?;
        let wanted = self.header("x-ably-clientid");
        let wanted = wanted.map(ClientId::in_header).transpose()?;
        door.keys.authenticate(&presented, wanted.as_deref())
    }

    fn finish(&self, result: Result<Answer, ErrorInfo>) -> Answer {
        result.unwrap_or_else(|err| failure(self.format, &err))
    }
}

async fn root(State(door): State<Door>, request: Request) -> Answer {
    if ws::is_upgrade(request.headers()) {
        return ws::accept(door, request);
    }
    let mut response = Response::new(Body::from(PAGE));
    let headers = response.headers_mut();
    let html = HeaderValue::from_static("text/html; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, html);
    // Its scripts and styles are its own; it talks to nodes of the cluster, wherever they are.
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
                  connect-src *; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    let policy = HeaderValue::from_static(policy);
    headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    response
}

async fn preflight() -> Answer {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    answer::allow_everyone(response)
}

async fn time(RawQuery(query): RawQuery, headers: HeaderMap) -> Answer {
    let asked = Asked::new(headers, query.as_deref());
    answer(StatusCode::OK, asked.format, &[super::unix_ms()])
}

async fn unknown(RawQuery(query): RawQuery, headers: HeaderMap) -> Answer {
    answer::not_found(Asked::new(headers, query.as_deref()).format)
}

async fn wrong_method(method: Method, RawQuery(query): RawQuery, headers: HeaderMap) -> Answer {
    let what = format!("{method} is not possible here");
    let error = ErrorInfo::new(ErrorCode::MethodNotAllowed, what);
    failure(Asked::new(headers, query.as_deref()).format, &error)
}

#[derive(Serialize)]
struct Whereabouts<'a> {
    node: u64,
    shard: u32,
    leader: Option<u64>,
    #[serde(rename = "leaderUrl")]
    leader_url: Option<&'a str>,
    nodes: Vec<NodeUrl<'a>>,
}

#[derive(Serialize)]
struct NodeUrl<'a> {
    id: u64,
    url: &'a str,
}

/// Which node answers, and which leads the channel.
async fn whereabouts(
    State(door): State<Door>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Answer {
    let asked = Asked::new(headers, query.as_deref());
    let channel = find(&asked.pairs, &["channel"]).unwrap_or_default();
    let result = asked
        .admit(&door, Operation::Subscribe, channel)
        .map(|(_, key)| {
            let place = door.broker.place(&key);
            let nodes = door.broker.nodes();
            let leader = place.leader.and_then(|leader| nodes.get(&leader));
            let found = Whereabouts {
                node: door.broker.node().0,
                shard: place.shard.0,
                leader: place.leader.map(|leader| leader.0),
                leader_url: leader.map(|leader| leader.url.as_str()),
                nodes: nodes
                    .iter()
                    .map(|(id, peer)| NodeUrl {
                        id: id.0,
                        url: &peer.url,
                    })
                    .collect(),
            };
            answer(StatusCode::OK, asked.format, &found)
        });
    asked.finish(result)
}

async fn history(
    State(door): State<Door>,
    Path(channel): Path<String>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Answer {
    let asked = Asked::new(headers, query.as_deref());
    let result = read_history(&door, &asked, &channel).await;
    asked.finish(result)
}

async fn read_history(door: &Door, asked: &Asked, channel: &str) -> Result<Answer, ErrorInfo> {
    let (_, key) = asked.admit(door, Operation::History, channel)?;
    let page = Query::parse(&asked.pairs)?.page(&door.broker, &key).await?;
    let bytes = ably::encode_messages(asked.format, &page.messages);
    let mut response = answer::body(StatusCode::OK, asked.format, Body::from(bytes));
    for link in &page.links {
        if let Ok(link) = HeaderValue::from_str(link) {
            response.headers_mut().append(header::LINK, link);
        }
    }
    Ok(response)
}

#[derive(Serialize)]
struct PublishedBody {
    channel: String,
    #[serde(rename = "messageId")]
    message_id: String,
    serials: Vec<String>,
}

async fn publish(
    State(door): State<Door>,
    Path(channel): Path<String>,
    RawQuery(query): RawQuery,
    request: Request,
) -> Answer {
    let (parts, body) = request.into_parts();
    let asked = Asked::new(parts.headers, query.as_deref());
    let result = store(&door, &asked, &channel, body).await;
    asked.finish(result)
}

async fn store(door: &Door, asked: &Asked, channel: &str, body: Body) -> Result<Answer, ErrorInfo> {
    let (identity, key) = asked.admit(door, Operation::Publish, channel)?;
    let bytes = axum::body::to_bytes(body, door.limits.max_frame_bytes);
    let bytes = tokio::time::timeout(BODY_PATIENCE, bytes).await;
    let bytes = bytes.map_err(|_| ErrorInfo::new(ErrorCode::BadRequest, "body came too slowly"))?;
    let bytes = bytes.map_err(|_| {
        let what = format!("body is larger than {} bytes", door.limits.max_frame_bytes);
        ErrorInfo::new(ErrorCode::MessageTooLarge, what)
    })?;
    let messages = ably::decode_messages(body_format(&asked.headers), &bytes)?;
    let admission = admit(messages, &identity.client_id, door.limits.max_message_bytes)?;
    // An id of our own, so that a retry inside the cluster is recognised.
    let id = admission.base_id.clone().unwrap_or_else(super::random_id);
    let publish = Publish {
        key,
        id: id.clone(),
        connection_id: String::new(),
        count: u32::from(admission.count),
        body: encode_body(&admission.messages),
        source: None,
        presence: None,
        ephemeral: admission.ephemeral,
    };
    let (serial, _) = door.broker.publish(publish).outcome().await?;
    let serial = serial.ok_or(ErrorCode::Internal)?;
    let stored = PublishedBody {
        channel: channel.to_owned(),
        message_id: id,
        serials: (0..admission.count)
            .map(|n| serial.message(n).to_string())
            .collect(),
    };
    Ok(answer(StatusCode::CREATED, asked.format, &stored))
}
