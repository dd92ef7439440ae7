//! One conversation with a server, without its sockets: what is attached, what is not acknowledged yet, and what
//! must be said again after a reconnect.
//!
//! Invariants: `unacked` is in the order of `msg_serial` without gaps, and the next publish follows the last; a
//! publish leaves it by exactly one answer; each attachment holds the serial of the last frame that was handed
//! out, so that re-attaching repeats and skips nothing.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use crate::client::Error;
use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::{Action, Frame, Message, flags};

/// What happens on a connection, in the order in which it happened.
#[derive(Clone, Debug)]
pub enum Event {
    Connected {
        /// The connection is the one from before: publishes without answer keep their numbers.
        resumed: bool,
    },
    Disconnected {
        reason: String,
    },
    Attached {
        channel: String,
        /// Nothing was missed since the serial that was asked for.
        resumed: bool,
        error: Option<ErrorInfo>,
    },
    Messages(Messages),
    ChannelFailed {
        channel: String,
        error: ErrorInfo,
    },
    /// The last event: nothing brings the connection back.
    Failed(Error),
}

/// The messages of one frame, complete with what they inherit from it.
#[derive(Clone, Debug)]
pub struct Messages {
    pub channel: String,
    pub serial: Option<String>,
    pub messages: Vec<Message>,
    /// When the frame was read.
    pub received: Instant,
}

/// The answer to a publish.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The serials given to the messages, or why there are none.
    pub outcome: Result<Vec<Option<String>>, ErrorInfo>,
    /// When the answer was read.
    pub received: Instant,
}

/// A publish to send; `room` is given back with its answer.
#[derive(Debug)]
pub(super) struct Publish {
    pub(super) channel: String,
    pub(super) messages: Vec<Message>,
    pub(super) answer_tx: oneshot::Sender<Answer>,
    pub(super) room: OwnedSemaphorePermit,
}

/// A channel to attach to, and whom to tell.
#[derive(Debug)]
pub(super) struct Attach {
    pub(super) channel: String,
    pub(super) serial: Option<String>,
    pub(super) params: BTreeMap<String, String>,
    pub(super) attached_tx: oneshot::Sender<Result<(), ErrorInfo>>,
}

/// Why the present socket is of no further use.
#[derive(Clone, Debug)]
pub(super) enum Fate {
    /// Connect again and resume.
    Reconnect(String),
    /// The server said goodbye, as asked.
    Closed,
    /// Nothing helps.
    Failed(Error),
}

struct Unacked {
    msg_serial: u64,
    frame: Frame,
    answer_tx: oneshot::Sender<Answer>,
    _room: OwnedSemaphorePermit,
}

#[derive(Default)]
struct Attachment {
    serial: Option<String>,
    params: BTreeMap<String, String>,
    attached: bool,
    attached_tx: Option<oneshot::Sender<Result<(), ErrorInfo>>>,
}

/// The state of a conversation. Frames to send gather in `out`, events in `events`.
#[derive(Default)]
pub(super) struct Conversation {
    connection_id: Option<String>,
    connection_key: Option<String>,
    /// Longest silence that the server promised, once it did.
    idle: Option<Duration>,
    live: bool,
    next_msg_serial: u64,
    unacked: VecDeque<Unacked>,
    attachments: BTreeMap<String, Attachment>,
    pub(super) out: VecDeque<Frame>,
    pub(super) events: VecDeque<Event>,
}

impl Conversation {
    /// What to ask a new socket to resume.
    pub(super) fn resume_key(&self) -> Option<&str> {
        self.connection_key.as_deref()
    }

    /// Longest silence that the server promised; zero when it promised none.
    pub(super) fn idle(&self) -> Option<Duration> {
        self.idle.filter(|idle| !idle.is_zero())
    }

    /// Whether the socket has been greeted by CONNECTED.
    pub(super) fn is_live(&self) -> bool {
        self.live
    }

    pub(super) fn on_publish(&mut self, publish: Publish) {
        let msg_serial = self.next_msg_serial;
        self.next_msg_serial += 1;
        let frame = Frame {
            messages: publish.messages,
            msg_serial: Some(msg_serial),
            ..Frame::of_channel(Action::Message, publish.channel)
        };
        if self.live {
            self.out.push_back(frame.clone());
        }
        self.unacked.push_back(Unacked {
            msg_serial,
            frame,
            answer_tx: publish.answer_tx,
            _room: publish.room,
        });
    }

