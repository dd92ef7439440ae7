//! One client conversation over a WebSocket, without the socket: frames and results go in, effects come out.
//!
//! The owner of a [`Session`] reads frames, calls `handle_*` with the time, carries out every effect of
//! [`Session::poll_effect`] in order, and wakes it at [`Session::next_deadline`]. Nothing here waits.
//!
//! Invariants, checked after each step in debug builds: every frame with a `msgSerial` is answered once and in
//! the order of `msgSerial`s; at most one attach or detach per channel is under way; what is remembered is bounded by
//! [`Limits`], whatever the client sends; a closed session remembers nothing and has no effect.
//! Messages to subscribers are not seen here: the owner sends them for the channels that it was told to attach.

mod admission;
mod answers;
mod attachments;
mod params;

use std::collections::VecDeque;

pub use admission::{Admission, admit};
pub use answers::Ticket;
pub use attachments::{AttachOutcome, Continuity};
pub use params::ConnectParams;

use crate::auth::{Identity, Operation};
use crate::session::answers::{Accepted, Answers};
use crate::session::attachments::{Attachments, Wanted};
use crate::types::{ChannelName, ErrorCode, ErrorInfo, NodeId, Serial};
use crate::wire::ably::{Action, ConnectionDetails, DecodeError, ErrorBody, Frame, Message, flags};

/// What one connection may cost, and what its client is told about time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// All messages of one publish together.
    pub max_message_bytes: usize,
    /// One WebSocket frame; the owner's to enforce.
    pub max_frame_bytes: usize,
    pub max_channels: usize,
    /// A client hears something at least this often; 0: no heartbeats.
    pub idle_interval_ms: u64,
    pub connection_state_ttl_ms: u64,
    /// Publishes without an answer.
    pub max_inflight_publishes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_message_bytes: 65_536,
            max_frame_bytes: 524_288,
            max_channels: 200,
            idle_interval_ms: 15_000,
            connection_state_ttl_ms: 120_000,
            max_inflight_publishes: 256,
        }
    }
}

/// What the owner has to do, in the order given. Requests of different channels may be answered in any order.
#[derive(Clone, Debug, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "most effects are frames: boxing would cost each one an allocation"
)]
pub enum Effect {
    /// Write the frame.
    Send(Frame),
    /// Store the messages as one record, then [`Session::handle_published`]. Results may come in any order.
    Publish {
        ticket: Ticket,
        channel: ChannelName,
        /// Idempotency key: `connectionId:msgSerial`, or the base of the ids that the client chose.
        id: String,
        messages: Vec<Message>,
    },
    /// Follow the channel, then [`Session::handle_attached`] or [`Session::handle_attachment_failed`]. After
    /// `handle_attached` write no message of the channel before the ATTACHED it gives.
    Attach {
        channel: ChannelName,
        /// Continue after this serial; `None`: from the present.
        from: Option<Serial>,
        /// Whether the connection's own messages come back to it.
        echo: bool,
        /// Whether messages are wanted at all.
        subscribe: bool,
        /// The channel is attached already: keep its cursor, report it as `at`, change the rest.
        in_place: bool,
    },
    /// Stop following the channel and write no more messages of it, then [`Session::handle_detached`].
    Detach { channel: ChannelName },
    /// Write what is queued, then close the socket with this code and stop following every channel. The last
    /// effect of a session.
    Close { code: u16 },
}

/// WebSocket close codes.
const CLOSE_NORMAL: u16 = 1000;
const CLOSE_POLICY: u16 = 1008;

/// Who is talking, as the door found out before the first frame.
#[derive(Clone, Debug)]
pub struct Opening {
    pub params: ConnectParams,
    pub identity: Identity,
    pub limits: Limits,
    /// The resumed connection's, or a fresh one.
    pub connection_id: String,
    pub connection_key: String,
    /// Why the connection that the client wanted to resume is not this one.
    pub resume_failed: Option<ErrorInfo>,
    pub node: NodeId,
}

/// One conversation; see the module.
#[derive(Debug)]
pub struct Session {
    identity: Identity,
    limits: Limits,
    connection_id: String,
    echo: bool,
    attachments: Attachments,
    answers: Answers,
    effects: VecDeque<Effect>,
    sent_ms: u64,
    closed: bool,
}

/// The frame that refuses a whole connection. It names no channel: with one, only that channel would fail.
#[must_use]
pub fn refusal(error: &ErrorInfo) -> Frame {
    Frame {
        error: Some(ErrorBody::from(error)),
        ..Frame::new(Action::Error)
    }
}

