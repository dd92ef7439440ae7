//! QUIC between nodes: one UDP port, mutual TLS, unary calls and ordered streams.
//!
//! Each node dials for its own requests, two connections per peer ([`Lane`]), so that bulk never delays a
//! heartbeat. What arrives is served by handlers that rooms above register. A connection that ends is dialed
//! again with growing pauses; what was under way on it fails and says whether it was sent.

mod body;
pub mod certs;
mod frame;
mod link;
mod server;
mod stream;
mod tls;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use quinn::Endpoint;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::debug;

use crate::tasks::{OnError, Tasks};
use crate::types::{GroupId, NodeId};
use crate::wire::peer;

pub use self::body::Body;
use self::link::Link;
pub use self::stream::{FrameRx, FrameTx, StreamError};

/// What a frame may need beside its body.
const FRAME_HEAD_BYTES_MAX: usize = 32;

/// How a node takes part in the network of its cluster. [`Options::new`] gives what has no default.
#[derive(Clone, Debug)]
pub struct Options {
    /// UDP address to bind; port 0 takes any.
    pub listen: SocketAddr,
    pub node: NodeId,
    pub cluster_id: String,
    /// Directory that [`certs::create_node`] filled.
    pub certs: PathBuf,
    /// Where other nodes listen, as `host:port`; the host is resolved at each dial.
    pub peers: BTreeMap<NodeId, String>,
    /// Silence after which a connection of [`Lane::Raft`] counts as lost. A process that dies sends nothing, so this
    /// bounds how soon its death is noticed.
    pub raft_idle_timeout: Duration,
    /// The same for [`Lane::Bulk`].
    pub bulk_idle_timeout: Duration,
    /// Pause between signs of life; well below both timeouts.
    pub keep_alive: Duration,
    /// Longest time for one try to connect, handshakes included.
    pub dial_timeout: Duration,
    /// Pause after the first failed try; it doubles up to `redial_longest`.
    pub redial_first: Duration,
    pub redial_longest: Duration,
    /// Largest frame accepted or sent, in bytes.
    pub frame_bytes_max: usize,
    /// Unacknowledged bytes per connection, and as many waiting to be sent for calls.
    pub window_bytes: u32,
    /// Unread bytes per stream.
    pub stream_window_bytes: u32,
    /// Bytes waiting to be sent per ordered stream.
    pub stream_queue_bytes: usize,
    /// Room asked of the kernel for packets in each direction; it may grant less. Both lanes share it, so bulk
    /// that overflows it would lose heartbeats too.
    pub socket_buffer_bytes: usize,
    /// Streams that a peer may have open on one connection.
    pub streams_max: u32,
    /// Calls of one connection that are served at one time; a single group gets a quarter.
    pub requests_max: usize,
    /// Bytes of calls of one connection that are served at one time.
    pub request_bytes_max: usize,
}

impl Options {
    /// Options with the defaults for a local network.
    #[must_use]
    pub fn new(
        listen: SocketAddr,
        node: NodeId,
        cluster_id: impl Into<String>,
        certs: impl Into<PathBuf>,
        peers: BTreeMap<NodeId, String>,
    ) -> Self {
        Self {
            listen,
            node,
            cluster_id: cluster_id.into(),
            certs: certs.into(),
            peers,
            raft_idle_timeout: Duration::from_millis(1500),
            bulk_idle_timeout: Duration::from_secs(5),
            keep_alive: Duration::from_millis(200),
            dial_timeout: Duration::from_secs(1),
            redial_first: Duration::from_millis(20),
            redial_longest: Duration::from_millis(500),
            frame_bytes_max: 64 << 20,
            window_bytes: 64 << 20,
            stream_window_bytes: 16 << 20,
            stream_queue_bytes: 1 << 20,
            socket_buffer_bytes: 4 << 20,
            streams_max: 4096,
            requests_max: 4096,
            request_bytes_max: 256 << 20,
        }
    }

