//! One WebSocket: reads frames, drives the session, carries out its effects, sends what its followers find.
//!
//! One task, no queue: what a slow reader has not taken stays in the log, and its cursor says where.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt as _;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_util::sync::CancellationToken;

use crate::auth::Presented;
use crate::broker::{self, Follower, Publish, PublishError, Waker};
use crate::gateway::live::Seat;
use crate::gateway::rest::{Pairs, find, pairs};
use crate::gateway::{Door, Permit, answer};
use crate::session::{
    AttachOutcome, ConnectParams, Continuity, Effect, Opening, Session, Ticket, refusal,
};
use crate::tasks::OnError;
use crate::types::{ChannelKey, ChannelName, ErrorCode, ErrorInfo, Serial};
use crate::wire::ably::{self, Format, Frame};
use crate::wire::body::encode_body;

/// Read buffer of a connection: the library's default is a thousand times what an idle client needs.
const READ_BUFFER: usize = 1024;
/// Frames are gathered up to this size before they are written.
const WRITE_BUFFER: usize = 16 * 1024;
/// Records a follower hands out before another gets its turn.
const POLL_RECORDS: usize = 64;
/// A client that takes nothing for so long is gone.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// How long a closing client may take to answer.
const FAREWELL: Duration = Duration::from_secs(2);

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// The socket is gone or takes nothing any more.
struct Gone;

pub(super) fn is_upgrade(headers: &HeaderMap) -> bool {
    let upgrade = headers
        .get(header::UPGRADE)
        .and_then(|value| value.to_str().ok());
    upgrade.is_some_and(|value| value.eq_ignore_ascii_case("websocket"))
}