impl Session {
    /// Begins with CONNECTED, or with an ERROR when the client's protocol version is not spoken here.
    #[must_use]
    pub fn new(opening: Opening, now_ms: u64) -> Self {
        let Opening {
            params,
            identity,
            limits,
            connection_id,
            ..
        } = opening;
        let mut session = Self {
            attachments: Attachments::new(limits.max_channels),
            answers: Answers::new(limits.max_inflight_publishes),
            identity,
            limits,
            connection_id,
            echo: params.echo,
            effects: VecDeque::new(),
            sent_ms: now_ms,
            closed: false,
        };
        match params.check_version() {
            Ok(()) => {
                let details = session.details(opening.connection_key, opening.node);
                let connected = Frame {
                    connection_id: Some(session.connection_id.clone()),
                    connection_details: Some(details),
                    error: opening.resume_failed.map(ErrorBody::from),
                    ..Frame::new(Action::Connected)
                };
                session.send(connected, now_ms);
            }
            Err(error) => session.fail(&error, now_ms),
        }
        session.checked()
    }

    fn details(&self, connection_key: String, node: NodeId) -> ConnectionDetails {
        let bytes = |n: usize| u64::try_from(n).ok();
        ConnectionDetails {
            client_id: self.identity.client_id.as_str().map(str::to_owned),
            connection_key: Some(connection_key),
            max_message_size: bytes(self.limits.max_message_bytes),
            max_frame_size: bytes(self.limits.max_frame_bytes),
            max_inbound_rate: None,
            connection_state_ttl: Some(self.limits.connection_state_ttl_ms),
            max_idle_interval: Some(self.limits.idle_interval_ms),
            server_id: Some(node.to_string()),
        }
    }

    #[must_use]
    pub fn connection_id(&self) -> &str {
        &self.connection_id
    }

