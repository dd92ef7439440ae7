//! The dialing side: one lane to one peer, kept alive, with the calls that wait for answers on it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes};
use prost::Message as _;
use quinn::Connection;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::stdx::Backoff;
use crate::tasks::OnError;
use crate::transport::body::Body;
use crate::transport::frame::{self, Frame, FrameReader, Head, Kind, Outbox};
use crate::transport::server::{CLOSE_BROKEN, CLOSE_REFUSED, CLOSE_STOP};
use crate::transport::stream::{FrameRx, FrameTx};
use crate::transport::{CallError, Lane, Service, Shared, certs, lock};
use crate::types::{GroupId, NodeId};
use crate::wire::peer;

/// The transport's own service: the stream that all calls of a connection share.
pub(super) const CALLS: Service = Service(0);

/// One lane to one peer, whether up or down.
#[derive(Debug)]
pub(super) struct Link {
    node: NodeId,
    lane: Lane,
    address: String,
    state: watch::Sender<State>,
    closing: CancellationToken,
}

#[derive(Clone, Debug)]
enum State {
    /// The first dial is under way: callers wait for it.
    Fresh,
    Up(Arc<Live>),
    /// Dialing again in the background: callers are told why at once.
    Down(String),
}

impl Link {
    pub(super) fn new(node: NodeId, lane: Lane, address: String) -> Self {
        Self {
            node,
            lane,
            address,
            state: watch::Sender::new(State::Fresh),
            closing: CancellationToken::new(),
        }
    }

    /// Ends the link for good: the peer has moved or is gone.
    pub(super) fn close(&self) {
        self.closing.cancel();
    }

    /// The connection; waits only for the first dial.
    pub(super) async fn ready(&self, until: Instant) -> Result<Arc<Live>, CallError> {
        let unreachable = |reason: &str| CallError::Unreachable {
            node: self.node,
            reason: reason.to_owned(),
        };
        let mut state = self.state.subscribe();
        let dialed = state.wait_for(|state| !matches!(state, State::Fresh));
        let dialed = timeout_at(until, dialed).await;
        let dialed = dialed.map_err(|_| unreachable("not connected within the deadline"))?;
        match &*dialed.map_err(|_| unreachable("the transport has stopped"))? {
            State::Up(live) => Ok(live.clone()),
            State::Down(reason) => Err(unreachable(reason)),
            State::Fresh => Err(unreachable("not connected yet")),
        }
    }

    /// Dials, serves and dials again until the node stops or the link is closed.
    pub(super) async fn run(
        self: Arc<Self>,
        shared: Arc<Shared>,
        token: CancellationToken,
    ) -> anyhow::Result<()> {
        let stopped = async {
            tokio::select! {
                () = token.cancelled() => {}
                () = self.closing.cancelled() => {}
            }
        };
        tokio::select! {
            () = self.keep(&shared) => {}
            () = stopped => {}
        }
        let state = self
            .state
            .send_replace(State::Down("the link is closed".to_owned()));
        if let State::Up(live) = state {
            live.end("the link is closed", CLOSE_STOP);
        }
        self.set_reachable(&shared, false);
        Ok(())
    }

    async fn keep(&self, shared: &Arc<Shared>) {
        let options = &shared.options;
        let mut backoff = Backoff::new(options.redial_first, options.redial_longest);
        let mut told = String::new();
        loop {
            let until = Instant::now() + options.dial_timeout;
            let dialed = timeout_at(until, self.dial(shared)).await;
            let reason = match dialed.unwrap_or_else(|_| Err("no answer to the dial".to_owned())) {
                Ok((live, reader)) => {
                    let up = Instant::now();
                    let reason = self.serve(shared, &live, reader).await;
                    // A connection that ends as soon as it begins must not be dialed in a tight loop.
                    if up.elapsed() >= options.dial_timeout {
                        backoff.reset();
                    }
                    told.clear();
                    reason
                }
                Err(reason) => reason,
            };
            self.state.send_replace(State::Down(reason.clone()));
            if told != reason {
                warn!(peer = %self.node, lane = ?self.lane, address = self.address, reason, "not connected");
                told = reason;
            }
            tokio::time::sleep(backoff.pause()).await;
        }
    }

    /// Reads answers until the connection ends; returns why it did.
    async fn serve(&self, shared: &Shared, live: &Arc<Live>, reader: FrameReader) -> String {
        info!(peer = %self.node, lane = ?self.lane, address = self.address, "connected");
        self.state.send_replace(State::Up(live.clone()));
        self.set_reachable(shared, true);
        let reason = live.read_answers(reader).await;
        live.end(&reason, CLOSE_BROKEN);
        self.set_reachable(shared, false);
        reason
    }

