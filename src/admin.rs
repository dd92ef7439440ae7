//! The operator's side of a node: what it knows, over HTTP on a loopback address, and the calls the CLI makes.
//!
//! Its commands bring a node back that lost its data, and create and delete apps; credentials come with cluster operations,
//! hence loopback only.

pub mod app_command;
mod app_routes;
mod apps;
pub mod call;
mod status;

pub use app_command::AppCommand;
pub use apps::RETENTION_MS_MAX;
pub use status::{ControlStatus, LogStatus, NodeStatus, ShardStatus, StatesStatus, Status};

use std::net::SocketAddr;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::bridge::Bridge;
use crate::broker::Broker;
use crate::cluster::ReadmitError;
use crate::tasks::{OnError, Tasks};
use crate::types::{ChannelKey, ChannelName, NodeId};

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

#[derive(Clone, Debug)]
struct Known {
    serving: watch::Receiver<Option<Serving>>,
    /// What a node that does not serve yet waits for.
    phase: watch::Receiver<String>,
}

impl Known {
    fn serving(&self) -> Result<Serving, Answer> {
        let serving = self.serving.borrow().clone();
        serving.ok_or_else(|| {
            let phase = self.phase.borrow().clone();
            let why = format!("the node does not serve yet: {phase}");
            refuse(StatusCode::SERVICE_UNAVAILABLE, &why)
        })
    }
}

/// Starts to answer. Until `serving` holds something, the node is alive but not ready.
///
/// # Errors
/// When the port cannot be had.
pub async fn start(
    options: &Options,
    serving: watch::Receiver<Option<Serving>>,
    phase: watch::Receiver<String>,
    tasks: &Tasks,
) -> Result<(), Error> {
    let listen = options.listen;
    let bound = TcpListener::bind(listen).await;
    let listener = bound.map_err(|source| Error { listen, source })?;
    let router = Router::new()
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/status", get(status))
        .route("/channels/{app}/{channel}", get(channel))
        .route("/nodes/{node}", get(node))
        .route("/nodes/{node}/readmit", post(readmit))
        .route("/apps", get(app_routes::list).post(app_routes::create))
        .route(
            "/apps/{app}",
            get(app_routes::show).delete(app_routes::delete),
        )
        .with_state(Known { serving, phase });
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

async fn ready(State(known): State<Known>) -> (StatusCode, String) {
    if known.serving.borrow().is_some() {
        return (StatusCode::OK, "ready\n".to_owned());
    }
    let phase = known.phase.borrow().clone();
    (
        StatusCode::SERVICE_UNAVAILABLE,
        format!("starting: {phase}\n"),
    )
}

type Answer = (StatusCode, Json<Value>);

fn refuse(status: StatusCode, what: &str) -> Answer {
    (status, Json(json!({ "error": what })))
}

/// A value as JSON.
fn answer<T: serde::Serialize>(status: StatusCode, value: &T) -> Answer {
    match serde_json::to_value(value) {
        Ok(value) => (status, Json(value)),
        Err(err) => refuse(StatusCode::INTERNAL_SERVER_ERROR, &err.to_string()),
    }
}

async fn status(State(known): State<Known>) -> Answer {
    let serving = match known.serving() {
        Ok(serving) => serving,
        Err(answer) => return answer,
    };
    answer(StatusCode::OK, &Status::of(&serving))
}

async fn channel(
    State(known): State<Known>,
    Path((app, channel)): Path<(String, String)>,
) -> Answer {
    let serving = match known.serving() {
        Ok(serving) => serving,
        Err(answer) => return answer,
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

/// Whether a node is part of the cluster, or on its way back.
async fn node(State(known): State<Known>, Path(node): Path<u64>) -> Answer {
    let serving = match known.serving() {
        Ok(serving) => serving,
        Err(answer) => return answer,
    };
    let standing = serving.broker.cluster().standing(NodeId(node));
    let Some(standing) = standing else {
        return refuse(StatusCode::NOT_FOUND, &format!("there is no node {node}"));
    };
    let answer = json!({
        "node": node,
        "directory": standing.directory,
        "readmitting": standing.readmitting,
        "groups": standing.groups,
        "votes_in": standing.votes_in,
    });
    (StatusCode::OK, Json(answer))
}

async fn readmit(State(known): State<Known>, Path(node): Path<u64>) -> Answer {
    let serving = match known.serving() {
        Ok(serving) => serving,
        Err(answer) => return answer,
    };
    match serving.broker.cluster().readmit(NodeId(node)).await {
        Ok(()) => (
            StatusCode::OK,
            Json(json!({ "node": node, "readmitting": true })),
        ),
        Err(err @ ReadmitError::Unknown(_)) => refuse(StatusCode::NOT_FOUND, &err.to_string()),
        Err(err) => refuse(StatusCode::CONFLICT, &err.to_string()),
    }
}
