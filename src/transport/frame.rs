//! Frames within a QUIC stream: reading them one by one, writing all that wait as one.
//!
//! A frame is `length: u32 | kind: u8 | head | body`, little endian; `length` counts everything after itself.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use quinn::{RecvStream, SendStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use crate::transport::body::Body;

/// Bytes of `length`.
const LENGTH: usize = 4;
/// What one write gathers at most.
const BATCH_BYTES: usize = 256 * 1024;
/// Pieces of bodies from this size on are handed to QUIC as they are instead of being copied beside others.
const OWN_CHUNK_BYTES: usize = 4 * 1024;
/// Frames that may wait in one outbox; their bytes are bounded by its budget.
const QUEUE_FRAMES: usize = 4096;
/// What a waiting frame costs beside its bytes.
const FRAME_OVERHEAD: usize = 64;
/// Least room for a read, so that small frames share an allocation.
const READ_BYTES: usize = 64 * 1024;

/// What a frame is. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// `peer::Hello`; first of every stream, both ways.
    Hello = 1,
    /// Instead of a Hello: why this stream is not served (UTF-8).
    Refused = 2,
    /// A unary call: `seq u64 | service u16 | group u32 | deadline ms u32`, then its body.
    Request = 3,
    /// The answer: `seq u64`, then its body.
    Response = 4,
    /// The handler's error: `seq u64`, then UTF-8.
    Failed = 5,
    /// The call was not handled and may be repeated: `seq u64`, then UTF-8.
    Busy = 6,
    /// One frame of an ordered stream.
    Data = 7,
}

impl Kind {
    fn from_number(number: u8) -> Option<Self> {
        let all = [
            Self::Hello,
            Self::Refused,
            Self::Request,
            Self::Response,
            Self::Failed,
            Self::Busy,
            Self::Data,
        ];
        all.into_iter().find(|kind| *kind as u8 == number)
    }
}

/// A received frame: its kind, and head and body together.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) rest: Bytes,
}

/// Why no frame could be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReadError {
    #[error("{0}")]
    Lost(String),
    #[error("a frame of {bytes} bytes is larger than {max}")]
    TooLarge { bytes: usize, max: usize },
    #[error("{0}")]
    Malformed(&'static str),
}

/// Cuts a QUIC stream into frames.
#[derive(Debug)]
pub(super) struct FrameReader {
    stream: RecvStream,
    buffer: BytesMut,
    frame_bytes_max: usize,
}

impl FrameReader {
    pub(super) fn new(stream: RecvStream, frame_bytes_max: usize) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            frame_bytes_max,
        }
    }

    /// The next frame; `None` when the sender ended the stream after a whole one. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, ReadError> {
        loop {
            if let Some(frame) = take_frame(&mut self.buffer, self.frame_bytes_max)? {
                return Ok(Some(frame));
            }
            match self.stream.read_chunk(usize::MAX, true).await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk.bytes),
                Ok(None) if self.buffer.is_empty() => return Ok(None),
                Ok(None) => return Err(ReadError::Malformed("the stream ended within a frame")),
                Err(err) => return Err(ReadError::Lost(read_reason(&err))),
            }
        }
    }
}

/// Makes room for a frame of this length. Frames are slices of the buffer, and some are kept for long: a buffer is used to
/// its end before there is another, for each small frame in a large one of its own would keep all of that.
fn make_room(buffer: &mut BytesMut, length: usize) {
    let missing = length.saturating_sub(buffer.len());
    let room = buffer.capacity() - buffer.len();
    if room < missing.max(LENGTH) {
        buffer.reserve(missing.max(READ_BYTES));
    }
}

/// Takes a whole frame off the front of `buffer`. The length is checked before room is made for it.
fn take_frame(buffer: &mut BytesMut, frame_bytes_max: usize) -> Result<Option<Frame>, ReadError> {
    if buffer.len() < LENGTH {
        make_room(buffer, LENGTH);
        return Ok(None);
    }
    let length = (&buffer[..LENGTH]).get_u32_le() as usize;
    if length > frame_bytes_max {
        return Err(ReadError::TooLarge {
            bytes: length,
            max: frame_bytes_max,
        });
    }
    if buffer.len() < LENGTH + length {
        make_room(buffer, LENGTH + length);
        return Ok(None);
    }
    buffer.advance(LENGTH);
    let mut rest = buffer.split_to(length).freeze();
    let kind = (!rest.is_empty()).then(|| rest.get_u8());
    let kind = kind
        .and_then(Kind::from_number)
        .ok_or(ReadError::Malformed("a frame of unknown kind"))?;
    Ok(Some(Frame { kind, rest }))
}

