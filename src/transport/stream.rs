//! Ordered streams of frames: the two halves that callers and handlers hold.

use std::sync::Arc;

use bytes::Bytes;
use quinn::{RecvStream, SendStream};

use crate::tasks::OnError;
use crate::transport::Shared;
use crate::transport::frame::{self, FrameReader, Head, Kind, Outbox, ReadError};

/// Why a stream goes no further. What was sent before may or may not have arrived.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The other side dropped its half, or the connection is gone.
    #[error("the stream is closed")]
    Closed,
    #[error("the stream was lost: {0}")]
    Lost(String),
    #[error("a frame of {bytes} bytes is larger than {max}")]
    TooLarge { bytes: usize, max: usize },
    #[error("the peer broke the framing: {0}")]
    Malformed(&'static str),
}

impl From<ReadError> for StreamError {
    fn from(err: ReadError) -> Self {
        match err {
            ReadError::Lost(reason) => Self::Lost(reason),
            ReadError::TooLarge { bytes, max } => Self::TooLarge { bytes, max },
            ReadError::Malformed(what) => Self::Malformed(what),
        }
    }
}

/// The sending half. Dropped, it ends the stream once everything queued is sent.
#[derive(Debug)]
pub struct FrameTx {
    outbox: Outbox,
    body_bytes_max: usize,
}

impl FrameTx {
    /// Starts the writer of `stream`.
    pub(super) fn start(shared: &Arc<Shared>, stream: SendStream) -> Self {
        let (outbox, queue) = Outbox::new(shared.options.stream_queue_bytes);
        shared
            .tasks
            .spawn("transport.stream", OnError::Log, |token| async move {
                frame::write_frames(stream, queue, token).await;
                Ok(())
            });
        Self {
            outbox,
            body_bytes_max: shared.body_bytes_max(),
        }
    }

    /// Queues a frame and waits for room in the queue, not for its arrival. Frames that wait are sent together.
    /// Cancel-safe: a frame is queued whole or not at all.
    ///
    /// # Errors
    /// `TooLarge` leaves the stream usable; `Closed` is for ever.
    pub async fn send(&mut self, body: Bytes) -> Result<(), StreamError> {
        let (bytes, max) = (body.len(), self.body_bytes_max);
        if bytes > max {
            return Err(StreamError::TooLarge { bytes, max });
        }
        let sent = self.outbox.send(Kind::Data, Head::default(), body).await;
        sent.map_err(|_| StreamError::Closed)
    }

    /// Resolves when the other side no longer reads or the connection is gone.
    pub async fn closed(&self) {
        self.outbox.closed().await;
    }
}

/// The receiving half. Dropped, it tells the sender to stop.
#[derive(Debug)]
pub struct FrameRx {
    reader: FrameReader,
}

impl FrameRx {
    pub(super) fn new(reader: FrameReader) -> Self {
        Self { reader }
    }

    pub(super) fn reader_of(shared: &Shared, stream: RecvStream) -> FrameReader {
        FrameReader::new(stream, shared.options.frame_bytes_max)
    }

    /// The next frame in the order sent; `None` when the sender ended the stream. After an error there is nothing
    /// more to read. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Bytes, StreamError>> {
        match self.reader.next().await {
            Ok(Some(frame)) if frame.kind == Kind::Data => Some(Ok(frame.rest)),
            Ok(Some(_)) => Some(Err(StreamError::Malformed("a frame of another kind"))),
            Ok(None) => None,
            Err(err) => Some(Err(err.into())),
        }
    }
}
