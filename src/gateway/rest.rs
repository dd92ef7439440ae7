//! The HTTP side of the door: REST, the page, and the ways to a conversation (§3).

mod asked;
mod batch;
mod channels;
mod comet;
mod one_or_many;
mod publish;
mod sent;
mod tokens;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, Response, StatusCode, header};
use axum::routing::{get, post};
use serde::Serialize;

use crate::auth::Operation;
use crate::gateway::answer::{self, answer};
use crate::gateway::rest::asked::Asked;
use crate::gateway::{Door, ws};
use crate::types::{ErrorCode, ErrorInfo};

pub(super) use asked::{Pairs, find, pairs};

/// The page that lets two tabs talk through the cluster.
const PAGE: &str = include_str!("page.html");

/// Channels of one batch, or of one part of it.
const BATCH_CHANNELS_MAX: usize = 100;

type Answer = Response<Body>;

pub(super) fn router(door: Door) -> Router {
    Router::new()
        .route("/", get(root))
        .route("/time", get(time))
        .merge(of_channels())
        .merge(of_comet())
        .route("/messages", post(batch::publish))
        .route("/presence", get(batch::presence))
        .route("/keys/{key}/requestToken", post(tokens::request))
        .route("/keys/{key}/revokeTokens", post(tokens::revoke))
        .route("/firth/where", get(whereabouts))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .with_state(door)
}

fn of_channels() -> Router<Door> {
    let message = "/channels/{channel}/messages/{serial}";
    let below = |part: &str| format!("{message}/{part}");
    Router::new()
        .route("/channels", get(channels::list))
        .route("/channels/{channel}", get(channels::details))
        .route("/channels/{channel}/history", get(channels::history))
        .route("/channels/{channel}/presence", get(channels::members))
        .route(
            "/channels/{channel}/presence/history",
            get(channels::presence_history),
        )
        .route(
            "/channels/{channel}/messages",
            get(channels::history).post(publish::publish),
        )
        .route(message, get(channels::message).patch(channels::change))
        .route(&below("versions"), get(channels::versions))
        .route(
            &below("annotations"),
            get(channels::annotations).post(channels::annotate),
        )
        .route(&below("client-summary"), get(channels::annotations))
}

fn of_comet() -> Router<Door> {
    Router::new()
        .route("/comet/connect", get(comet::connect).post(comet::connect))
        .route(
            "/comet/{key}/recv",
            get(comet::receive).post(comet::receive),
        )
        .route("/comet/{key}/send", post(comet::send))
        .route("/comet/{key}/close", get(comet::close).post(comet::close))
        .route(
            "/comet/{key}/disconnect",
            get(comet::disconnect).post(comet::disconnect),
        )
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

async fn time(asked: Asked) -> Answer {
    answer(StatusCode::OK, asked.format, &[super::unix_ms()])
}

/// A browser asks whether it may ask before it does, of any path.
async fn unknown(method: Method, asked: Asked) -> Answer {
    match method {
        Method::OPTIONS => answer::nothing(),
        _ => answer::not_found(asked.format),
    }
}

async fn wrong_method(method: Method, asked: Asked) -> Answer {
    if method == Method::OPTIONS {
        return answer::nothing();
    }
    let what = format!("{method} is not possible here");
    answer::failure(
        asked.format,
        &ErrorInfo::new(ErrorCode::MethodNotAllowed, what),
    )
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
async fn whereabouts(State(door): State<Door>, asked: Asked) -> Answer {
    let channel = asked.param(&["channel"]).unwrap_or_default();
    let admitted = asked.admit(&door, Operation::Subscribe, channel);
    let result = admitted.map(|(_, key)| {
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