    fn check(&self) -> Result<(), Error> {
        certs::check_cluster_id(&self.cluster_id)?;
        let idle = self.raft_idle_timeout.min(self.bulk_idle_timeout);
        let checks = [
            (self.node.0 != 0, "node ids start at 1"),
            (
                self.keep_alive * 2 <= idle,
                "keep_alive must be at most half of each idle timeout",
            ),
            (
                (1024..=1 << 30).contains(&self.frame_bytes_max),
                "frame_bytes_max must be 1 KiB to 1 GiB",
            ),
            (
                self.stream_window_bytes <= self.window_bytes && self.window_bytes <= 1 << 30,
                "stream_window_bytes must be at most window_bytes, and that at most 1 GiB",
            ),
            (self.requests_max >= 4, "requests_max must be at least 4"),
            (self.streams_max >= 2, "streams_max must be at least 2"),
        ];
        match checks.iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(Error::Options(what)),
            None => Ok(()),
        }
    }
}

/// Why a node cannot take part in the network. All of these are for an operator to mend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("invalid transport options: {0}")]
    Options(&'static str),
    #[error(transparent)]
    Certs(#[from] certs::Error),
    #[error("the certificate is not one of node {node} of cluster `{cluster_id}`")]
    NotOurs { node: NodeId, cluster_id: String },
    #[error("TLS settings: {0}")]
    Tls(#[from] rustls::Error),
    #[error("QUIC settings: {0}")]
    Quic(String),
    #[error("cannot bind udp {address}")]
    Bind {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
}

impl Error {
    fn quic(err: impl fmt::Display) -> Self {
        Self::Quic(err.to_string())
    }
}

/// One of the two connections to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// What Raft and failure detection wait for.
    Raft,
    /// Catch-up, forwarding, snapshots: what may be large.
    Bulk,
}

/// Who answers: a number that both nodes agree on. 0 is the transport's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service(pub u16);

/// Why a call has no answer, and whether it may have happened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Never sent.
    #[error("node {node} is unreachable: {reason}")]
    Unreachable { node: NodeId, reason: String },
    /// Sent; no answer in time; it may have happened or may still.
    #[error("node {node} did not answer in time")]
    Timeout { node: NodeId },
    /// Sent; the connection ended before the answer; it may have happened.
    #[error("connection to node {node} broke: {reason}")]
    Broken { node: NodeId, reason: String },
    /// The peer had no room or no handler yet; it did not happen and may be repeated.
    #[error("node {node} is busy: {reason}")]
    Busy { node: NodeId, reason: String },
    /// The handler's own error, or a request that breaks the transport's rules.
    #[error("refused: {0}")]
    Refused(String),
}

/// Answers unary calls of one service.
///
/// Each call runs in its own task. The future is dropped when the caller's deadline has passed or the node stops,
/// so whatever must run to its end belongs in a task of the room's own.
pub trait Handler: Send + Sync + 'static {
    /// `Err` reaches the caller as [`CallError::Refused`].
    fn handle(
        &self,
        from: NodeId,
        group: GroupId,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, String>>;
}

impl<F, Fut> Handler for F
where
    F: Fn(NodeId, GroupId, Bytes) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Bytes, String>> + Send + 'static,
{
    fn handle(
        &self,
        from: NodeId,
        group: GroupId,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, String>> {
        Box::pin(self(from, group, body))
    }
}

/// Serves ordered streams of one service. Each stream runs in its own task; it ends when the future does.
pub trait StreamHandler: Send + Sync + 'static {
    fn handle(
        &self,
        from: NodeId,
        group: GroupId,
        tx: FrameTx,
        rx: FrameRx,
    ) -> BoxFuture<'static, ()>;
}

impl<F, Fut> StreamHandler for F
where
    F: Fn(NodeId, GroupId, FrameTx, FrameRx) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    fn handle(
        &self,
        from: NodeId,
        group: GroupId,
        tx: FrameTx,
        rx: FrameRx,
    ) -> BoxFuture<'static, ()> {
        Box::pin(self(from, group, tx, rx))
    }
}

/// A node's place in the network. Clones share it; it ends when its tasks are stopped.
#[derive(Clone)]
pub struct Transport(Arc<Shared>);

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (node, address) = (self.0.options.node, self.0.local_address);
        write!(f, "Transport(node {node} at {address})")
    }
}

