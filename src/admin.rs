//! The operator's side of a node: what it knows, over HTTP on a loopback address, and the calls the CLI makes.
//!
//! It only tells: commands and the credentials they need come with cluster operations.

pub mod call;
mod status;

pub use status::{ControlStatus, NodeStatus, ShardStatus, Status};

use std::net::SocketAddr;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::bridge::Bridge;
use crate::broker::Broker;
use crate::tasks::{OnError, Tasks};
use crate::types::{ChannelKey, ChannelName};

/// Where operators are heard.
#[derive(Clone, Debug)]
pub struct Options {
    pub listen: SocketAddr,
}

/// The listener could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for operators on {listen}: {source}")]
pub struct Error {
    listen: SocketAddr,
    source: std::io::Error,
}

/// What the node can tell once it serves.
#[derive(Clone, Debug)]
pub struct Serving {
    pub broker: Broker,
    pub bridge: Bridge,
}

type Known = watch::Receiver<Option<Serving>>;

/// Starts to answer. Until `serving` holds something, the node is alive but not ready.
///
/// # Errors
/// When the port cannot be had.
pub async fn start(options: &Options, serving: Known, tasks: &Tasks) -> Result<(), Error> {
    let listen = options.listen;
    let bound = TcpListener::bind(listen).await;
    let listener = bound.map_err(|source| Error { listen, source })?;
    let router = Router::new()
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/status", get(status))
        .route("/channels/{app}/{channel}", get(channel))
        .with_state(serving);
    tasks.spawn("admin.http", OnError::StopNode, |token| async move {
        let stopped = token.cancelled_owned();
        let served = axum::serve(listener, router).with_graceful_shutdown(stopped);
        Ok(served.await?)
    });
    Ok(())
}

async fn live() -> &'static str {
    "live\n"
}

async fn ready(State(known): State<Known>) -> (StatusCode, &'static str) {
    match *known.borrow() {
        Some(_) => (StatusCode::OK, "ready\n"),
        None => (StatusCode::SERVICE_UNAVAILABLE, "starting\n"),
    }
}

type Answer = (StatusCode, Json<Value>);

fn refuse(status: StatusCode, what: &str) -> Answer {
    (status, Json(json!({ "error": what })))
}

async fn status(State(known): State<Known>) -> Answer {
    let serving = known.borrow().clone();
    let Some(serving) = serving else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the node is starting");
    };
    match serde_json::to_value(Status::of(&serving)) {
        Ok(status) => (StatusCode::OK, Json(status)),
        Err(err) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &err.to_string()),
    }
}

async fn channel(
    State(known): State<Known>,
    Path((app, channel)): Path<(String, String)>,
) -> Answer {
    let serving = known.borrow().clone();
    let Some(serving) = serving else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "the node is starting");
    };
    let app = match app.parse() {
        Ok(app) => app,
        Err(err) => return refuse(StatusCode::BAD_REQUEST, &format!("{err}")),
    };
    let name = match ChannelName::parse(&channel) {
        Ok(name) => name,
        Err(err) => return refuse(StatusCode::BAD_REQUEST, &err.to_string()),
    };
    let place = serving.broker.place(&ChannelKey { app, name });
    let leader = place.leader.map(|leader| leader.0);
    (
        StatusCode::OK,
        Json(json!({ "shard": place.shard.0, "leader": leader })),
    )
}