/// Accepts the upgrade. Credentials are judged after it, in-band: a browser cannot read the answer to a failed one.
pub(super) fn accept(door: Door, mut request: Request) -> Response<Body> {
    let key = request.headers().get(header::SEC_WEBSOCKET_KEY).cloned();
    let version = request
        .headers()
        .get(header::SEC_WEBSOCKET_VERSION)
        .cloned();
    let (Some(key), Some(b"13")) = (key, version.as_ref().map(HeaderValue::as_bytes)) else {
        let what = "not a WebSocket handshake of version 13";
        return answer::failure(Format::Json, &ErrorInfo::new(ErrorCode::BadRequest, what));
    };
    let query = pairs(request.uri().query());
    let authorization = request.headers().get(header::AUTHORIZATION);
    let authorization = authorization
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    let upgrade = hyper::upgrade::on(&mut request);
    let permit = request.extensions().get::<Permit>().cloned();
    let tasks = door.tasks.clone();
    tasks.spawn("gateway.ws", OnError::Log, |token| async move {
        // A client that changed its mind.
        let Ok(upgraded) = upgrade.await else {
            return Ok(());
        };
        Box::pin(converse(door, upgraded, query, authorization, token)).await;
        drop(permit);
        Ok(())
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    if let Ok(accept) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    response
}

async fn converse(
    door: Door,
    upgraded: Upgraded,
    query: Pairs,
    authorization: Option<String>,
    token: CancellationToken,
) {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_write_buffer_size(WRITE_BUFFER + 4 * door.limits.max_frame_bytes)
        .max_message_size(Some(door.limits.max_frame_bytes))
        .max_frame_size(Some(door.limits.max_frame_bytes));
    let io = TokioIo::new(upgraded);
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
    let borrowed = query
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    let params = ConnectParams::from_query(borrowed);
    let format = params.as_ref().map_or(Format::Json, |params| params.format);
    let mut wire = Wire { socket, format };
    let opened = params.and_then(|params| open(&door, params, &query, authorization.as_deref()));
    let opening = match opened {
        Ok(opening) => opening,
        Err(err) => {
            let _ = wire.send(&refusal(&err)).await;
            wire.close(1000).await;
            return;
        }
    };
    let seat = door.live.take(&opening.connection_id);
    let connection = Connection {
        app: opening.identity.app.clone(),
        session: Session::new(opening, now_ms()),
        wire,
        door,
        waker: Arc::default(),
        attachments: HashMap::new(),
        slots: HashMap::new(),
        next_slot: 0,
        publishes: FuturesUnordered::new(),
        unfinished: BTreeSet::new(),
    };
    connection.run(seat, token).await;
}

/// Who connects, and as which connection.
fn open(
    door: &Door,
    params: ConnectParams,
    query: &Pairs,
    authorization: Option<&str>,
) -> Result<Opening, ErrorInfo> {
    let token = find(query, &["accessToken", "access_token"]);
    let presented = Presented::from_request(authorization, find(query, &["key"]), token)?;
    let wanted = params.client_id.as_deref();
    let identity = door.keys.authenticate(&presented, wanted)?;
    let keys = door.keys.connections()?;
    let resumed = params
        .resume_key()
        .map(|wanted| keys.verify(&identity.app, wanted));
    let (connection_id, resume_failed) = match resumed {
        None => (super::random_id(), None),
        Some(Ok(connection_id)) => (connection_id, None),
        Some(Err(err)) => {
            let info = ErrorInfo::new(ErrorCode::ResumeImpossible, err.to_string());
            (super::random_id(), Some(info))
        }
    };
    Ok(Opening {
        connection_key: keys.mint(&identity.app, &connection_id),
        params,
        identity,
        limits: door.limits.clone(),
        connection_id,
        resume_failed,
        node: door.broker.node(),
    })
}

/// The socket and its format.
struct Wire {
    socket: Socket,
    format: Format,
}

impl Wire {
    async fn send(&mut self, frame: &Frame) -> Result<(), Gone> {
        self.send_bytes(ably::encode(self.format, frame)).await
    }

    /// Gathers a frame for writing; waits while the client takes nothing.
    async fn send_bytes(&mut self, bytes: Bytes) -> Result<(), Gone> {
        let message = match self.format {
            Format::MsgPack => Message::Binary(bytes),
            Format::Json => Message::Text(bytes.try_into().map_err(|_| Gone)?),
        };
        in_time(self.socket.feed(message)).await
    }

    async fn flush(&mut self) -> Result<(), Gone> {
        in_time(self.socket.flush()).await
    }

    async fn close(&mut self, code: u16) {
        let frame = CloseFrame {
            code: code.into(),
            reason: "".into(),
        };
        // The client may be gone already.
        if in_time(self.socket.close(Some(frame))).await.is_err() {
            return;
        }
        // A socket that is closed with unread input resets the connection, and the client may never see the last frames:
        // so what still comes is read until the client closes too.
        let rest = async {
            while let Some(Ok(message)) = self.socket.next().await {
                if message.is_close() {
                    return;
                }
            }
            // After an error the library reads no more, but what is on its way must still be taken.
            let (io, mut sink) = (self.socket.get_mut(), [0; 4096]);
            while io.read(&mut sink).await.is_ok_and(|bytes| bytes > 0) {}
        };
        let _ = tokio::time::timeout(FAREWELL, rest).await;
    }
}

async fn in_time<E>(write: impl Future<Output = Result<(), E>>) -> Result<(), Gone> {
    match tokio::time::timeout(WRITE_PATIENCE, write).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Gone),
    }
}

struct Attachment {
    slot: u32,
    /// `None` when the client wants no messages.
    follower: Option<Follower>,
    echo: bool,
}

type Outcome = Result<Serial, ErrorInfo>;
type Publishing = std::pin::Pin<Box<dyn Future<Output = (Ticket, Outcome)> + Send>>;

struct Connection {
    app: crate::types::AppId,
    session: Session,
    wire: Wire,
    door: Door,
    waker: Arc<Waker>,
    attachments: HashMap<ChannelName, Attachment>,
    slots: HashMap<u32, ChannelName>,
    next_slot: u32,
    /// Bounded by the session's limit on unanswered publishes.
    publishes: FuturesUnordered<Publishing>,
    /// Slots of followers that had more than their share, to go on with when everything else had its turn.
    unfinished: BTreeSet<u32>,
}