    fn set_reachable(&self, shared: &Shared, up: bool) {
        if self.lane != Lane::Raft {
            return;
        }
        let links = lock(&shared.links);
        let current = links.get(&(self.node, self.lane));
        if !current.is_none_or(|link| std::ptr::eq(&**link, self)) {
            // This link was replaced, and its successor knows better.
            return;
        }
        shared
            .reachable
            .send_if_modified(|nodes: &mut BTreeSet<NodeId>| {
                if up {
                    nodes.insert(self.node)
                } else {
                    nodes.remove(&self.node)
                }
            });
    }

    async fn dial(&self, shared: &Arc<Shared>) -> Result<(Arc<Live>, FrameReader), String> {
        let found = tokio::net::lookup_host(&self.address).await;
        let found = found.map_err(|err| format!("cannot resolve {}: {err}", self.address))?;
        let mut reason = format!("{} has no address this node can dial", self.address);
        // A socket of the older family cannot send to the newer; the other way works.
        for address in found.filter(|a| a.is_ipv4() || shared.local_address.is_ipv6()) {
            let name = certs::node_name(&shared.options.cluster_id, self.node);
            let config = shared.clients.lane(self.lane);
            let connection = match shared.endpoint.connect_with(config, address, &name) {
                Ok(connecting) => connecting.await.map_err(|err| frame::lost_reason(&err)),
                Err(err) => Err(err.to_string()),
            };
            match connection {
                Ok(connection) => return self.greet(shared, connection).await,
                Err(why) => reason = why,
            }
        }
        Err(reason)
    }

    /// Opens the stream for calls; each side says who it is.
    async fn greet(
        &self,
        shared: &Arc<Shared>,
        connection: Connection,
    ) -> Result<(Arc<Live>, FrameReader), String> {
        let lost = |err: &quinn::ConnectionError| frame::lost_reason(err);
        let (mut send, recv) = connection.open_bi().await.map_err(|err| lost(&err))?;
        let hello = shared.hello(CALLS, GroupId::CONTROL).encode_to_vec();
        let mut reader = FrameRx::reader_of(shared, recv);
        frame::write_one(&mut send, Kind::Hello, &hello).await?;
        let answer = reader.next().await.map_err(|err| err.to_string())?;
        if let Err(reason) = check_answer(shared, self.node, answer) {
            connection.close(CLOSE_REFUSED.into(), reason.as_bytes());
            return Err(reason);
        }
        let (calls, queue) = Outbox::new(shared.options.window_bytes as usize);
        shared
            .tasks
            .spawn("transport.calls", OnError::Log, |token| async move {
                frame::write_frames(send, queue, token).await;
                Ok(())
            });
        let live = Arc::new(Live {
            node: self.node,
            connection,
            calls,
            waiting: Mutex::new(Some(HashMap::new())),
            next_seq: AtomicU64::new(0),
        });
        Ok((live, reader))
    }
}

fn check_answer(shared: &Shared, node: NodeId, answer: Option<Frame>) -> Result<(), String> {
    let answer = answer.ok_or("the peer ended the handshake")?;
    if answer.kind != Kind::Hello {
        return Err("the peer did not say hello".to_owned());
    }
    let hello =
        peer::Hello::decode(answer.rest).map_err(|_| "the peer's hello cannot be decoded")?;
    if let Some(objection) = shared.objection(&hello) {
        return Err(objection);
    }
    if hello.node != node.0 {
        return Err(format!("node {} answered", hello.node));
    }
    Ok(())
}

type Answer = Result<Bytes, CallError>;

/// A connection that is up, and the calls on it.
#[derive(Debug)]
pub(super) struct Live {
    node: NodeId,
    connection: Connection,
    calls: Outbox,
    /// Calls without answer by sequence number; `None` once the connection has ended.
    waiting: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
    next_seq: AtomicU64,
}

/// Forgets a call whose caller no longer waits.
struct Waiting<'a> {
    live: &'a Live,
    seq: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = &mut *lock(&self.live.waiting) {
            waiting.remove(&self.seq);
        }
    }
}

