//! A conversation over plain HTTP requests, for clients whose network lets no WebSocket through (§2.1).
//!
//! `connect` opens it and is its first `recv`; `recv` takes what waits, as one JSON array or as a stream of them, one a line;
//! `send` brings an array of frames. What waits is in the memory of the node that answered `connect`; requests that come
//! to another one are relayed to it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Response, StatusCode};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep_until, timeout};

use crate::gateway::answer;
use crate::gateway::wire::{FAREWELL, Gone, Received, WRITE_PATIENCE, Wire};
use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::{self, Action, Format, Frame};

/// A client that neither receives nor comes back to receive for so long is gone.
const RECEIVE_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes that wait for a client before the conversation waits for it.
const WAITING_BYTES_MAX: usize = 256 * 1024;
/// No frame, as an array.
pub(super) const NOTHING: Bytes = Bytes::from_static(b"[]");
/// Frames in one `send`.
const FRAMES_MAX: usize = 1024;

/// The conversations of this node that go over requests, by connection key.
#[derive(Clone, Debug)]
pub(crate) struct Comets {
    ends: Arc<Mutex<HashMap<String, Ends>>>,
    /// They have no socket of their own that would count.
    places: Arc<Semaphore>,
}

/// What the handlers of requests hold of a conversation.
#[derive(Clone, Debug)]
pub(super) struct Ends {
    mailbox: Arc<Mailbox>,
    incoming: mpsc::Sender<Frame>,
    /// What waits goes out as it comes, for as long as the request lasts.
    streams: bool,
    /// Held by who brings frames for another node.
    sending: Arc<tokio::sync::Mutex<()>>,
}

/// What waits for the client.
#[derive(Debug, Default)]
struct Mailbox {
    inner: Mutex<Inner>,
    /// Something was put in, or it was closed.
    filled: Notify,
    /// Something was taken out, or somebody began or ended to receive.
    taken: Notify,
}

#[derive(Debug)]
struct Inner {
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// Nothing more will be put in.
    closed: bool,
    /// The newest request that receives. One that an abandoned request left behind must not take frames from it.
    receiver: u64,
    receiving: bool,
    /// Since when nobody receives.
    idle_since: Instant,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            frames: VecDeque::new(),
            bytes: 0,
            closed: false,
            receiver: 0,
            receiving: false,
            idle_since: Instant::now(),
        }
    }
}

/// The conversation's side.
#[derive(Debug)]
pub(super) struct CometWire {
    mailbox: Arc<Mailbox>,
    incoming: mpsc::Receiver<Frame>,
    comets: Comets,
    key: String,
    #[expect(dead_code, reason = "held, never read")]
    place: OwnedSemaphorePermit,
}

impl Comets {
    /// At most `max` of them at a time.
    pub(super) fn new(max: usize) -> Self {
        Self {
            ends: Arc::default(),
            places: Arc::new(Semaphore::new(max.min(Semaphore::MAX_PERMITS))),
        }
    }

    /// A new conversation under this connection key; who had the key before is not found any more.
    ///
    /// # Errors
    /// `Busy` when there are as many as there may be.
    pub(super) fn open(&self, key: &str, streams: bool) -> Result<(CometWire, Ends), ErrorInfo> {
        let place = self.places.clone().try_acquire_owned().map_err(|_| {
            let what = "this node has as many connections as it may have";
            ErrorInfo::new(ErrorCode::Busy, what)
        })?;
        let mailbox = Arc::<Mailbox>::default();
        let (incoming_tx, incoming) = mpsc::channel(1);
        let ends = Ends {
            mailbox: mailbox.clone(),
            incoming: incoming_tx,
            streams,
            sending: Arc::default(),
        };
        self.lock().insert(key.to_owned(), ends.clone());
        let wire = CometWire {
            mailbox,
            incoming,
            comets: self.clone(),
            key: key.to_owned(),
            place,
        };
        Ok((wire, ends))
    }

