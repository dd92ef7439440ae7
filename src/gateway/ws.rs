//! The WebSocket that most conversations go over.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt as _;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_util::sync::CancellationToken;

use crate::gateway::conversation::Conversation;
use crate::gateway::open::open;
use crate::gateway::rest::{Pairs, pairs};
use crate::gateway::wire::{FAREWELL, Gone, Received, WRITE_PATIENCE, Wire};
use crate::gateway::{Door, Permit, answer};
use crate::session::{ConnectParams, refusal};
use crate::tasks::OnError;
use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::Format;

/// Read buffer of a connection: the library's default is a thousand times what an idle client needs.
const READ_BUFFER: usize = 1024;
/// Frames are gathered up to this size before they are written.
const WRITE_BUFFER: usize = 16 * 1024;

type Socket = WebSocketStream<TokioIo<Upgraded>>;

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
    let authorization = request.headers().get(header::AUTHORIZATION);
    let authorization = authorization
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    let version = request.headers().get("x-ably-version");
    let version = version.and_then(|value| value.to_str().ok());
    let offer = Offer {
        query: pairs(request.uri().query()),
        authorization,
        version: version.and_then(|version| version.parse().ok()),
    };
    let upgrade = hyper::upgrade::on(&mut request);
    let permit = request.extensions().get::<Permit>().cloned();
    let tasks = door.tasks.clone();
    tasks.spawn("gateway.ws", OnError::Log, |token| async move {
        // A client that changed its mind.
        let Ok(upgraded) = upgrade.await else {
            return Ok(());
        };
        Box::pin(converse(door, upgraded, offer, token)).await;
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

/// What a client says of itself.
struct Offer {
    query: Pairs,
    authorization: Option<String>,
    /// The protocol's version by its header, for clients whose query says none.
    version: Option<f64>,
}

async fn converse(door: Door, upgraded: Upgraded, offer: Offer, token: CancellationToken) {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        .max_write_buffer_size(WRITE_BUFFER + 4 * door.limits.max_frame_bytes)
        .max_message_size(Some(door.limits.max_frame_bytes))
        .max_frame_size(Some(door.limits.max_frame_bytes));
    let io = TokioIo::new(upgraded);
    let socket = WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await;
    let borrowed = (offer.query)
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    let params = ConnectParams::from_query(borrowed);
    let format = params.as_ref().map_or(Format::Json, |params| params.format);
    let mut wire = WebSocket { socket, format };
    let opened = params.and_then(|mut params| {
        params.version = params.version.or(offer.version);
        open(&door, params, &offer.query, offer.authorization.as_deref())
    });
    let opening = match opened {
        Ok(opening) => opening,
        Err(err) => {
            let _ = wire.send(&refusal(&err)).await;
            wire.close(1000).await;
            return;
        }
    };
    let seat = door.seat(&opening);
    Conversation::new(door, opening, wire)
        .run(seat, token)
        .await;
}

/// The socket and its format.
struct WebSocket {
    socket: Socket,
    format: Format,
}

impl Wire for WebSocket {
    fn format(&self) -> Format {
        self.format
    }

    async fn receive(&mut self) -> Received {
        match self.socket.next().await {
            Some(Ok(Message::Text(text))) => Received::Bytes(text.into()),
            Some(Ok(Message::Binary(bytes))) => Received::Bytes(bytes),
            // The library's own answers, to a Close too, leave with the next flush; after a Close that flush fails.
            Some(Ok(
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) | Message::Close(_),
            )) => Received::Nothing,
            Some(Err(tungstenite::Error::Capacity(_))) => Received::TooLarge,
            Some(Err(_)) | None => Received::Gone,
        }
    }

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