impl Live {
    pub(super) async fn call(
        &self,
        service: Service,
        group: GroupId,
        body: Body,
        until: Instant,
    ) -> Answer {
        let node = self.node;
        let unreachable = |reason: &str| CallError::Unreachable {
            node,
            reason: reason.to_owned(),
        };
        let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
        let (answer_tx, answer_rx) = oneshot::channel();
        match &mut *lock(&self.waiting) {
            Some(waiting) => waiting.insert(seq, answer_tx),
            None => return Err(unreachable("the connection has just ended")),
        };
        let _waiting = Waiting { live: self, seq };
        let left = until.saturating_duration_since(Instant::now()).as_millis();
        let head = Head::default()
            .with(&seq.to_le_bytes())
            .with(&service.0.to_le_bytes())
            .with(&group.0.to_le_bytes())
            .with(&u32::try_from(left).unwrap_or(u32::MAX).to_le_bytes());
        let queued = timeout_at(until, self.calls.send(Kind::Request, head, body)).await;
        match queued {
            Err(_) => return Err(unreachable("the send queue was full until the deadline")),
            Ok(Err(_)) => return Err(unreachable("the connection has just ended")),
            Ok(Ok(())) => {}
        }
        match timeout_at(until, answer_rx).await {
            Err(_) => Err(CallError::Timeout { node }),
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(CallError::Broken {
                node,
                reason: "the connection ended".to_owned(),
            }),
        }
    }

    /// Opens an ordered stream and waits for the peer's consent.
    pub(super) async fn open(
        &self,
        shared: &Arc<Shared>,
        service: Service,
        group: GroupId,
    ) -> Result<(FrameTx, FrameRx), CallError> {
        let node = self.node;
        let broken = |reason: String| CallError::Broken { node, reason };
        let opened = self.connection.open_bi().await;
        let (mut send, recv) = opened.map_err(|err| CallError::Unreachable {
            node,
            reason: frame::lost_reason(&err),
        })?;
        let hello = shared.hello(service, group).encode_to_vec();
        frame::write_one(&mut send, Kind::Hello, &hello)
            .await
            .map_err(broken)?;
        let mut reader = FrameRx::reader_of(shared, recv);
        match reader.next().await.map_err(|err| broken(err.to_string()))? {
            Some(frame) if frame.kind == Kind::Hello => {}
            Some(frame) if frame.kind == Kind::Refused => {
                let reason = String::from_utf8_lossy(&frame.rest).into_owned();
                return Err(CallError::Busy { node, reason });
            }
            _ => return Err(broken("the peer did not say hello".to_owned())),
        }
        Ok((FrameTx::start(shared, send), FrameRx::new(reader)))
    }

    /// Gives each answer to its caller until the connection ends; returns why it did.
    async fn read_answers(&self, mut reader: FrameReader) -> String {
        loop {
            let frame = tokio::select! {
                frame = reader.next() => frame,
                () = self.calls.closed() => return match self.connection.close_reason() {
                    Some(lost) => frame::lost_reason(&lost),
                    None => "the peer no longer reads calls".to_owned(),
                },
            };
            let answered = match frame {
                Ok(Some(frame)) => self.on_answer(frame),
                Ok(None) => Err("the peer ended the stream for calls".to_owned()),
                Err(err) => Err(err.to_string()),
            };
            if let Err(reason) = answered {
                return reason;
            }
        }
    }

    fn on_answer(&self, mut frame: Frame) -> Result<(), String> {
        let seq = (frame.rest.try_get_u64_le()).map_err(|_| "an answer without a number")?;
        let node = self.node;
        let text = |rest: &Bytes| String::from_utf8_lossy(rest).into_owned();
        let answer = match frame.kind {
            Kind::Response => Ok(frame.rest),
            Kind::Failed => Err(CallError::Refused(text(&frame.rest))),
            Kind::Busy => Err(CallError::Busy {
                node,
                reason: text(&frame.rest),
            }),
            _ => return Err("an answer of unknown kind".to_owned()),
        };
        let waiting = lock(&self.waiting).as_mut().and_then(|w| w.remove(&seq));
        match waiting {
            // The caller may have left at this moment.
            Some(answer_tx) => drop(answer_tx.send(answer)),
            None => debug!(peer = %node, seq, "an answer came too late"),
        }
        Ok(())
    }

    /// Closes the connection and fails what waits on it.
    fn end(&self, reason: &str, code: u32) {
        self.connection.close(code.into(), reason.as_bytes());
        let waiting = lock(&self.waiting).take();
        for answer_tx in waiting.into_iter().flat_map(HashMap::into_values) {
            let broken = CallError::Broken {
                node: self.node,
                reason: reason.to_owned(),
            };
            // The caller may have left at this moment.
            let _ = answer_tx.send(Err(broken));
        }
    }
}