    /// # Errors
    /// `Disconnected`: the client connects again, and resumes.
    pub(super) fn find(&self, key: &str) -> Result<Ends, ErrorInfo> {
        let found = self.lock().get(key).cloned();
        found.ok_or_else(|| {
            let what = "this node holds no connection under that key";
            ErrorInfo::new(ErrorCode::Disconnected, what)
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Ends>> {
        self.ends.lock().unwrap_or_else(|err| err.into_inner())
    }
}

impl Ends {
    /// Hands frames to the conversation, in order; waits while it is busy with earlier ones.
    ///
    /// # Errors
    /// `InvalidBody` when the bytes are not an array, `Disconnected` when the conversation is over.
    pub(super) async fn send(&self, body: &[u8]) -> Result<(), ErrorInfo> {
        let frames = ably::decode_frames(Format::Json, body)?;
        if frames.len() > FRAMES_MAX {
            let what = format!("more than {FRAMES_MAX} frames in one request");
            return Err(ErrorInfo::new(ErrorCode::InvalidBody, what));
        }
        for frame in frames {
            self.incoming.send(frame).await.map_err(|_| over())?;
        }
        Ok(())
    }

    /// As [`Ends::send`], for another node, which may have given up since: one at a time, so that a conversation that takes
    /// nothing holds no more than that.
    ///
    /// # Errors
    /// As [`Ends::send`]; `Busy` while an earlier one goes on.
    pub(super) async fn send_alone(&self, body: &[u8]) -> Result<(), ErrorInfo> {
        let what = "an earlier request of the connection is not done";
        let alone = self.sending.try_lock();
        let _alone = alone.map_err(|_| ErrorInfo::new(ErrorCode::Busy, what))?;
        self.send(body).await
    }

    /// Has the conversation hear that the client closes or disconnects.
    ///
    /// # Errors
    /// `Disconnected` when it is over.
    pub(super) async fn say(&self, action: Action) -> Result<(), ErrorInfo> {
        let frame = Frame::new(action);
        self.incoming.send(frame).await.map_err(|_| over())
    }

    /// What waits, the way that the client asked for when it connected.
    ///
    /// # Errors
    /// `Disconnected` when the conversation is over and everything was taken.
    pub(super) async fn receive(&self) -> Result<Response<Body>, ErrorInfo> {
        if self.streams {
            return self.stream();
        }
        self.poll().await
    }

    /// One array of what waits, as soon as something does.
    ///
    /// # Errors
    /// `Disconnected` when the conversation is over and everything was taken.
    async fn poll(&self) -> Result<Response<Body>, ErrorInfo> {
        Ok(json(self.next().await?))
    }

    /// One array of what waits, as soon as something does, or an empty one after so long.
    ///
    /// # Errors
    /// `Disconnected` when the conversation is over and everything was taken.
    pub(super) async fn receive_within(&self, patience: Duration) -> Result<Bytes, ErrorInfo> {
        let next = timeout(patience, self.next()).await;
        next.unwrap_or(Ok(NOTHING))
    }

    async fn next(&self) -> Result<Bytes, ErrorInfo> {
        let receiving = self.mailbox.receive();
        match receiving.batch().await {
            Batch::Frames(batch) => Ok(batch),
            Batch::Replaced => Ok(NOTHING),
            Batch::Over => Err(over()),
        }
    }

    /// Arrays of what waits, a line each, until the conversation is over or the client receives elsewhere.
    fn stream(&self) -> Result<Response<Body>, ErrorInfo> {
        let receiving = self.mailbox.receive();
        if self.mailbox.is_over() {
            return Err(over());
        }
        let lines = stream::unfold(receiving, |receiving| async move {
            let Batch::Frames(batch) = receiving.batch().await else {
                return None;
            };
            let mut line = BytesMut::from(&batch[..]);
            line.extend_from_slice(b"\n");
            Some((Ok::<_, std::convert::Infallible>(line.freeze()), receiving))
        });
        Ok(json(Body::from_stream(lines)))
    }
}

/// An array of frames, or lines of them.
pub(super) fn json(body: impl Into<Body>) -> Response<Body> {
    answer::body(StatusCode::OK, Format::Json, body.into())
}

fn over() -> ErrorInfo {
    ErrorInfo::new(ErrorCode::Disconnected, "the connection is over")
}

/// What a request found.
enum Batch {
    /// A JSON array of frames.
    Frames(Bytes),
    /// Another request took this one's place.
    Replaced,
    /// There is nothing and never will be.
    Over,
}

/// A request that takes what waits, for as long as it is held.
#[derive(Debug)]
struct Receiving {
    mailbox: Arc<Mailbox>,
    number: u64,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|err| err.into_inner())
    }

    /// Nothing waits and nothing will.
    fn is_over(&self) -> bool {
        let inner = self.lock();
        inner.closed && inner.frames.is_empty()
    }

    /// Ends whoever received before.
    fn receive(self: &Arc<Self>) -> Receiving {
        let number = {
            let mut inner = self.lock();
            inner.receiver += 1;
            inner.receiving = true;
            inner.receiver
        };
        self.filled.notify_waiters();
        self.taken.notify_waiters();
        Receiving {
            mailbox: self.clone(),
            number,
        }
    }

    /// Waits until the condition holds, which is looked at whenever `changed` is notified.
    async fn until<T>(&self, changed: &Notify, mut look: impl FnMut(&mut Inner) -> Option<T>) -> T {
        loop {
            let notified = changed.notified();
            tokio::pin!(notified);
            // Registered before looking, so that no change in between is missed.
            notified.as_mut().enable();
            let found = look(&mut self.lock());
            if let Some(found) = found {
                return found;
            }
            notified.await;
        }
    }
}

impl Mailbox {
    /// Waits until the client has not received for too long.
    async fn abandoned(&self) {
        loop {
            let idle = |inner: &mut Inner| (!inner.receiving).then_some(inner.idle_since);
            let since = self.until(&self.taken, idle).await;
            sleep_until(since + RECEIVE_PATIENCE).await;
            let still = idle(&mut self.lock());
            if still == Some(since) {
                return;
            }
        }
    }
}

impl Receiving {
    /// An array of what waits, as soon as something does.
    async fn batch(&self) -> Batch {
        let number = self.number;
        let found = self.mailbox.until(&self.mailbox.filled, |inner| {
            if inner.receiver != number {
                return Some(Err(Batch::Replaced));
            }
            if inner.frames.is_empty() {
                return inner.closed.then_some(Err(Batch::Over));
            }
            inner.bytes = 0;
            Some(Ok(std::mem::take(&mut inner.frames)))
        });
        let frames = match found.await {
            Ok(frames) => frames,
            Err(nothing) => return nothing,
        };
        self.mailbox.taken.notify_waiters();
        let mut array =
            BytesMut::with_capacity(frames.iter().map(|f| f.len() + 1).sum::<usize>() + 2);
        array.extend_from_slice(b"[");
        for (nth, frame) in frames.iter().enumerate() {
            if nth > 0 {
                array.extend_from_slice(b",");
            }
            array.extend_from_slice(frame);
        }
        array.extend_from_slice(b"]");
        Batch::Frames(array.freeze())
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        let mut inner = self.mailbox.lock();
        if inner.receiver == self.number {
            inner.receiving = false;
            inner.idle_since = Instant::now();
        }
        drop(inner);
        self.mailbox.taken.notify_waiters();
    }
}

impl Wire for CometWire {
    fn format(&self) -> Format {
        Format::Json
    }