    pub(super) fn on_attach(&mut self, attach: Attach) {
        let attachment = Attachment {
            serial: attach.serial,
            params: attach.params,
            attached: false,
            attached_tx: Some(attach.attached_tx),
        };
        if self.live {
            self.out.push_back(attachment.frame(&attach.channel));
        }
        self.attachments.insert(attach.channel, attachment);
    }

    /// The socket is gone.
    pub(super) fn on_lost(&mut self, reason: String) {
        self.out.clear();
        for attachment in self.attachments.values_mut() {
            attachment.attached = false;
        }
        if std::mem::take(&mut self.live) {
            self.events.push_back(Event::Disconnected { reason });
        }
    }

    /// Nothing brings the connection back: everybody who waits is told.
    pub(super) fn on_failed(&mut self, error: Error) {
        let info = match &error {
            Error::Refused(info) => info.clone(),
            other => ErrorInfo::new(ErrorCode::Disconnected, other.to_string()),
        };
        for unacked in self.unacked.drain(..) {
            unacked.answer(Err(info.clone()), Instant::now());
        }
        for attachment in self.attachments.values_mut() {
            attachment.tell(Err(info.clone()));
        }
        self.live = false;
        self.events.push_back(Event::Failed(error));
    }

    /// # Errors
    /// When the socket is of no further use after this frame.
    pub(super) fn on_frame(&mut self, frame: Frame, now: Instant) -> Result<(), Fate> {
        match frame.action {
            Action::Connected => self.on_connected(frame),
            Action::Ack => self.on_ack(&frame, now)?,
            Action::Nack => self.on_nack(&frame, now)?,
            Action::Attached => self.on_attached(frame),
            Action::Detached => self.on_detached(&frame)?,
            Action::Message => self.on_messages(frame, now),
            Action::Error if frame.channel.is_some() => self.on_channel_error(&frame),
            Action::Error => return Err(Fate::Failed(Error::Refused(error_of(&frame)))),
            Action::Disconnected => return Err(Fate::Reconnect(error_of(&frame).to_string())),
            Action::Closed => return Err(Fate::Closed),
            // Presence, heartbeats and whatever comes later mean only that the server lives.
            _ => {}
        }
        Ok(())
    }

    fn on_connected(&mut self, frame: Frame) {
        let details = frame.connection_details.unwrap_or_default();
        self.connection_key = details.connection_key.or(self.connection_key.take());
        self.idle = details.max_idle_interval.map(Duration::from_millis);
        if self.live {
            // News about the connection, as after re-authentication.
            return;
        }
        let resumed = self.connection_id.is_some() && self.connection_id == frame.connection_id;
        self.connection_id = frame.connection_id;
        if !resumed {
            // A new connection counts from 0; the order stays.
            for (msg_serial, unacked) in (0..).zip(&mut self.unacked) {
                unacked.msg_serial = msg_serial;
                unacked.frame.msg_serial = Some(msg_serial);
                self.next_msg_serial = msg_serial + 1;
            }
            if self.unacked.is_empty() {
                self.next_msg_serial = 0;
            }
        }
        self.live = true;
        self.events.push_back(Event::Connected { resumed });
        let attach = |(channel, attachment): (&String, &Attachment)| attachment.frame(channel);
        self.out.extend(self.attachments.iter().map(attach));
        self.out
            .extend(self.unacked.iter().map(|u| u.frame.clone()));
    }

    fn on_ack(&mut self, frame: &Frame, now: Instant) -> Result<(), Fate> {
        let answered = self.take_answered(frame, now)?;
        // What was answered before a resume may be answered again; the new ones are the last of the range.
        let known = frame.res.len().saturating_sub(answered.len());
        for (result, unacked) in (known..).zip(answered) {
            let serials = frame.res.get(result).map(|result| result.serials.clone());
            unacked.answer(Ok(serials.unwrap_or_default()), now);
        }
        Ok(())
    }

    fn on_nack(&mut self, frame: &Frame, now: Instant) -> Result<(), Fate> {
        for unacked in self.take_answered(frame, now)? {
            unacked.answer(Err(error_of(frame)), now);
        }
        Ok(())
    }