impl Connection {
    async fn run(mut self, seat: Seat, token: CancellationToken) {
        let mut draining = false;
        while self.carry_out().await.is_ok() && !self.session.is_closed() {
            let deadline = self.session.next_deadline();
            let has_room = self.session.has_room();
            let stepped = tokio::select! {
                // Unread frames wait in the client's socket: that is what slows a fast publisher down.
                received = self.wire.socket.next(), if has_room => self.on_received(received),
                slots = self.waker.ready() => self.on_ready(slots).await,
                () = std::future::ready(()), if !self.unfinished.is_empty() => {
                    let slots = std::mem::take(&mut self.unfinished);
                    self.on_ready(slots).await
                }
                Some((ticket, outcome)) = self.publishes.next(), if !self.publishes.is_empty() => {
                    self.session.handle_published(ticket, outcome, now_ms());
                    Ok(())
                }
                () = sleep_until(deadline) => {
                    self.session.handle_tick(now_ms());
                    Ok(())
                }
                () = seat.superseded() => Err(Gone),
                () = token.cancelled(), if !draining => {
                    draining = true;
                    self.session.handle_drain(now_ms());
                    Ok(())
                }
            };
            if stepped.is_err() {
                return;
            }
        }
    }

    fn on_received(
        &mut self,
        received: Option<Result<Message, tungstenite::Error>>,
    ) -> Result<(), Gone> {
        let bytes: Bytes = match received {
            Some(Ok(Message::Text(text))) => text.into(),
            Some(Ok(Message::Binary(bytes))) => bytes,
            // The library's own answers, to a Close too, leave with the next flush; after a Close that flush fails.
            Some(Ok(
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) | Message::Close(_),
            )) => return Ok(()),
            Some(Err(tungstenite::Error::Capacity(_))) => {
                self.session.handle_too_large(now_ms());
                return Ok(());
            }
            Some(Err(_)) | None => return Err(Gone),
        };
        match ably::decode(self.wire.format, &bytes) {
            Ok(frame) => self.session.handle_frame(frame, now_ms()),
            Err(err) => self.session.handle_undecodable(err, now_ms()),
        }
        Ok(())
    }

    /// Carries out the session's effects in order, and writes what they gathered.
    async fn carry_out(&mut self) -> Result<(), Gone> {
        while let Some(effect) = self.session.poll_effect() {
            match effect {
                Effect::Send(frame) => self.wire.send(&frame).await?,
                Effect::Publish {
                    ticket,
                    channel,
                    id,
                    messages,
                } => self.publish(ticket, channel, id, &messages),
                Effect::Attach {
                    channel,
                    from,
                    echo,
                    subscribe,
                    in_place,
                } => {
                    let outcome = self.attach(&channel, from, echo, subscribe, in_place);
                    self.session.handle_attached(&channel, outcome, now_ms());
                }
                Effect::Detach { channel } => {
                    if let Some(attachment) = self.attachments.remove(&channel) {
                        self.slots.remove(&attachment.slot);
                    }
                    self.session.handle_detached(&channel, now_ms());
                }
                Effect::Close { code } => {
                    self.wire.flush().await?;
                    self.wire.close(code).await;
                    return Err(Gone);
                }
            }
        }
        self.wire.flush().await
    }

    fn publish(
        &self,
        ticket: Ticket,
        channel: ChannelName,
        id: String,
        messages: &[ably::Message],
    ) {
        let app = self.app.clone();
        let publish = Publish {
            key: ChannelKey { app, name: channel },
            id,
            connection_id: self.session.connection_id().to_owned(),
            count: u32::try_from(messages.len()).unwrap_or(u32::MAX),
            body: encode_body(messages),
            source: None,
        };
        let published = self.door.broker.publish(publish);
        self.publishes.push(Box::pin(async move {
            let outcome = match published.outcome().await {
                Ok((Some(serial), _)) => Ok(serial),
                Ok((None, _)) => Err(ErrorCode::Internal.into()),
                Err(err) => Err(PublishError::into(err)),
            };
            (ticket, outcome)
        }));
    }

    fn attach(
        &mut self,
        channel: &ChannelName,
        from: Option<Serial>,
        echo: bool,
        subscribe: bool,
        in_place: bool,
    ) -> AttachOutcome {
        let former = self.attachments.remove(channel);
        if let Some(attachment) = &former {
            self.slots.remove(&attachment.slot);
        }
        let standing = former.and_then(|attachment| attachment.follower);
        let from = match (&standing, in_place) {
            (Some(follower), true) => Some(follower.cursor()),
            _ => from,
        };
        let slot = self.next_slot;
        self.next_slot = self.next_slot.wrapping_add(1);
        let app = self.app.clone();
        let name = channel.clone();
        let key = ChannelKey { app, name };
        let (follower, began) = self.door.broker.follow(key, from, self.waker.clone(), slot);
        let at = follower.cursor();
        let continuity = match began {
            broker::Continuity::Fresh => Continuity::Fresh,
            broker::Continuity::Resumed { backlog } => Continuity::Resumed { backlog },
            broker::Continuity::Lost => Continuity::Lost,
        };
        let follower = subscribe.then_some(follower);
        let attachment = Attachment {
            slot,
            follower,
            echo,
        };
        self.attachments.insert(channel.clone(), attachment);
        self.slots.insert(slot, channel.clone());
        AttachOutcome { at, continuity }
    }

    /// Sends a share of what each woken follower finds; whoever has more goes on when everything else had its turn.
    async fn on_ready(&mut self, slots: impl IntoIterator<Item = u32>) -> Result<(), Gone> {
        for slot in slots {
            if self.send_records(slot).await? {
                self.unfinished.insert(slot);
            } else {
                self.unfinished.remove(&slot);
            }
        }
        self.wire.flush().await
    }

    /// Whether the follower may have more at once.
    async fn send_records(&mut self, slot: u32) -> Result<bool, Gone> {
        let Some(channel) = self.slots.get(&slot) else {
            return Ok(false);
        };
        let Some(attachment) = self.attachments.get_mut(channel) else {
            return Ok(false);
        };
        let Some(follower) = &mut attachment.follower else {
            return Ok(false);
        };
        let polled = match follower.poll(POLL_RECORDS).await {
            Ok(polled) => polled,
            Err(lost) => {
                let channel = channel.clone();
                let (at, error) = (lost.at, &lost.error);
                self.session
                    .handle_discontinuity(&channel, at, error, now_ms());
                return Ok(false);
            }
        };
        let at = follower.cursor();
        let connection_id = self.session.connection_id().to_owned();
        let mut unreadable = false;
        for record in polled.records {
            let own = record.publish.connection_id == connection_id;
            let frame = record.frame(self.wire.format);
            unreadable |= frame.is_empty();
            if (attachment.echo || !own) && !frame.is_empty() {
                self.wire.send_bytes(frame.clone()).await?;
                self.session.handle_sent(now_ms());
            }
        }
        if unreadable {
            let what = "a message is stored in a form that this node cannot read";
            let error = ErrorInfo::new(ErrorCode::ContinuityLost, what);
            let channel = channel.clone();
            self.session
                .handle_discontinuity(&channel, at, &error, now_ms());
        }
        Ok(polled.more)
    }
}

/// The session's clock: milliseconds since the process began to use it.
fn now_ms() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    let since = START.get_or_init(Instant::now).elapsed();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

async fn sleep_until(deadline_ms: Option<u64>) {
    match deadline_ms {
        Some(deadline) => {
            tokio::time::sleep(Duration::from_millis(deadline.saturating_sub(now_ms()))).await;
        }
        None => std::future::pending().await,
    }
}
