//! A WebSocket that carries frames of the client protocol, reading and writing at the same time.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll};

use futures_util::{SinkExt, StreamExt};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Message as Packet, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::client::{Error, Options};
use crate::wire::ably::{self, Format, Frame};

/// Version of the client protocol that is asked for.
const PROTOCOL_VERSION: &str = "6";
const AGENT: &str = concat!("firth-cli/", env!("CARGO_PKG_VERSION"));

/// An open WebSocket. Everything here is cancel-safe: what is under way stays inside.
pub(super) struct Socket {
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
    format: Format,
    unflushed: bool,
    closed: bool,
}

impl Socket {
    /// Opens a WebSocket to one of a cluster's nodes.
    pub(super) async fn open(
        url: &str,
        options: &Options,
        resume: Option<&str>,
    ) -> Result<Self, String> {
        let address = address(url, options, resume).map_err(|err| err.to_string())?;
        let opened = tokio_tungstenite::connect_async_with_config(address, None, true).await;
        let (stream, _response) = opened.map_err(|err| err.to_string())?;
        Ok(Self {
            stream,
            format: options.format,
            unflushed: false,
            closed: false,
        })
    }

    /// Sends what is in `out`, and returns the next frame received; `None` for a packet that only shows life. With
    /// `read` false it only sends, and never returns unless that fails.
    pub(super) async fn exchange(
        &mut self,
        out: &mut VecDeque<Frame>,
        read: bool,
    ) -> Result<Option<Frame>, String> {
        poll_fn(|cx| self.poll_exchange(cx, out, read)).await
    }

    fn poll_exchange(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut VecDeque<Frame>,
        read: bool,
    ) -> Poll<Result<Option<Frame>, String>> {
        if let Poll::Ready(Err(reason)) = self.poll_send(cx, out) {
            return Poll::Ready(Err(reason));
        }
        if !read {
            return Poll::Pending;
        }
        self.stream.poll_next_unpin(cx).map(|packet| match packet {
            Some(Ok(Packet::Text(text))) => self.parse(text.as_bytes()),
            Some(Ok(Packet::Binary(bytes))) => self.parse(&bytes),
            Some(Ok(Packet::Close(close))) => Err(match close {
                Some(close) => format!("the server closed the socket: {close}"),
                None => "the server closed the socket".to_owned(),
            }),
            Some(Ok(Packet::Ping(_) | Packet::Pong(_) | Packet::Frame(_))) => {
                // A pong may wait to be sent.
                self.unflushed = true;
                Ok(None)
            }
            Some(Err(err)) => Err(err.to_string()),
            None => Err("the socket ended".to_owned()),
        })
    }

    /// Ready once everything is written and flushed.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut VecDeque<Frame>,
    ) -> Poll<Result<(), String>> {
        loop {
            if out.is_empty() {
                if !self.unflushed {
                    return Poll::Ready(Ok(()));
                }
                let flushed = self
                    .stream
                    .poll_flush_unpin(cx)
                    .map_err(|err| err.to_string());
                self.unflushed = !matches!(flushed, Poll::Ready(Ok(())));
                return flushed;
            }
            match self.stream.poll_ready_unpin(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(err)) => return Poll::Ready(Err(err.to_string())),
                Poll::Pending => return Poll::Pending,
            }
            let Some(frame) = out.pop_front() else {
                continue;
            };
            let packet = self.packet(&frame)?;
            self.stream
                .start_send_unpin(packet)
                .map_err(|err| err.to_string())?;
            self.unflushed = true;
        }
    }

    fn packet(&self, frame: &Frame) -> Result<Packet, String> {
        let bytes = ably::encode(self.format, frame);
        match self.format {
            Format::Json => Utf8Bytes::try_from(bytes)
                .map(Packet::Text)
                .map_err(|err| err.to_string()),
            Format::MsgPack => Ok(Packet::Binary(bytes)),
        }
    }

    fn parse(&self, bytes: &[u8]) -> Result<Option<Frame>, String> {
        ably::decode(self.format, bytes)
            .map(Some)
            .map_err(|err| format!("a frame that cannot be decoded: {err}"))
    }

    /// Says goodbye on the level of the WebSocket.
    pub(super) async fn close(&mut self) {
        if !std::mem::replace(&mut self.closed, true) {
            // It may be gone already.
            let _ = self.stream.close(None).await;
        }
    }
}

/// The WebSocket URL of a node given as `http://host:port` or `ws://host:port`.
pub(super) fn address(url: &str, options: &Options, resume: Option<&str>) -> Result<String, Error> {
    let invalid = |reason| Error::Url {
        url: url.to_owned(),
        reason,
    };
    let host = url
        .strip_prefix("http://")
        .or_else(|| url.strip_prefix("ws://"))
        .ok_or_else(|| invalid("it must begin with http:// or ws://"))?;
    let host = host.strip_suffix('/').unwrap_or(host);
    if host.is_empty() || host.contains(['/', '?', '#', '@', ' ']) {
        return Err(invalid("it must name a host and port and nothing else"));
    }
    let format = match options.format {
        Format::Json => "json",
        Format::MsgPack => "msgpack",
    };
    let fixed = [
        ("key", Some(options.key.as_str())),
        ("v", Some(PROTOCOL_VERSION)),
        ("format", Some(format)),
        ("heartbeats", Some("true")),
        ("echo", Some(if options.echo { "true" } else { "false" })),
        ("agent", Some(AGENT)),
        ("clientId", options.client_id.as_deref()),
        ("resume", resume),
    ];
    let pairs = fixed.into_iter().filter_map(|(name, value)| {
        let value = utf8_percent_encode(value?, NON_ALPHANUMERIC);
        Some(format!("{name}={value}"))
    });
    Ok(format!(
        "ws://{host}/?{}",
        pairs.collect::<Vec<_>>().join("&")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_url_becomes_a_websocket_url() {
        let options = Options::new(vec![], "app.key:se/cret");
        let text = address("http://127.0.0.1:8080/", &options, Some("c!k")).unwrap();
        assert!(
            text.starts_with("ws://127.0.0.1:8080/?key=app%2Ekey%3Ase%2Fcret&v=6&format=json"),
            "{text}"
        );
        assert!(text.ends_with("&resume=c%21k"), "{text}");
        for bad in [
            "",
            "localhost:1",
            "https://a:1",
            "http://",
            "http://a/b",
            "http://u@a",
        ] {
            assert!(address(bad, &options, None).is_err(), "{bad}");
        }
    }
}