/// What all connections of a node share.
struct Shared {
    options: Options,
    endpoint: Endpoint,
    local_address: SocketAddr,
    clients: tls::ClientConfigs,
    tasks: Tasks,
    peers: Mutex<BTreeMap<NodeId, String>>,
    links: Mutex<HashMap<(NodeId, Lane), Arc<Link>>>,
    reachable: watch::Sender<BTreeSet<NodeId>>,
    handlers: RwLock<HashMap<Service, Arc<dyn Handler>>>,
    stream_handlers: RwLock<HashMap<Service, Arc<dyn StreamHandler>>>,
}

impl Transport {
    /// Binds the port and begins to serve. Calls that arrive before their handler is registered are told to repeat.
    ///
    /// # Errors
    /// When the options contradict themselves, the certificates are not this node's, or the port is taken.
    pub fn start(options: Options, tasks: &Tasks) -> Result<Self, Error> {
        options.check()?;
        let identity = certs::load(&options.certs)?;
        let own = identity.chain.first();
        if !own.is_some_and(|cert| tls::is_certificate_of(cert, &options.cluster_id, options.node))
        {
            return Err(Error::NotOurs {
                node: options.node,
                cluster_id: options.cluster_id,
            });
        }
        let bind = |source| Error::Bind {
            address: options.listen,
            source,
        };
        let endpoint = Endpoint::new(
            tls::endpoint_config(&identity),
            Some(tls::server_config(&options, &identity)?),
            bind_udp(&options).map_err(bind)?,
            Arc::new(quinn::TokioRuntime),
        )
        .map_err(bind)?;
        let shared = Arc::new(Shared {
            local_address: endpoint.local_addr().map_err(bind)?,
            clients: tls::client_configs(&options, &identity)?,
            peers: Mutex::new(options.peers.clone()),
            options,
            endpoint,
            tasks: tasks.clone(),
            links: Mutex::default(),
            reachable: watch::Sender::default(),
            handlers: RwLock::default(),
            stream_handlers: RwLock::default(),
        });
        let serving = shared.clone();
        // Without its door a node is dead to the others but might not know it.
        tasks.spawn("transport.accept", OnError::StopNode, |token| {
            server::accept(serving, token)
        });
        Ok(Self(shared))
    }

    /// The address that is bound.
    #[must_use]
    pub fn local_address(&self) -> SocketAddr {
        self.0.local_address
    }

