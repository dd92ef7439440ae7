//! The accepting side: who gets in, and what is done for them.
//!
//! Nothing here waits for a handler: each call and stream has its own task, and what is beyond a connection's
//! share is refused, so a group that is stuck never delays the heartbeats of the others.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes};
use prost::Message as _;
use quinn::{Connection, Incoming, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::stdx::{ByteBudget, ByteGrant};
use crate::tasks::OnError;
use crate::transport::frame::{self, Frame, FrameReader, Head, Kind, Outbox};
use crate::transport::link::CALLS;
use crate::transport::stream::{FrameRx, FrameTx};
use crate::transport::{Service, Shared, lock, tls};
use crate::types::{GroupId, NodeId};
use crate::wire::peer;

/// Codes in QUIC's CONNECTION_CLOSE; the reason is text.
pub(super) const CLOSE_STOP: u32 = 0;
pub(super) const CLOSE_REFUSED: u32 = 1;
pub(super) const CLOSE_BROKEN: u32 = 2;

/// Connections beyond this are turned away before any cryptography.
const CONNECTIONS_MAX: usize = 4096;
/// A peer that connects has this long to say who it is; the same for each stream.
const GREETING: Duration = Duration::from_secs(5);
/// How long a stop waits until peers were told.
const FAREWELL: Duration = Duration::from_millis(500);
/// The same refusal of the same host is logged again after this.
const REFUSAL_LOG_PAUSE: Duration = Duration::from_mins(1);
/// Refusals remembered for that.
const REFUSALS_MAX: usize = 256;

/// Takes connections until the node stops.
pub(super) async fn accept(shared: Arc<Shared>, token: CancellationToken) -> anyhow::Result<()> {
    let refusals = Arc::new(Refusals::default());
    loop {
        let incoming = tokio::select! {
            incoming = shared.endpoint.accept() => incoming,
            () = token.cancelled() => break,
        };
        let Some(incoming) = incoming else {
            anyhow::bail!("the QUIC endpoint has ended");
        };
        if shared.endpoint.open_connections() >= CONNECTIONS_MAX {
            incoming.refuse();
            continue;
        }
        let (shared_, refusals) = (shared.clone(), refusals.clone());
        shared
            .tasks
            .spawn("transport.connection", OnError::Log, |token| async move {
                let remote = incoming.remote_address().ip();
                tokio::select! {
                    served = serve(&shared_, incoming) => if let Err(reason) = served {
                        refusals.log(remote, reason);
                    },
                    () = token.cancelled() => {}
                }
                Ok(())
            });
    }
    shared.endpoint.close(CLOSE_STOP.into(), b"the node stops");
    // Peers that do not hear it notice by silence.
    let _ = timeout(FAREWELL, shared.endpoint.wait_idle()).await;
    Ok(())
}

/// Serves one connection to its end; an error says why it was never admitted.
async fn serve(shared: &Arc<Shared>, incoming: Incoming) -> Result<(), String> {
    let greeted = timeout(GREETING, async {
        let connection = incoming.await.map_err(|err| frame::lost_reason(&err))?;
        match admit(shared, &connection).await {
            Ok((from, send, reader)) => Ok((connection, from, send, reader)),
            Err(reason) => {
                connection.close(CLOSE_REFUSED.into(), reason.as_bytes());
                Err(reason)
            }
        }
    });
    let greeted = greeted.await.map_err(|_| "no hello in time".to_owned())?;
    let (connection, from, send, reader) = greeted?;
    debug!(peer = %from, remote = %connection.remote_address(), "accepted");
    let calls = Calls {
        shared: shared.clone(),
        from,
        admission: Arc::new(Admission::new(shared)),
    };
    let (answers, queue) = Outbox::new(shared.options.window_bytes as usize);
    shared
        .tasks
        .spawn("transport.answers", OnError::Log, |token| async move {
            frame::write_frames(send, queue, token).await;
            Ok(())
        });
    let ended = tokio::select! {
        reason = calls.serve(reader, answers) => reason,
        reason = accept_streams(shared, &connection, from) => reason,
    };
    connection.close(CLOSE_BROKEN.into(), ended.as_bytes());
    debug!(peer = %from, reason = ended, "connection ended");
    Ok(())
}

/// Checks who is on the other side of a new connection; its first stream is the one for calls.
async fn admit(
    shared: &Shared,
    connection: &Connection,
) -> Result<(NodeId, SendStream, FrameReader), String> {
    let opened = connection.accept_bi().await;
    let (mut send, recv) = opened.map_err(|err| frame::lost_reason(&err))?;
    let mut reader = FrameRx::reader_of(shared, recv);
    let hello = read_hello(shared, &mut reader).await?;
    let node = NodeId(hello.node);
    if node == shared.options.node {
        return Err(format!("node {node} is this node itself"));
    }
    let certificates = (connection.peer_identity())
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
    let certificate = certificates.as_ref().and_then(|chain| chain.first());
    let cluster_id = &shared.options.cluster_id;
    if !certificate.is_some_and(|cert| tls::is_certificate_of(cert, cluster_id, node)) {
        return Err(format!(
            "the certificate is not one of node {node} of cluster `{cluster_id}`"
        ));
    }
    if hello.service != u32::from(CALLS.0) {
        return Err("the first stream is not the one for calls".to_owned());
    }
    let answer = shared.hello(CALLS, GroupId::CONTROL).encode_to_vec();
    frame::write_one(&mut send, Kind::Hello, &answer).await?;
    Ok((node, send, reader))
}

async fn read_hello(shared: &Shared, reader: &mut FrameReader) -> Result<peer::Hello, String> {
    let first = reader.next().await.map_err(|err| err.to_string())?;
    let first = first
        .filter(|frame| frame.kind == Kind::Hello)
        .ok_or("no hello")?;
    let hello = peer::Hello::decode(first.rest).map_err(|_| "the hello cannot be decoded")?;
    match shared.objection(&hello) {
        Some(objection) => Err(objection),
        None => Ok(hello),
    }
}

async fn accept_streams(shared: &Arc<Shared>, connection: &Connection, from: NodeId) -> String {
    loop {
        let (send, recv) = match connection.accept_bi().await {
            Ok(stream) => stream,
            Err(lost) => return frame::lost_reason(&lost),
        };
        let shared_ = shared.clone();
        shared.tasks.spawn("transport.stream", OnError::Log, |token| async move {
            tokio::select! {
                served = serve_stream(&shared_, from, send, recv) => if let Err(reason) = served {
                    debug!(peer = %from, reason, "stream refused");
                },
                () = token.cancelled() => {}
            }
            Ok(())
        });
    }
}

/// Serves one ordered stream to its end.
async fn serve_stream(
    shared: &Arc<Shared>,
    from: NodeId,
    mut send: SendStream,
    recv: RecvStream,
) -> Result<(), String> {
    let mut reader = FrameRx::reader_of(shared, recv);
    let greeted = timeout(GREETING, read_hello(shared, &mut reader)).await;
    let mut refusal = None;
    let mut handler = None;
    match greeted.map_err(|_| "no hello in time".to_owned())? {
        Err(reason) => refusal = Some(reason),
        Ok(hello) if hello.node != from.0 => {
            refusal = Some(format!("node {from} says it is node {}", hello.node));
        }
        Ok(hello) => {
            let service = u16::try_from(hello.service).map(Service);
            let handlers = shared
                .stream_handlers
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            handler = service
                .ok()
                .and_then(|s| handlers.get(&s).cloned())
                .map(|h| (h, hello.group));
            if handler.is_none() {
                refusal = Some(format!("service {} takes no streams here", hello.service));
            }
        }
    }
    let Some((handler, group)) = handler else {
        let reason = refusal.unwrap_or_default();
        frame::write_one(&mut send, Kind::Refused, reason.as_bytes()).await?;
        return Err(reason);
    };
    let answer = shared.hello(CALLS, GroupId(group)).encode_to_vec();
    frame::write_one(&mut send, Kind::Hello, &answer).await?;
    let tx = FrameTx::start(shared, send);
    handler
        .handle(from, GroupId(group), tx, FrameRx::new(reader))
        .await;
    Ok(())
}

/// The calls of one connection.
struct Calls {
    shared: Arc<Shared>,
    from: NodeId,
    admission: Arc<Admission>,
}

/// A call as it was read.
struct Request {
    seq: u64,
    service: Service,
    group: GroupId,
    deadline: Duration,
    body: Bytes,
}

impl Calls {
    /// Starts each call as it arrives; returns why there are no more.
    async fn serve(&self, mut reader: FrameReader, answers: Outbox) -> String {
        loop {
            let request = match reader.next().await {
                Ok(Some(frame)) => parse_request(frame),
                Ok(None) => return "the peer ended the stream for calls".to_owned(),
                Err(err) => return err.to_string(),
            };
            let Some(request) = request else {
                return "a frame that is no request".to_owned();
            };
            let seq = Head::default().with(&request.seq.to_le_bytes());
            if let Err(why) = self.start(request, &answers)
                && answers
                    .send(Kind::Busy, seq, Bytes::from(why))
                    .await
                    .is_err()
            {
                return "the peer no longer reads answers".to_owned();
            }
        }
    }

    fn start(&self, request: Request, answers: &Outbox) -> Result<(), &'static str> {
        let handler = {
            let handlers = self
                .shared
                .handlers
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            handlers.get(&request.service).cloned()
        };
        let handler = handler.ok_or("the service has no handler here")?;
        let admitted = self.admission.admit(request.group, request.body.len())?;
        let (from, answers) = (self.from, answers.clone());
        let body_bytes_max = self.shared.body_bytes_max();
        self.shared
            .tasks
            .spawn("transport.request", OnError::Log, |token| async move {
                let seq = Head::default().with(&request.seq.to_le_bytes());
                let handled = timeout(
                    request.deadline,
                    handler.handle(from, request.group, request.body),
                );
                let handled = tokio::select! {
                    handled = handled => handled,
                    () = answers.closed() => return Ok(()),
                    () = token.cancelled() => return Ok(()),
                };
                let (kind, body) = match handled {
                    Ok(Ok(body)) if body.len() <= body_bytes_max => (Kind::Response, body),
                    Ok(Ok(_)) => (
                        Kind::Failed,
                        Bytes::from_static(b"the answer is larger than a frame may be"),
                    ),
                    Ok(Err(reason)) => (Kind::Failed, reason.into()),
                    // The caller has stopped waiting.
                    Err(_) => return Ok(()),
                };
                // Fails when the connection has ended: then the caller knows.
                let _ = answers.send(kind, seq, body).await;
                drop(admitted);
                Ok(())
            });
        Ok(())
    }
}