    /// Whether [`Effect::Close`] was given; from then on every input is ignored.
    #[must_use]
    pub const fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether another publish would be taken up. An owner that reads no frame while this is `false` slows its client
    /// down instead of having it refused.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.answers.has_room()
    }

    /// The next thing to do. Drain it after every `handle_*`.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Session::handle_tick`] wants to be called, in the caller's milliseconds.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        // A tenth early, so that a heartbeat leaves within the interval even when timers are late.
        let interval = self.limits.idle_interval_ms;
        let ticking = !self.closed && interval > 0;
        ticking.then(|| self.sent_ms.saturating_add(interval - interval / 10))
    }

    /// A frame from the client.
    pub fn handle_frame(&mut self, frame: Frame, now_ms: u64) {
        if self.closed {
            return;
        }
        match frame.action {
            Action::Heartbeat => {
                let reply = Frame {
                    id: frame.id,
                    ..Frame::new(Action::Heartbeat)
                };
                self.send(reply, now_ms);
            }
            Action::Attach => self.on_attach(&frame, now_ms),
            Action::Detach => self.on_detach(&frame, now_ms),
            Action::Message | Action::Presence | Action::Annotation | Action::Object => {
                self.on_numbered(frame, now_ms);
            }
            Action::Close => {
                self.send(Frame::new(Action::Closed), now_ms);
                self.close(CLOSE_NORMAL);
            }
            Action::Disconnect => self.close(CLOSE_NORMAL),
            Action::Auth => {
                let text = "authenticating again is not supported by this server yet";
                self.fail(&ErrorInfo::new(ErrorCode::InvalidCredentials, text), now_ms);
            }
            Action::Unknown(-1) => self.fail_bad("frame has no action", now_ms),
            Action::Unknown(n) => self.fail_bad(&format!("frame has unknown action {n}"), now_ms),
            // Frames that only a server sends, and SYNC, with which old clients ask for a presence set.
            Action::Ack
            | Action::Nack
            | Action::Connect
            | Action::Connected
            | Action::Disconnected
            | Action::Closed
            | Action::Error
            | Action::Attached
            | Action::Detached
            | Action::Sync
            | Action::Activate
            | Action::ObjectSync => {}
        }
        self.check_invariants();
    }

    /// Bytes from the client that are no frame: the conversation is over, for what they meant is lost.
    pub fn handle_undecodable(&mut self, error: DecodeError, now_ms: u64) {
        if !self.closed {
            self.fail(&error.into(), now_ms);
            self.check_invariants();
        }
    }

    /// The client began a frame beyond [`Limits::max_frame_bytes`]; nothing after it can be read.
    pub fn handle_too_large(&mut self, now_ms: u64) {
        if !self.closed {
            let what = format!(
                "a frame is larger than {} bytes",
                self.limits.max_frame_bytes
            );
            self.fail(&ErrorInfo::new(ErrorCode::MessageTooLarge, what), now_ms);
            self.check_invariants();
        }
    }

    /// The outcome of an [`Effect::Publish`]: the serial of the record that holds the messages, the first
    /// one if this was a repetition.
    pub fn handle_published(
        &mut self,
        ticket: Ticket,
        outcome: Result<Serial, ErrorInfo>,
        now_ms: u64,
    ) {
        if !self.closed {
            self.answers.resolve(ticket, outcome);
            self.send_answers(now_ms);
            self.check_invariants();
        }
    }

    /// The owner follows the channel as an [`Effect::Attach`] asked.
    pub fn handle_attached(&mut self, channel: &ChannelName, outcome: AttachOutcome, now_ms: u64) {
        let reply = self.attachments.on_attached(channel, outcome);
        self.apply(reply, now_ms);
    }

    /// The owner cannot follow the channel, or no longer. When the error may pass, the client is told to try
    /// again; else the channel has failed for it.
    pub fn handle_attachment_failed(
        &mut self,
        channel: &ChannelName,
        error: &ErrorInfo,
        now_ms: u64,
    ) {
        let reply = self.attachments.on_failed(channel, error);
        self.apply(reply, now_ms);
    }

    /// The owner follows the channel no longer, because it was asked to or by itself.
    pub fn handle_detached(&mut self, channel: &ChannelName, now_ms: u64) {
        let reply = self.attachments.on_detached(channel);
        self.apply(reply, now_ms);
    }

    /// The owner had to skip messages of an attached channel and goes on after `at`: tells the client.
    pub fn handle_discontinuity(
        &mut self,
        channel: &ChannelName,
        at: Serial,
        error: &ErrorInfo,
        now_ms: u64,
    ) {
        let reply = self.attachments.on_discontinuity(channel, at, error);
        self.apply(reply, now_ms);
    }

    /// Time passed: sends a heartbeat when it is due.
    pub fn handle_tick(&mut self, now_ms: u64) {
        if self
            .next_deadline()
            .is_some_and(|deadline| deadline <= now_ms)
        {
            self.send(Frame::new(Action::Heartbeat), now_ms);
        }
        self.check_invariants();
    }

    /// The node is stopping: sends the client to another.
    pub fn handle_drain(&mut self, now_ms: u64) {
        if self.closed {
            return;
        }
        let frame = Frame {
            error: Some(ErrorInfo::from(ErrorCode::Draining).into()),
            ..Frame::new(Action::Disconnected)
        };
        self.send(frame, now_ms);
        self.close(CLOSE_NORMAL);
        self.check_invariants();
    }

    /// The owner wrote something by itself, so the client needs no heartbeat for a while.
    pub fn handle_sent(&mut self, now_ms: u64) {
        self.sent_ms = self.sent_ms.max(now_ms);
    }

    /// Asserts what the module promises.
    ///
    /// # Panics
    /// In debug builds, when a promise is broken, which no input may bring about.
    pub fn check_invariants(&self) {
        if cfg!(debug_assertions) {
            self.attachments.check_invariants();
            self.answers.check_invariants();
            assert!(!self.closed || self.attachments.is_empty() && self.answers.is_empty());
        }
    }

    fn checked(self) -> Self {
        self.check_invariants();
        self
    }

    fn on_attach(&mut self, frame: &Frame, now_ms: u64) {
        let Some(text) = &frame.channel else {
            return self.fail_bad("ATTACH names no channel", now_ms);
        };
        let name = channel_name(text);
        let wanted = name.and_then(|name| {
            let wanted = Wanted::of_frame(frame, &name, &self.identity.capability, self.echo)?;
            Ok((name, wanted))
        });
        let reply = match wanted {
            Ok((name, wanted)) => self.attachments.on_attach(name, wanted),
            Err(error) => self.attachments.on_refused(text, &error),
        };
        self.apply(reply, now_ms);
    }

    fn on_detach(&mut self, frame: &Frame, now_ms: u64) {
        let Some(text) = &frame.channel else {
            return self.fail_bad("DETACH names no channel", now_ms);
        };
        let reply = self.attachments.on_detach(text);
        self.apply(reply, now_ms);
    }

    /// A frame that the client numbered, so that it must be answered in its turn.
    fn on_numbered(&mut self, frame: Frame, now_ms: u64) {
        let Some(msg_serial) = frame.msg_serial else {
            return self.fail_bad("frame needs a msgSerial to be answered", now_ms);
        };
        match self.answers.accept(msg_serial) {
            Accepted::Open(ticket) => match self.publish(frame, msg_serial, ticket) {
                Ok((count, publish)) => {
                    self.answers.expect(ticket, count);
                    self.effects.push_back(publish);
                }
                Err(error) => self.answers.resolve(ticket, Err(error)),
            },
            Accepted::Repeated | Accepted::Refused => {}
            Accepted::Flood => {
                let text = "too many unanswered publishes, even after being refused";
                self.fail(&ErrorInfo::new(ErrorCode::ConnectionFlooded, text), now_ms);
                return;
            }
        }
        self.send_answers(now_ms);
    }

    /// Checks a publish and makes its effect, with the number of its messages.
    fn publish(
        &self,
        frame: Frame,
        msg_serial: u64,
        ticket: Ticket,
    ) -> Result<(u16, Effect), ErrorInfo> {
        let unsupported = |what| Err(ErrorInfo::new(ErrorCode::BadRequest, what));
        match frame.action {
            Action::Presence => return Err(ErrorCode::PresenceUnsupported.into()),
            Action::Annotation => {
                return unsupported("annotations are not supported by this server yet");
            }
            Action::Object => return unsupported("objects are not supported by this server yet"),
            _ => {}
        }
        if frame
            .params
            .get("_forceNack")
            .is_some_and(|value| value == "true")
        {
            return Err(ErrorCode::ForcedNack.into());
        }
        let channel = channel_name(frame.channel.as_deref().unwrap_or_default())?;
        if !self
            .identity
            .capability
            .allows(Operation::Publish, &channel)
        {
            let text = format!("no permission to publish on `{channel}`");
            return Err(ErrorInfo::new(ErrorCode::CapabilityDenied, text));
        }
        if self
            .attachments
            .modes(&channel)
            .is_some_and(|modes| modes & flags::PUBLISH == 0)
        {
            return Err(ErrorCode::ModeDenied.into());
        }
        let admission = admit(
            frame.messages,
            &self.identity.client_id,
            self.limits.max_message_bytes,
        )?;
        let id = admission
            .base_id
            .unwrap_or_else(|| format!("{}:{msg_serial}", self.connection_id));
        let messages = admission.messages;
        Ok((
            admission.count,
            Effect::Publish {
                ticket,
                channel,
                id,
                messages,
            },
        ))
    }

    fn send_answers(&mut self, now_ms: u64) {
        while let Some(frame) = self.answers.poll_frame() {
            self.send(frame, now_ms);
        }
    }

    fn apply(&mut self, effects: Vec<Effect>, now_ms: u64) {
        if self.closed {
            return;
        }
        for effect in effects {
            match effect {
                Effect::Send(frame) => self.send(frame, now_ms),
                other => self.effects.push_back(other),
            }
        }
        self.check_invariants();
    }

    fn send(&mut self, frame: Frame, now_ms: u64) {
        self.handle_sent(now_ms);
        self.effects.push_back(Effect::Send(frame));
    }

    fn fail_bad(&mut self, what: &str, now_ms: u64) {
        self.fail(&ErrorInfo::new(ErrorCode::BadRequest, what), now_ms);
    }

    /// Ends the conversation for good: the client will not come back by itself.
    fn fail(&mut self, error: &ErrorInfo, now_ms: u64) {
        self.send(refusal(error), now_ms);
        self.close(CLOSE_POLICY);
    }

    fn close(&mut self, code: u16) {
        self.closed = true;
        self.attachments.clear();
        self.answers.clear();
        self.effects.push_back(Effect::Close { code });
    }
}

/// The channel that a client names.
///
/// # Errors
/// `InvalidChannelName`, with a text of its own for qualifiers (`[?rewind=1]name`).
fn channel_name(text: &str) -> Result<ChannelName, ErrorInfo> {
    let invalid = |what: String| ErrorInfo::new(ErrorCode::InvalidChannelName, what);
    if text.starts_with('[') {
        return Err(invalid(
            "channel qualifiers in brackets are not supported by this server yet".into(),
        ));
    }
    ChannelName::parse(text).map_err(|e| invalid(e.to_string()))
}

#[cfg(test)]
mod tests;