    async fn receive(&mut self) -> Received {
        // Apart from each other, so that both can be waited for.
        let Self {
            incoming, mailbox, ..
        } = self;
        tokio::select! {
            frame = incoming.recv() => frame.map_or(Received::Gone, |frame| Received::Frame(Box::new(frame))),
            () = mailbox.abandoned() => Received::Gone,
        }
    }

    async fn send_bytes(&mut self, bytes: Bytes) -> Result<(), Gone> {
        // A request that waits was not told yet of what makes the mailbox full.
        if self.mailbox.lock().bytes >= WAITING_BYTES_MAX {
            self.mailbox.filled.notify_waiters();
        }
        let room = self.mailbox.until(&self.mailbox.taken, |inner| {
            (inner.bytes < WAITING_BYTES_MAX).then_some(())
        });
        timeout(WRITE_PATIENCE, room).await.map_err(|_| Gone)?;
        let mut inner = self.mailbox.lock();
        inner.bytes += bytes.len();
        inner.frames.push_back(bytes);
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Gone> {
        self.mailbox.filled.notify_waiters();
        Ok(())
    }

    async fn close(&mut self, _code: u16) {
        self.mailbox.lock().closed = true;
        self.mailbox.filled.notify_waiters();
        let emptied = self.mailbox.until(&self.mailbox.taken, |inner| {
            inner.frames.is_empty().then_some(())
        });
        // A client that takes no more has what it wanted.
        let _ = timeout(FAREWELL, emptied).await;
    }
}

impl Drop for CometWire {
    fn drop(&mut self) {
        self.mailbox.lock().closed = true;
        self.mailbox.filled.notify_waiters();
        let mut comets = self.comets.lock();
        let own = |ends: &Ends| Arc::ptr_eq(&ends.mailbox, &self.mailbox);
        if comets.get(&self.key).is_some_and(own) {
            comets.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests;