    /// Takes what an ACK or NACK answers. An answer that skips publishes means that those were not taken.
    fn take_answered(&mut self, frame: &Frame, now: Instant) -> Result<Vec<Unacked>, Fate> {
        let first = frame.msg_serial.unwrap_or_default();
        let end = first.saturating_add(frame.count.unwrap_or(1));
        if end > self.next_msg_serial {
            let what = format!(
                "the server answered publish {} of {}",
                end - 1,
                self.next_msg_serial
            );
            return Err(Fate::Failed(Error::Protocol(what)));
        }
        let mut answered = Vec::new();
        while let Some(unacked) = self
            .unacked
            .pop_front_if(|unacked| unacked.msg_serial < end)
        {
            if unacked.msg_serial >= first {
                answered.push(unacked);
            } else {
                let info = ErrorInfo::new(
                    ErrorCode::Internal,
                    "the server answered a later publish first",
                );
                unacked.answer(Err(info), now);
            }
        }
        Ok(answered)
    }

    fn on_attached(&mut self, frame: Frame) {
        let Some((channel, attachment)) = frame.channel.and_then(|channel| {
            let attachment = self.attachments.get_mut(&channel)?;
            Some((channel, attachment))
        }) else {
            return;
        };
        attachment.serial = frame.channel_serial.or(attachment.serial.take());
        attachment.attached = true;
        attachment.tell(Ok(()));
        self.events.push_back(Event::Attached {
            channel,
            resumed: frame.flags.unwrap_or_default() & flags::RESUMED != 0,
            error: frame.error.as_ref().map(ErrorInfo::from),
        });
    }

    /// The server asks to attach again; when it does so at once again, a new connection helps rather than a loop.
    fn on_detached(&mut self, frame: &Frame) -> Result<(), Fate> {
        let Some(channel) = &frame.channel else {
            return Ok(());
        };
        if let Some(attachment) = self.attachments.get_mut(channel) {
            if !std::mem::take(&mut attachment.attached) {
                return Err(Fate::Reconnect(error_of(frame).to_string()));
            }
            self.out.push_back(attachment.frame(channel));
        }
        Ok(())
    }

    fn on_messages(&mut self, frame: Frame, received: Instant) {
        let Some(channel) = frame.channel else { return };
        let Some(attachment) = self.attachments.get_mut(&channel) else {
            return;
        };
        let mut messages = frame.messages;
        for (index, message) in messages.iter_mut().enumerate() {
            if message.id.is_none() {
                message.id = frame.id.as_ref().map(|id| format!("{id}:{index}"));
            }
            if message.connection_id.is_none() {
                message.connection_id.clone_from(&frame.connection_id);
            }
            message.timestamp = message.timestamp.or(frame.timestamp);
        }
        if frame.channel_serial.is_some() {
            attachment.serial.clone_from(&frame.channel_serial);
        }
        self.events.push_back(Event::Messages(Messages {
            channel,
            serial: frame.channel_serial,
            messages,
            received,
        }));
    }

    fn on_channel_error(&mut self, frame: &Frame) {
        let error = error_of(frame);
        let Some(channel) = &frame.channel else {
            return;
        };
        if let Some(mut attachment) = self.attachments.remove(channel) {
            attachment.tell(Err(error.clone()));
        }
        let channel = channel.clone();
        self.events
            .push_back(Event::ChannelFailed { channel, error });
    }
}

impl Attachment {
    fn frame(&self, channel: &str) -> Frame {
        Frame {
            channel_serial: self.serial.clone(),
            params: self.params.clone(),
            ..Frame::of_channel(Action::Attach, channel)
        }
    }

    fn tell(&mut self, outcome: Result<(), ErrorInfo>) {
        if let Some(attached_tx) = self.attached_tx.take() {
            // The caller may have stopped waiting.
            let _ = attached_tx.send(outcome);
        }
    }
}

impl Unacked {
    fn answer(self, outcome: Result<Vec<Option<String>>, ErrorInfo>, received: Instant) {
        // The publisher may not care.
        let _ = self.answer_tx.send(Answer { outcome, received });
    }
}

fn error_of(frame: &Frame) -> ErrorInfo {
    (frame.error.as_ref()).map_or_else(|| ErrorCode::Disconnected.into(), ErrorInfo::from)
}