fn parse_request(mut frame: Frame) -> Option<Request> {
    if frame.kind != Kind::Request {
        return None;
    }
    let rest = &mut frame.rest;
    Some(Request {
        seq: rest.try_get_u64_le().ok()?,
        service: Service(rest.try_get_u16_le().ok()?),
        group: GroupId(rest.try_get_u32_le().ok()?),
        deadline: Duration::from_millis(rest.try_get_u32_le().ok()?.into()),
        body: frame.rest,
    })
}

/// Bounds what one connection may have under way.
struct Admission {
    requests_max: usize,
    requests: AtomicUsize,
    groups: Mutex<HashMap<GroupId, usize>>,
    bytes: ByteBudget,
}

/// A place for one call; given back when dropped.
struct Admitted {
    admission: Arc<Admission>,
    group: GroupId,
    _bytes: ByteGrant,
}

impl Admission {
    fn new(shared: &Shared) -> Self {
        Self {
            requests_max: shared.options.requests_max,
            requests: AtomicUsize::new(0),
            groups: Mutex::default(),
            bytes: ByteBudget::new(shared.options.request_bytes_max),
        }
    }

    /// One group may take a quarter of the places, so that a stuck one leaves room for the others.
    fn admit(self: &Arc<Self>, group: GroupId, bytes: usize) -> Result<Admitted, &'static str> {
        let bytes = (self.bytes.try_take(bytes)).ok_or("too many bytes of calls are under way")?;
        let mut groups = lock(&self.groups);
        if self.requests.load(Ordering::Acquire) >= self.requests_max {
            return Err("too many calls are under way");
        }
        let of_group = groups.entry(group).or_default();
        if *of_group >= self.requests_max / 4 {
            return Err("too many calls of the group are under way");
        }
        *of_group += 1;
        // Raised only under the lock, so the check above holds.
        self.requests.fetch_add(1, Ordering::AcqRel);
        drop(groups);
        Ok(Admitted {
            admission: self.clone(),
            group,
            _bytes: bytes,
        })
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let mut groups = lock(&self.admission.groups);
        if let Some(count) = groups.get_mut(&self.group) {
            *count -= 1;
            if *count == 0 {
                groups.remove(&self.group);
            }
        }
        self.admission.requests.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Logs each refusal once in a while: a misconfigured node dials several times a second.
#[derive(Default)]
struct Refusals(Mutex<HashMap<(IpAddr, String), Instant>>);

impl Refusals {
    fn log(&self, remote: IpAddr, reason: String) {
        let mut refusals = lock(&self.0);
        let now = Instant::now();
        refusals.retain(|_, logged| now.duration_since(*logged) < REFUSAL_LOG_PAUSE);
        if refusals.len() >= REFUSALS_MAX || refusals.contains_key(&(remote, reason.clone())) {
            return;
        }
        warn!(%remote, reason, "connection refused");
        refusals.insert((remote, reason), now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stuck_group_leaves_room_for_others() {
        let admission = Arc::new(Admission {
            requests_max: 8,
            requests: AtomicUsize::new(0),
            groups: Mutex::default(),
            bytes: ByteBudget::new(100),
        });
        let stuck: Vec<_> = (0..2)
            .map(|_| admission.admit(GroupId(1), 10).unwrap())
            .collect();
        assert!(
            admission.admit(GroupId(1), 10).is_err(),
            "its quarter is used"
        );
        let other = admission.admit(GroupId(2), 70).unwrap();
        assert!(admission.admit(GroupId(3), 20).is_err(), "no bytes left");
        drop(stuck);
        assert!(admission.admit(GroupId(1), 20).is_ok());
        drop(other);
        assert_eq!(admission.requests.load(Ordering::Acquire), 0);
        assert_eq!(admission.bytes.held(), 0);
        assert!(lock(&admission.groups).is_empty());
    }
}
