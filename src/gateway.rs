//! The internet door: accepts connections, serves REST and the page, and drives a `session` for each WebSocket.

mod answer;
mod comet;
mod conversation;
mod departures;
mod history;
mod keys;
mod lifecycle;
mod live;
mod members;
mod occupancy;
mod open;
mod page;
mod relay;
mod rest;
mod wire;
mod ws;

use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use axum::{Extension, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::broker::Broker;
use crate::gateway::comet::Comets;
use crate::gateway::departures::Departures;
use crate::gateway::keys::Keys;
use crate::gateway::lifecycle::Lifecycle;
use crate::gateway::live::{Live, Seat};
use crate::session::{Limits, Opening};
use crate::tasks::{OnError, Tasks};

/// How long a client may leave what it was sent unacknowledged.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// How long a client may take to send a request's head.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 32 * 1024;

/// Presence members of a channel unless configured otherwise.
pub const MEMBERS_MAX: usize = 250;

/// What the door listens on and lets in.
#[derive(Clone, Debug)]
pub struct Options {
    pub listen: SocketAddr,
    /// Connections at a time, over which new ones wait to be accepted.
    pub connections_max: usize,
    pub limits: Limits,
    /// Presence members that one channel may have.
    pub members_max: usize,
}

/// The door could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for clients on {listen}: {source}")]
pub struct Error {
    listen: SocketAddr,
    source: std::io::Error,
}

/// What every handler shares.
#[derive(Clone)]
pub(crate) struct Door {
    broker: Broker,
    keys: Keys,
    live: Live,
    comets: Comets,
    departures: Departures,
    lifecycle: Lifecycle,
    limits: Limits,
    /// Presence members that one channel may have.
    members_max: usize,
    tasks: Tasks,
}

impl Door {
    /// The connection's place, which its older sockets lose wherever they are.
    fn seat(&self, opening: &Opening) -> Seat {
        let (id, now_ms) = (&opening.connection_id, self.broker.now_ms());
        let seat = self.live.take(id, now_ms, self.broker.node());
        self.departures.came_back(id);
        if opening.resumed {
            self.broker.say_taken(id, now_ms, &self.tasks);
        }
        seat
    }
}

/// The port, taken but not served yet.
#[derive(Debug)]
pub struct Gateway {
    listener: TcpListener,
    options: Options,
}

impl Gateway {
    /// Takes the port.
    ///
    /// # Errors
    /// When it cannot be had.
    pub async fn bind(options: Options) -> Result<Self, Error> {
        let listen = options.listen;
        let bound = TcpListener::bind(listen).await;
        let listener = bound.map_err(|source| Error { listen, source })?;
        Ok(Self { listener, options })
    }

    #[must_use]
    pub fn local_address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Serves until `tasks` is stopped. Clients are then told to go elsewhere.
    pub fn serve(self, broker: Broker, tasks: &Tasks) {
        let live = Live::default();
        let door = Door {
            keys: Keys::new(&broker, tasks),
            live: live.clone(),
            comets: Comets::new(self.options.connections_max),
            departures: Departures::new(broker.clone(), live.clone(), tasks.clone()),
            lifecycle: Lifecycle::start(&broker, tasks),
            limits: self.options.limits.clone(),
            members_max: self.options.members_max,
            tasks: tasks.clone(),
            broker,
        };
        let comets = door.comets.clone();
        (door.broker).on_relayed(move |asked| relay::carry_out(comets.clone(), asked));
        (door.broker).on_taken(move |id, at_ms, by| live.taken_elsewhere(id, at_ms, by));
        let router = rest::router(door);
        let connections = Arc::new(Semaphore::new(self.options.connections_max));
        let acceptor = Acceptor {
            listener: self.listener,
            router,
            connections,
            tasks: tasks.clone(),
        };
        tasks.spawn("gateway.accept", OnError::StopNode, |token| {
            acceptor.run(token)
        });
    }
}

struct Acceptor {
    listener: TcpListener,
    router: Router,
    connections: Arc<Semaphore>,
    tasks: Tasks,
}

impl Acceptor {
    async fn run(self, token: CancellationToken) -> anyhow::Result<()> {
        loop {
            let room = self.connections.clone().acquire_owned();
            let permit = tokio::select! {
                () = token.cancelled() => return Ok(()),
                permit = room => permit?,
            };
            let accepted = tokio::select! {
                () = token.cancelled() => return Ok(()),
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let permit = Permit(Arc::new(permit));
                    let router = self.router.clone().layer(Extension(permit));
                    self.tasks
                        .spawn("gateway.http", OnError::Log, |token| async move {
                            serve(stream, router, token).await;
                            Ok(())
                        });
                }
                Err(err) => {
                    // Out of descriptors, most likely: others may close meanwhile.
                    tracing::warn!(error = %err, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}

/// A connection's place among those at a time. A WebSocket takes it over from the request it began as.
#[derive(Clone, Debug)]
pub(crate) struct Permit(
    #[expect(dead_code, reason = "held, never read")] Arc<OwnedSemaphorePermit>,
);

/// One TCP connection: requests one after another, until one of them becomes a WebSocket.
async fn serve(stream: TcpStream, router: Router, token: CancellationToken) {
    // Small frames are latency; a socket that refuses is as good as closed.
    let _ = stream.set_nodelay(true);
    // A client that vanished without a word is found out by what it does not acknowledge.
    let _ = socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(SILENCE_MAX));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .max_buf_size(HEAD_BYTES_MAX);
    let service = TowerToHyperService::new(router);
    let connection = http
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let stopped = tokio::select! {
        _ = connection.as_mut() => false,
        () = token.cancelled() => true,
    };
    if stopped {
        connection.as_mut().graceful_shutdown();
        // What goes wrong here is the client's connection only.
        let _ = connection.await;
    }
}

/// Milliseconds since 1970, by this node's clock.
fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// The same for what sessions live by: never less than before, and never standing still.
fn steady_ms() -> u64 {
    static STEADY: Mutex<Steady> = Mutex::new(Steady {
        quarters: 0,
        elapsed_ms: 0,
    });
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let mut steady = STEADY.lock().unwrap_or_else(|err| err.into_inner());
    let elapsed = u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX);
    steady.at(unix_ms(), elapsed)
}

/// A clock that waits for one that was set back by going slower: heartbeats come a little late meanwhile, and tokens are judged
/// by a time that is ahead, until it has.
struct Steady {
    /// Of a millisecond, since 1970.
    quarters: u64,
    elapsed_ms: u64,
}

impl Steady {
    /// `wall_ms` may jump, `elapsed_ms` may not.
    fn at(&mut self, wall_ms: u64, elapsed_ms: u64) -> u64 {
        let passed = elapsed_ms.saturating_sub(self.elapsed_ms);
        self.elapsed_ms = elapsed_ms;
        let slow = self.quarters.saturating_add(passed.saturating_mul(3));
        self.quarters = slow.max(wall_ms.saturating_mul(4));
        self.quarters / 4
    }
}

/// Sixteen URL-safe characters that nobody can guess.
fn random_id() -> String {
    use base64::Engine as _;
    let mut random = [0; 12];
    getrandom::fill(&mut random).expect("the system has randomness once it has booted");
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_back_is_waited_for_without_standing_still() {
        let mut steady = Steady {
            quarters: 0,
            elapsed_ms: 0,
        };
        assert_eq!(steady.at(1_000, 0), 1_000);
        assert_eq!(steady.at(1_100, 100), 1_100);
        assert_eq!(steady.at(9_000, 101), 9_000, "set forward");
        // And back again. However often it is asked, three quarters of the time pass.
        let slow: Vec<u64> = (102..=105).map(|now| steady.at(1_000 + now, now)).collect();
        assert_eq!(slow, [9_000, 9_001, 9_002, 9_003]);
        assert_eq!(steady.at(1_000 + 4_101, 4_101), 12_000);
        assert_eq!(steady.at(1_000 + 40_101, 40_101), 41_101, "caught up with");
    }
}
