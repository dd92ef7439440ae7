//! What a conversation goes over: a WebSocket, or the requests of a client that has none.

use std::time::Duration;

use bytes::Bytes;

use crate::wire::ably::{self, Format, Frame};

/// A client that takes nothing for so long is gone.
pub(super) const WRITE_PATIENCE: Duration = Duration::from_secs(30);
/// How long a closing client may take to answer.
pub(super) const FAREWELL: Duration = Duration::from_secs(2);

/// The client is gone or takes nothing any more.
#[derive(Debug)]
pub(super) struct Gone;

/// What came from the client.
#[derive(Debug)]
pub(super) enum Received {
    /// Bytes of one frame, decodable or not.
    Bytes(Bytes),
    Frame(Box<Frame>),
    /// Nothing that is the session's business.
    Nothing,
    /// A frame beyond the limit began; nothing after it can be read.
    TooLarge,
    Gone,
}

pub(super) trait Wire: Send {
    fn format(&self) -> Format;

    /// The next thing that comes. Cancel-safe.
    fn receive(&mut self) -> impl Future<Output = Received> + Send;

    /// Gathers a frame for writing; waits while the client takes nothing.
    fn send_bytes(&mut self, bytes: Bytes) -> impl Future<Output = Result<(), Gone>> + Send;

    /// Has what was gathered written.
    fn flush(&mut self) -> impl Future<Output = Result<(), Gone>> + Send;

    /// Ends it when what was gathered is written, with a WebSocket's code.
    fn close(&mut self, code: u16) -> impl Future<Output = ()> + Send;

    fn send(&mut self, frame: &Frame) -> impl Future<Output = Result<(), Gone>> + Send {
        self.send_bytes(ably::encode(self.format(), frame))
    }
}