/// The fixed part in front of a body: at most 18 bytes (that of a request).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Head {
    bytes: [u8; 18],
    length: usize,
}

impl Head {
    pub(super) fn with(mut self, field: &[u8]) -> Self {
        self.bytes[self.length..self.length + field.len()].copy_from_slice(field);
        self.length += field.len();
        self
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

struct Queued {
    kind: Kind,
    head: Head,
    body: Body,
    /// Gives the bytes back to the outbox's budget once QUIC has taken them.
    _room: OwnedSemaphorePermit,
}

impl Queued {
    fn length(&self) -> usize {
        1 + self.head.length + self.body.len()
    }
}

/// The outbox's writer has ended: the stream or its connection is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream is closed")]
pub(super) struct Closed;

/// Frames on their way to a stream, bounded in number and bytes. Clones share both.
#[derive(Clone, Debug)]
pub(super) struct Outbox {
    tx: mpsc::Sender<Queued>,
    room: Arc<Semaphore>,
    bytes_max: usize,
}

/// The other end of an [`Outbox`], for [`write_frames`].
#[derive(Debug)]
pub(super) struct Queue(mpsc::Receiver<Queued>);

impl Outbox {
    /// A queue that holds at most `bytes_max`.
    pub(super) fn new(bytes_max: usize) -> (Self, Queue) {
        let (tx, rx) = mpsc::channel(QUEUE_FRAMES);
        // The semaphore counts in `u32` and has a ceiling of its own.
        let bytes_max = bytes_max.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
        let room = Arc::new(Semaphore::new(bytes_max));
        let outbox = Self {
            tx,
            room,
            bytes_max,
        };
        (outbox, Queue(rx))
    }

    /// Queues a frame, waiting for room. Frames of one caller stay in order. Cancel-safe: a frame is queued
    /// whole or not at all.
    pub(super) async fn send(
        &self,
        kind: Kind,
        head: Head,
        body: impl Into<Body>,
    ) -> Result<(), Closed> {
        let body = body.into();
        // One frame larger than the whole budget is let through when nothing else waits.
        let bytes = (head.length + body.len() + FRAME_OVERHEAD).min(self.bytes_max);
        let bytes = u32::try_from(bytes).map_err(|_| Closed)?;
        let room = tokio::select! {
            room = self.room.clone().acquire_many_owned(bytes) => room.map_err(|_| Closed)?,
            () = self.tx.closed() => return Err(Closed),
        };
        let queued = Queued {
            kind,
            head,
            body,
            _room: room,
        };
        self.tx.send(queued).await.map_err(|_| Closed)
    }

    /// Resolves when the writer has ended.
    pub(super) async fn closed(&self) {
        self.tx.closed().await;
    }
}

/// Writes what is queued until the queue's senders are gone (the stream is then finished in good order), the
/// stream or its connection ends, or `token` is cancelled. Everything that waits goes out in one write.
pub(super) async fn write_frames(
    mut stream: SendStream,
    mut queue: Queue,
    token: CancellationToken,
) {
    let mut stopped = std::pin::pin!(stream.stopped());
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            queued = queue.0.recv() => match queued {
                Some(queued) => batch.push(queued),
                None => {
                    // Fails only when the stream is closed already.
                    let _ = stream.finish();
                    return;
                }
            },
            _ = &mut stopped => return,
            () = token.cancelled() => return,
        }
        let mut bytes = batch.iter().map(Queued::length).sum::<usize>();
        while bytes < BATCH_BYTES
            && let Ok(queued) = queue.0.try_recv()
        {
            bytes += queued.length();
            batch.push(queued);
        }
        let mut chunks = encode(&batch);
        tokio::select! {
            written = stream.write_all_chunks(&mut chunks) => if written.is_err() { return },
            () = token.cancelled() => return,
        }
        batch.clear();
    }
}

/// The bytes of `batch`: small frames side by side in one chunk, large bodies as they are.
fn encode(batch: &[Queued]) -> Vec<Bytes> {
    let mut chunks = Vec::new();
    let mut small = BytesMut::new();
    for queued in batch {
        let length = u32::try_from(queued.length())
            .expect("a frame is checked against a limit below 4 GiB before it is queued");
        small.put_u32_le(length);
        small.put_u8(queued.kind as u8);
        small.put_slice(queued.head.as_slice());
        for piece in queued.body.pieces() {
            if piece.len() < OWN_CHUNK_BYTES {
                small.put_slice(piece);
            } else {
                chunks.push(small.split().freeze());
                chunks.push(piece.clone());
            }
        }
    }
    if !small.is_empty() {
        chunks.push(small.freeze());
    }
    chunks
}

