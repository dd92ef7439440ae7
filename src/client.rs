//! The command-line client: `firth pub`, `firth sub`, and `firth bench` as far as it is about a cluster.
//!
//! It speaks the public client protocol over WebSocket like any other client and knows nothing of the broker.

mod bench;
mod connection;
mod conversation;
mod publish;
mod socket;
mod subscribe;

#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::Duration;

pub use self::bench::{FanoutArgs, PublishBenchArgs};
pub use self::connection::{Connection, Events, Pending};
pub use self::conversation::{Answer, Event, Messages};
pub use self::publish::PubArgs;
pub use self::subscribe::SubArgs;

use crate::tasks::Tasks;
use crate::types::ErrorInfo;
use crate::wire::ably::Format;

/// Time for everything under way to end after a command is done.
const FAREWELL: Duration = Duration::from_secs(3);

/// How a connection behaves. [`Options::new`] gives the defaults.
#[derive(Clone, Debug)]
pub struct Options {
    /// Nodes of the cluster, as `http://host:port`; the next one is tried when one is lost.
    pub urls: Vec<String>,
    /// `app.key:secret`.
    pub key: String,
    pub format: Format,
    pub client_id: Option<String>,
    /// Whether the connection receives what it publishes itself.
    pub echo: bool,
    /// Publishes without answer at one time.
    pub window: usize,
    /// Time for the first connection, and for each answer that is waited for.
    pub connect_timeout: Duration,
    /// Time without connection after which it is given up; `None` is never.
    pub give_up: Option<Duration>,
    /// Pause after the first failed try; it doubles up to `retry_longest`.
    pub retry_first: Duration,
    pub retry_longest: Duration,
    /// Added to the longest silence that the server promises.
    pub idle_grace: Duration,
}

impl Options {
    #[must_use]
    pub fn new(urls: Vec<String>, key: impl Into<String>) -> Self {
        Self {
            urls,
            key: key.into(),
            format: Format::Json,
            client_id: None,
            echo: true,
            window: 256,
            connect_timeout: Duration::from_secs(10),
            give_up: Some(Duration::from_secs(120)),
            retry_first: Duration::from_millis(50),
            retry_longest: Duration::from_secs(2),
            idle_grace: Duration::from_secs(10),
        }
    }
}

/// Why a command or a connection cannot go on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("invalid url `{url}`: {reason}")]
    Url { url: String, reason: &'static str },
    #[error("cannot connect: {reason}")]
    Unreachable { reason: String },
    /// The server's own words; the same request will fail again unless they say otherwise.
    #[error("refused by the server: {0}")]
    Refused(ErrorInfo),
    /// What was under way may have happened.
    #[error("the connection is closed")]
    Closed,
    #[error("the server did not answer {0} in time")]
    NoAnswer(&'static str),
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
    #[error("{what}: {reason}")]
    Io { what: &'static str, reason: String },
}

impl Error {
    fn io(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |err| Self::Io {
            what,
            reason: err.to_string(),
        }
    }
}

/// Where the cluster is, and who asks.
#[derive(Clone, Debug, clap::Args)]
pub struct ServerArgs {
    /// Node to connect to, as http://host:port; several, with commas, are tried in turn
    #[arg(
        long,
        env = "FIRTH_URL",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:8080"
    )]
    url: Vec<String>,
    /// API key, as app.key:secret
    #[arg(long, env = "FIRTH_KEY", hide_env_values = true)]
    key: String,
    /// Use MessagePack frames instead of JSON
    #[arg(long)]
    msgpack: bool,
}

impl ServerArgs {
    fn options(&self) -> Options {
        let format = if self.msgpack {
            Format::MsgPack
        } else {
            Format::Json
        };
        Options {
            format,
            ..Options::new(self.url.clone(), &self.key)
        }
    }
}

/// The commands of the client, to be flattened into those of `firth`.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Command {
    /// Publish messages to a channel
    Pub(PubArgs),
    /// Print the messages of a channel as they come
    Sub(SubArgs),
}

/// What `firth bench` can do to a cluster, to be flattened into its commands.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum BenchCommand {
    /// Many publishers on many channels: publish to acknowledgement
    Publish(PublishBenchArgs),
    /// One publisher to many subscribers of one channel: publish to delivery
    Fanout(FanoutArgs),
}

/// Runs a command to its end or to an interrupt; the code is 0 when all was well and 130 after an interrupt that left
/// something undone.
///
/// # Errors
/// When the command cannot go on; nothing was printed about it yet.
pub async fn run(command: Command) -> Result<ExitCode, Error> {
    // A fatal task would be one at stake for a node; a client has none.
    let (tasks, _fatal_rx) = Tasks::root();
    let done = match command {
        Command::Pub(args) => publish::run(args, &tasks).await,
        Command::Sub(args) => subscribe::run(args, &tasks).await,
    };
    tasks.stop(FAREWELL).await;
    done
}

/// Runs a bench to its end or to an interrupt; the code is 0 when all was well, 1 when a verification failed and
/// 130 after an interrupt that left something undone.
///
/// # Errors
/// When the command cannot go on; nothing was printed about it yet.
pub async fn bench(command: BenchCommand) -> Result<ExitCode, Error> {
    let (tasks, _fatal_rx) = Tasks::root();
    let done = match command {
        BenchCommand::Publish(args) => bench::publish(args, &tasks).await,
        BenchCommand::Fanout(args) => bench::fanout(args, &tasks).await,
    };
    tasks.stop(FAREWELL).await;
    done
}

/// What a shell expects of a command that was interrupted.
const INTERRUPTED: u8 = 130;

/// Resolves at the first SIGINT or SIGTERM.
async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    if tokio::signal::ctrl_c().await.is_err() {
        // Without signals the command runs to its end.
        std::future::pending::<()>().await;
    }
}

/// A line for the person at the terminal, beside what the command puts out.
fn note(text: std::fmt::Arguments<'_>) {
    use std::io::Write;
    // Nobody may be listening.
    let _ = writeln!(std::io::stderr(), "{text}");
}