    /// This node.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.0.options.node
    }

    /// Answers calls to `service` with `handler`, instead of an earlier one.
    pub fn register(&self, service: Service, handler: Arc<dyn Handler>) {
        let mut handlers = self
            .0
            .handlers
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        handlers.insert(service, handler);
    }

    /// Serves streams of `service` with `handler`, instead of an earlier one.
    pub fn register_stream(&self, service: Service, handler: Arc<dyn StreamHandler>) {
        let handlers = &self.0.stream_handlers;
        let mut handlers = handlers.write().unwrap_or_else(PoisonError::into_inner);
        handlers.insert(service, handler);
    }

    /// Says where `node` listens (`host:port`), or that it is gone. Connections to a former address are closed.
    pub fn set_peer(&self, node: NodeId, address: Option<String>) {
        // Held to the end, so that no link to the former address is started meanwhile.
        let mut peers = lock(&self.0.peers);
        let before = match &address {
            Some(address) => peers.insert(node, address.clone()),
            None => peers.remove(&node),
        };
        if before == address {
            return;
        }
        let mut links = lock(&self.0.links);
        for lane in [Lane::Raft, Lane::Bulk] {
            if let Some(link) = links.remove(&(node, lane)) {
                link.close();
            }
        }
    }

    /// Begins to connect to `node`; otherwise the first call does.
    ///
    /// # Errors
    /// When `node` is this node or its address is not known.
    pub fn connect(&self, node: NodeId) -> Result<(), CallError> {
        self.link(node, Lane::Raft)?;
        self.link(node, Lane::Bulk).map(drop)
    }

    /// Whether the raft lane to `node` is up, as far as is known now.
    #[must_use]
    pub fn connected(&self, node: NodeId) -> bool {
        self.0.reachable.borrow().contains(&node)
    }

    /// Follows the set of nodes whose raft lane is up.
    #[must_use]
    pub fn reachable(&self) -> watch::Receiver<BTreeSet<NodeId>> {
        self.0.reachable.subscribe()
    }

    /// Asks `service` on node `to` and waits for the answer at most `deadline`, which the peer is told. The first call to
    /// a node waits for the connection; later ones fail at once while it is down.
    ///
    /// # Errors
    /// See [`CallError`]; it tells whether the call may have happened. A call to this node itself is `Unreachable`.
    pub async fn call(
        &self,
        to: NodeId,
        lane: Lane,
        service: Service,
        group: GroupId,
        body: Body,
        deadline: Duration,
    ) -> Result<Bytes, CallError> {
        self.check_size(body.len())?;
        let until = Instant::now() + deadline;
        let link = self.link(to, lane)?;
        let live = link.ready(until).await?;
        live.call(service, group, body, until).await
    }

    /// Opens an ordered stream to `service` on node `to`, and waits until the peer has accepted it.
    ///
    /// # Errors
    /// `Unreachable` without a connection, `Busy` when the peer has no handler yet, `Broken` when the connection
    /// ends meanwhile, `Timeout` when nothing is heard for `dial_timeout`.
    pub async fn open(
        &self,
        to: NodeId,
        lane: Lane,
        service: Service,
        group: GroupId,
    ) -> Result<(FrameTx, FrameRx), CallError> {
        let until = Instant::now() + self.0.options.dial_timeout;
        let link = self.link(to, lane)?;
        let live = link.ready(until).await?;
        tokio::time::timeout_at(until, live.open(&self.0, service, group))
            .await
            .unwrap_or(Err(CallError::Timeout { node: to }))
    }

    fn check_size(&self, bytes: usize) -> Result<(), CallError> {
        let max = self.0.body_bytes_max();
        if bytes <= max {
            return Ok(());
        }
        Err(CallError::Refused(format!(
            "a body of {bytes} bytes is larger than {max}"
        )))
    }

    /// The link to `node`, started on first use.
    fn link(&self, node: NodeId, lane: Lane) -> Result<Arc<Link>, CallError> {
        let unreachable = |reason: &str| CallError::Unreachable {
            node,
            reason: reason.to_owned(),
        };
        if node == self.0.options.node {
            return Err(unreachable("it is this node itself"));
        }
        let peers = lock(&self.0.peers);
        let address = peers
            .get(&node)
            .ok_or_else(|| unreachable("its address is not known"))?;
        let mut links = lock(&self.0.links);
        let link = links.entry((node, lane)).or_insert_with(|| {
            let link = Arc::new(Link::new(node, lane, address.clone()));
            let (shared, running) = (self.0.clone(), link.clone());
            let task = |token| running.run(shared, token);
            self.0.tasks.spawn("transport.link", OnError::Log, task);
            link
        });
        Ok(link.clone())
    }
}

impl Shared {
    fn body_bytes_max(&self) -> usize {
        self.options.frame_bytes_max - FRAME_HEAD_BYTES_MAX
    }

    /// What this node says first on a stream.
    fn hello(&self, service: Service, group: GroupId) -> peer::Hello {
        peer::Hello {
            version: peer::VERSION,
            cluster_id: self.options.cluster_id.clone(),
            node: self.options.node.0,
            service: u32::from(service.0),
            group: group.0,
        }
    }

    /// What is wrong with a peer that says `hello`, if anything.
    fn objection(&self, hello: &peer::Hello) -> Option<String> {
        let ours = &self.options.cluster_id;
        if hello.version != peer::VERSION {
            let (theirs, own) = (hello.version, peer::VERSION);
            return Some(format!(
                "protocol version {theirs} is not spoken here, only {own}"
            ));
        }
        (hello.cluster_id != *ours)
            .then(|| format!("this is cluster `{ours}`, not `{}`", hello.cluster_id))
    }
}

fn bind_udp(options: &Options) -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::bind(options.listen)?;
    let buffers = socket2::SockRef::from(&socket);
    // Less room costs throughput under load, not correctness.
    let asked = options.socket_buffer_bytes;
    for granted in [
        buffers.set_recv_buffer_size(asked),
        buffers.set_send_buffer_size(asked),
    ] {
        if let Err(err) = granted {
            debug!(%err, asked, "the kernel grants no larger socket buffer");
        }
    }
    Ok(socket)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
