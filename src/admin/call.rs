//! The calls the CLI makes to a node's admin listener.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::admin::Status;

const PATIENCE: Duration = Duration::from_secs(5);
/// No answer is larger.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{0}` is not of the form http://host:port")]
    Url(String),
    #[error("cannot reach {url}: {reason}")]
    Unreachable { url: String, reason: String },
    #[error("{url} answered {status}: {body}")]
    Refused {
        url: String,
        status: u16,
        body: String,
    },
}

/// Fetches `path` from the admin listener at `url`.
///
/// # Errors
/// When there is no answer, or not the answer 200.
pub async fn get(url: &str, path: &str) -> Result<String, Error> {
    call(url, "GET", path, "").await
}

/// Sends a command without a body to `path` of the admin listener at `url`.
///
/// # Errors
/// When there is no answer, or not the answer 200.
pub async fn post(url: &str, path: &str) -> Result<String, Error> {
    call(url, "POST", path, "").await
}

/// Sends JSON to `path` of the admin listener at `url`.
///
/// # Errors
/// When there is no answer, or neither the answer 200 nor 201.
pub async fn send(url: &str, path: &str, body: &serde_json::Value) -> Result<String, Error> {
    call(url, "POST", path, &body.to_string()).await
}

/// Deletes what is at `path` of the admin listener at `url`.
///
/// # Errors
/// When there is no answer, or not the answer 200.
pub async fn delete(url: &str, path: &str) -> Result<String, Error> {
    call(url, "DELETE", path, "").await
}

async fn call(url: &str, method: &str, path: &str, body: &str) -> Result<String, Error> {
    let authority = url
        .strip_prefix("http://")
        .map(|rest| rest.trim_end_matches('/'));
    let authority = authority.ok_or_else(|| Error::Url(url.to_owned()))?;
    let unreachable = |reason: String| Error::Unreachable {
        url: url.to_owned(),
        reason,
    };
    let exchange = async {
        let mut stream = TcpStream::connect(authority).await?;
        let length = body.len();
        let kind = match length {
            0 => "",
            _ => "Content-Type: application/json\r\n",
        };
        let head = format!(
            "{method} {path} HTTP/1.0\r\nHost: {authority}\r\n{kind}Content-Length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        let mut answer = String::new();
        stream
            .take(ANSWER_BYTES_MAX)
            .read_to_string(&mut answer)
            .await?;
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(PATIENCE, exchange).await;
    let answer = answer.map_err(|_| unreachable("no answer in time".to_owned()))?;
    let answer = answer.map_err(|err| unreachable(err.to_string()))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    match status {
        Some(200 | 201) => Ok(body.to_owned()),
        Some(status) => Err(Error::Refused {
            url: url.to_owned(),
            status,
            body: body.trim().to_owned(),
        }),
        None => Err(unreachable("the answer is not HTTP".to_owned())),
    }
}

/// How a node stands on its way back.
#[derive(Debug, serde::Deserialize)]
struct Standing {
    readmitting: bool,
    groups: usize,
    votes_in: usize,
}

/// How often a readmission is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// Has a node readmitted by the cluster of the node at `url`, and waits for it if told to. `say` hears how it goes.
///
/// # Errors
/// When it is refused, or the node at `url` is lost sight of.
pub async fn readmit(
    url: &str,
    node: u64,
    wait: bool,
    mut say: impl FnMut(String) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    post(url, &format!("/nodes/{node}/readmit")).await?;
    say(format!("node {node} is being readmitted"))?;
    if !wait {
        return Ok(());
    }
    let mut told = usize::MAX;
    loop {
        let standing: Standing = serde_json::from_str(&get(url, &format!("/nodes/{node}")).await?)?;
        if standing.votes_in != told {
            told = standing.votes_in;
            say(format!("votes in {told} of {} groups", standing.groups))?;
        }
        if !standing.readmitting && standing.votes_in == standing.groups {
            return say(format!("node {node} is back"));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What a node says of itself and its cluster.
///
/// # Errors
/// As [`get`].
pub async fn status(url: &str) -> Result<Status, Error> {
    let body = get(url, "/status").await?;
    serde_json::from_str(&body).map_err(|err| Error::Unreachable {
        url: url.to_owned(),
        reason: format!("the answer cannot be read: {err}"),
    })
}

/// The status as a person reads it.
#[must_use]
pub fn table(status: &Status) -> String {
    let known = |leader: Option<u64>| leader.map_or("-".to_owned(), |leader| leader.to_string());
    let mut text = format!(
        "cluster {}   asked node {}   version {}   control leader {}\n\nNODE  CLIENTS                       ADMIN                         LEADS\n",
        status.cluster,
        status.node,
        status.version,
        known(status.control.leader)
    );
    for node in &status.nodes {
        let leads = status
            .shards
            .iter()
            .filter(|shard| shard.leader == Some(node.id))
            .count();
        text += &format!(
            "{:<5} {:<29} {:<29} {leads}\n",
            node.id, node.url, node.admin
        );
    }
    let (log, states) = (&status.log, &status.states);
    text += &format!(
        "\nlog: {} segments, {} MiB; {} unreadable entries; verified {} times\nstates compared: {} agreed, {} differed\n",
        log.segments,
        log.bytes_on_disk >> 20,
        log.unreadable_entries,
        log.scrub_rounds,
        states.agreed,
        states.differed
    );
    text += "\nSHARD  LEADER  TERM   APPLIED    FIRST      LOG KiB\n";
    for shard in &status.shards {
        let leader = known(shard.leader);
        text += &format!(
            "{:<6} {leader:<7} {:<6} {:<10} {:<10} {}\n",
            shard.id,
            shard.term,
            shard.applied,
            shard.first.unwrap_or_default(),
            shard.log_bytes >> 10
        );
    }
    for bridge in &status.bridges {
        let field = |name: &str| match &bridge[name] {
            serde_json::Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let count = |name: &str| bridge[name].as_array().map_or(0, Vec::len);
        let (id, state) = (field("bridge"), field("state"));
        let (inbound, outbound) = (count("inbound"), count("outbound"));
        text += &format!(
            "\nbridge {id}: {state}; this node reads {inbound} partitions and exports {outbound} shards\n"
        );
    }
    text
}