/// One frame outside of any outbox, for what must come first on a stream.
pub(super) async fn write_one(
    stream: &mut SendStream,
    kind: Kind,
    body: &[u8],
) -> Result<(), String> {
    let length = u32::try_from(1 + body.len()).map_err(|_| "frame too large".to_owned())?;
    let mut bytes = BytesMut::with_capacity(LENGTH + 1 + body.len());
    bytes.put_u32_le(length);
    bytes.put_u8(kind as u8);
    bytes.put_slice(body);
    (stream.write_all(&bytes).await).map_err(|err| err.to_string())
}

fn read_reason(err: &quinn::ReadError) -> String {
    match err {
        quinn::ReadError::ConnectionLost(lost) => lost_reason(lost),
        err => err.to_string(),
    }
}

/// Why a connection ended, in the peer's own words where it gave any.
pub(super) fn lost_reason(err: &quinn::ConnectionError) -> String {
    match err {
        quinn::ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
            String::from_utf8_lossy(&close.reason).into_owned()
        }
        err => err.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    async fn bytes_of(frames: &[(Kind, Vec<u8>)]) -> Vec<u8> {
        let (outbox, mut queue) = Outbox::new(1 << 20);
        let mut batch = Vec::new();
        for (kind, body) in frames {
            let body = Bytes::from(body.clone());
            outbox.send(*kind, Head::default(), body).await.unwrap();
            batch.push(queue.0.recv().await.unwrap());
        }
        encode(&batch).concat()
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut(
            sizes in prop::collection::vec(prop_oneof![0_usize..200, 4000_usize..6000], 1..20),
            cut in 1_usize..3000,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let frames: Vec<_> = (sizes.iter().enumerate())
                .map(|(n, size)| (Kind::Data, vec![u8::try_from(n).unwrap(); *size]))
                .collect();
            let bytes = runtime.block_on(bytes_of(&frames));
            let (mut buffer, mut seen) = (BytesMut::new(), Vec::new());
            for piece in bytes.chunks(cut) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = take_frame(&mut buffer, 10_000).unwrap() {
                    seen.push((frame.kind, frame.rest.to_vec()));
                }
            }
            prop_assert_eq!(seen, frames);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = take_frame(&mut buffer, 32) {}
        }
    }

    #[test]
    fn frames_that_are_kept_lie_side_by_side() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let frames = vec![(Kind::Data, vec![7; 1000]); 500];
        let bytes = runtime.block_on(bytes_of(&frames));
        let (mut buffer, mut kept) = (BytesMut::new(), Vec::new());
        // Each frame comes alone, and is looked for before it has come.
        for piece in bytes.chunks(bytes.len() / frames.len()) {
            buffer.extend_from_slice(piece);
            while let Some(frame) = take_frame(&mut buffer, 10_000).unwrap() {
                kept.push(frame.rest);
            }
        }
        assert_eq!(kept.len(), frames.len());
        let begin = |frame: &Bytes| frame.as_ptr().addr();
        let apart = |two: &&[Bytes]| begin(&two[1]).wrapping_sub(begin(&two[0])) > 2000;
        let buffers = 1 + kept.windows(2).filter(apart).count();
        assert!(
            buffers <= 1 + 4 * bytes.len() / READ_BYTES,
            "{buffers} buffers for {} bytes",
            bytes.len()
        );
    }

    #[test]
    fn a_length_beyond_the_limit_makes_no_room() {
        let mut buffer = BytesMut::from(&[0xff_u8; 4][..]);
        let err = take_frame(&mut buffer, 1000).unwrap_err();
        let bytes = u32::MAX as usize;
        assert_eq!(err, ReadError::TooLarge { bytes, max: 1000 });
        assert!(buffer.capacity() < 1000);
    }

    #[tokio::test]
    async fn a_full_outbox_waits_and_a_closed_one_says_so() {
        let (outbox, mut queue) = Outbox::new(1000);
        let send = |size| outbox.send(Kind::Data, Head::default(), Bytes::from(vec![0; size]));
        send(900).await.unwrap();
        let mut second = std::pin::pin!(send(900));
        assert!(futures_util::poll!(&mut second).is_pending());
        drop(queue.0.recv().await);
        second.await.unwrap();
        let mut third = std::pin::pin!(send(900));
        assert!(futures_util::poll!(&mut third).is_pending());
        drop(queue);
        assert_eq!(third.await, Err(Closed));
    }
}
