//! One client conversation over a WebSocket, without the socket: frames and results go in, effects come out.
//!
//! The owner of a [`Session`] reads frames, calls `handle_*` with the time, carries out every effect of
//! [`Session::poll_effect`] in order, and wakes it at [`Session::next_deadline`]. Nothing here waits. Times are milliseconds
//! since 1970 of a clock that does not go back: the one by which tokens are judged.
//!
//! Invariants, checked after each step in debug builds: every frame with a `msgSerial` is answered once and in
//! the order of `msgSerial`s; at most one attach or detach per channel is under way; what is remembered is bounded by
//! [`Limits`], whatever the client sends; a closed session has nothing more to do, and remembers only whom to let go.
//! Messages to subscribers are not seen here: the owner sends them, as [`Session::delivery`] says.

mod admission;
mod answers;
mod attachments;
mod credential;
mod effect;
mod extras;
mod numbered;
mod own;
mod params;
mod presence;
mod qualified;
mod sync;
mod wanted;

use std::collections::VecDeque;

pub use admission::{Admission, admit, take_connection_key};
pub use answers::Ticket;
pub use effect::{AttachOutcome, Content, Continuity, Delivery, Effect, Start};
pub use params::ConnectParams;
pub use qualified::QualifiedName;
pub use wanted::Occupancy;

use crate::auth::{Identity, Secret};
use crate::session::answers::Answers;
use crate::session::attachments::Attachments;
use crate::session::credential::{Credential, Due, succeed};
use crate::session::presence::Presence;
use crate::session::wanted::Wanted;
use crate::types::{ChannelName, ErrorCode, ErrorInfo, NodeId, Retry, Serial};
use crate::wire::ably::{
    Action, ConnectionDetails, DecodeError, ErrorBody, Frame, PresenceMessage,
};

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
    /// Presence members of this connection on one channel.
    pub max_members: usize,
    /// Memory for all presence members of this connection.
    pub max_member_bytes: usize,
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
            max_members: 250,
            max_member_bytes: 2 << 20,
        }
    }
}

/// How long presence members stay after their connection's socket is gone, unless the client says otherwise.
const REMAIN_PRESENT_MS: u64 = 15_000;

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
    /// Whether the connection is older than this session.
    pub resumed: bool,
    /// Why the connection that the client wanted to resume is not this one.
    pub resume_failed: Option<ErrorInfo>,
    pub node: NodeId,
}

/// When this connection's presence members leave once the session is over.
enum Leave {
    /// The connection is over.
    Now,
    /// The client may come back.
    AfterGrace,
    /// The connection goes on elsewhere.
    Not,
}

/// One conversation; see the module.
#[derive(Debug)]
pub struct Session {
    identity: Identity,
    limits: Limits,
    connection_id: String,
    connection_key: String,
    node: NodeId,
    echo: bool,
    remain_present_for_ms: u64,
    attachments: Attachments,
    presence: Presence,
    credential: Credential,
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
        let remain = params.remain_present_for_ms.unwrap_or(REMAIN_PRESENT_MS);
        let mut session = Self {
            attachments: Attachments::new(limits.max_channels),
            presence: Presence::new(&connection_id, opening.resumed, &limits, now_ms),
            credential: Credential::new(identity.token.as_ref(), now_ms),
            answers: Answers::new(limits.max_inflight_publishes),
            // Longer than the connection's own state nobody stays.
            remain_present_for_ms: remain.min(limits.connection_state_ttl_ms),
            identity,
            limits,
            connection_id,
            connection_key: opening.connection_key,
            node: opening.node,
            echo: params.echo,
            effects: VecDeque::new(),
            sent_ms: now_ms,
            closed: false,
        };
        match params.check_version() {
            Ok(()) => session.send_connected(opening.resume_failed, now_ms),
            Err(error) => session.fail(&error, now_ms),
        }
        session.check_invariants();
        session
    }

    fn send_connected(&mut self, error: Option<ErrorInfo>, now_ms: u64) {
        let bytes = |n: usize| u64::try_from(n).ok();
        let details = ConnectionDetails {
            client_id: self.identity.client_id.as_str().map(str::to_owned),
            connection_key: Some(self.connection_key.clone()),
            max_message_size: bytes(self.limits.max_message_bytes),
            max_frame_size: bytes(self.limits.max_frame_bytes),
            connection_state_ttl: Some(self.limits.connection_state_ttl_ms),
            max_idle_interval: Some(self.limits.idle_interval_ms),
            server_id: Some(self.node.to_string()),
            ..ConnectionDetails::default()
        };
        let connected = Frame {
            connection_id: Some(self.connection_id.clone()),
            connection_details: Some(details),
            error: error.map(ErrorBody::from),
            ..Frame::new(Action::Connected)
        };
        self.send(connected, now_ms);
    }

    #[must_use]
    pub fn connection_id(&self) -> &str {
        &self.connection_id
    }

    /// Who the client is now; it may change with [`Session::handle_authenticated`].
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.identity
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

    /// What of an attached channel is to be written now, and under which name; `None`: nothing. It changes with requests of
    /// the client and with its capability, so it is to be asked anew for each batch of records.
    #[must_use]
    pub fn delivery(&self, channel: &ChannelName) -> Option<Delivery<'_>> {
        self.attachments.delivery(channel)
    }

    /// How long this connection's members stay after [`Session::handle_gone`].
    #[must_use]
    pub const fn remain_present_for_ms(&self) -> u64 {
        self.remain_present_for_ms
    }

    /// The next thing to do. Drain it after every `handle_*`.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When [`Session::handle_tick`] wants to be called, in the caller's milliseconds.
    #[must_use]
    pub fn next_deadline(&self) -> Option<u64> {
        if self.closed {
            return None;
        }
        let deadlines = [
            self.heartbeat_at(),
            self.credential.deadline(),
            self.presence.deadline(),
        ];
        deadlines.into_iter().flatten().min()
    }

    fn heartbeat_at(&self) -> Option<u64> {
        // A tenth early, so that a heartbeat leaves within the interval even when timers are late.
        let interval = self.limits.idle_interval_ms;
        (interval > 0).then(|| self.sent_ms.saturating_add(interval - interval / 10))
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
            Action::Sync => self.on_sync(&frame, now_ms),
            Action::Close => self.close(
                Some(Frame::new(Action::Closed)),
                CLOSE_NORMAL,
                Leave::Now,
                now_ms,
            ),
            Action::Disconnect => self.close(None, CLOSE_NORMAL, Leave::AfterGrace, now_ms),
            Action::Auth => self.on_auth(frame, now_ms),
            Action::Unknown(-1) => self.fail_bad("frame has no action", now_ms),
            Action::Unknown(n) => self.fail_bad(&format!("frame has unknown action {n}"), now_ms),
            // Frames that only a server sends.
            Action::Ack
            | Action::Nack
            | Action::Connect
            | Action::Connected
            | Action::Disconnected
            | Action::Closed
            | Action::Error
            | Action::Attached
            | Action::Detached
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

    /// The outcome of an [`Effect::Publish`]: the serial of the record that holds the content, the first
    /// one if this was a repetition; `None` when there was nothing to change and so no record.
    pub fn handle_published(
        &mut self,
        ticket: Ticket,
        outcome: Result<Option<Serial>, ErrorInfo>,
        now_ms: u64,
    ) {
        if !self.closed {
            self.presence.settle(ticket, &outcome, now_ms);
            self.answers.resolve(ticket, outcome);
            self.send_answers(now_ms);
            self.check_invariants();
        }
    }

    /// The owner follows the channel as an [`Effect::Attach`] asked.
    pub fn handle_attached(&mut self, channel: &ChannelName, outcome: AttachOutcome, now_ms: u64) {
        if self.closed {
            return;
        }
        let presence = &mut self.presence;
        let reply = self
            .attachments
            .on_attached(channel, outcome, presence, now_ms);
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
        let reply = self
            .attachments
            .on_failed(channel, error, &mut self.presence);
        self.apply(reply, now_ms);
    }

    /// The owner follows the channel no longer, because it was asked to or by itself.
    pub fn handle_detached(&mut self, channel: &ChannelName, now_ms: u64) {
        let reply = self.attachments.on_detached(channel, &mut self.presence);
        self.apply(reply, now_ms);
    }

    /// The owner had to skip records of an attached channel and goes on after `at`; `members` are as of then. Tells the client.
    /// Own members whose leaving was among what was skipped are entered again.
    pub fn handle_discontinuity(
        &mut self,
        channel: &ChannelName,
        at: Serial,
        members: Vec<PresenceMessage>,
        error: &ErrorInfo,
        now_ms: u64,
    ) {
        let missing = self.presence.reconcile(channel, &members);
        let reply = self
            .attachments
            .on_discontinuity(channel, at, members, error, now_ms);
        self.apply(reply, now_ms);
        if missing && !self.closed {
            self.enter_again(channel.clone());
            self.check_invariants();
        }
    }

    /// What an [`Effect::Members`] asked for.
    pub fn handle_members(
        &mut self,
        channel: &ChannelName,
        members: Result<Vec<PresenceMessage>, ErrorInfo>,
        now_ms: u64,
    ) {
        let reply = self.attachments.on_members(channel, members.ok(), now_ms);
        self.apply(reply, now_ms);
    }

    /// One of this connection's own members was removed by somebody else, who believed that nobody attends it: it is entered
    /// again, without the client's asking and without an answer to it.
    pub fn handle_member_left(&mut self, channel: &ChannelName, client_id: &str, now_ms: u64) {
        if !self.closed && self.presence.removed(channel, client_id) {
            self.enter_again(channel.clone());
            self.check_invariants();
        }
        self.handle_tick(now_ms);
    }

    /// A presence publish of this connection was stored before, and what came since may have undone it: `members` are those
    /// of the channel now. Own ones that are missing are entered again, as in [`Session::handle_member_left`].
    pub fn handle_repeated(
        &mut self,
        channel: &ChannelName,
        members: &[PresenceMessage],
        now_ms: u64,
    ) {
        if !self.closed && self.presence.reconcile(channel, members) {
            self.enter_again(channel.clone());
            self.check_invariants();
        }
        self.handle_tick(now_ms);
    }

    /// What became of the token of an [`Effect::Authenticate`]: who the client is now, or why it is not believed.
    pub fn handle_authenticated(&mut self, outcome: Result<Identity, ErrorInfo>, now_ms: u64) {
        if self.closed {
            return;
        }
        match self.credential.checked() {
            Ok(()) => {}
            Err(next) => {
                let next = next.map(|token| Effect::Authenticate { token });
                self.effects.extend(next);
                return;
            }
        }
        match outcome.and_then(|identity| succeed(&self.identity, identity)) {
            Ok(identity) => {
                self.credential.accept(identity.token.as_ref(), now_ms);
                self.identity = identity;
                self.send_connected(None, now_ms);
                let capability = &self.identity.capability;
                let effects = self
                    .attachments
                    .on_capability(capability, &mut self.presence);
                self.apply(effects, now_ms);
            }
            Err(error) => self.on_not_authenticated(error, now_ms),
        }
        self.check_invariants();
    }

    fn on_not_authenticated(&mut self, error: ErrorInfo, now_ms: u64) {
        match error.code.retry() {
            // It may be the node's fault: the client comes back with its token and is judged anew.
            Retry::Later | Retry::Unknown => self.disconnect(error, now_ms),
            // A token error would send the client for a token again and again.
            Retry::WithNewToken => {
                let error = ErrorInfo::new(ErrorCode::InvalidCredentials, error.message);
                self.fail(&error, now_ms);
            }
            Retry::Never => self.fail(&error, now_ms),
        }
    }

    /// The client's credential was revoked: it may come back with another.
    pub fn handle_revoked(&mut self, now_ms: u64) {
        if !self.closed {
            self.disconnect(ErrorCode::TokenRevoked.into(), now_ms);
            self.check_invariants();
        }
    }

    /// The client's credential will be revoked at `at_ms`: asks it for another until then. To be told again after each
    /// [`Session::handle_authenticated`] for which it still holds.
    pub fn handle_revocation_at(&mut self, at_ms: u64, now_ms: u64) {
        if !self.closed {
            if self.credential.revoke_at(at_ms) {
                self.send(Frame::new(Action::Auth), now_ms);
            }
            self.handle_tick(now_ms);
        }
    }

    /// Another socket has the connection now, and its members: ends this one without a word.
    pub fn handle_taken_over(&mut self, now_ms: u64) {
        if !self.closed {
            self.close(None, CLOSE_NORMAL, Leave::Not, now_ms);
            self.check_invariants();
        }
    }

    /// The socket is gone, or the session was closed: whom to have leave, and where, unless somebody else attends them within
    /// [`Session::remain_present_for_ms`]. What the session still had to do is not to be done any more. Nobody after the
    /// client's own CLOSE, but for those whose leaving was not carried out.
    pub fn handle_gone(&mut self, now_ms: u64) -> Vec<(ChannelName, Vec<PresenceMessage>)> {
        if !self.closed {
            self.close(None, CLOSE_NORMAL, Leave::AfterGrace, now_ms);
        }
        let effects = std::mem::take(&mut self.effects);
        let undone = effects.into_iter().filter_map(|effect| match effect {
            Effect::Depart { channel, members } => Some((channel, members)),
            _ => None,
        });
        let mut gone: Vec<_> = undone.collect();
        gone.extend(self.presence.depart_all());
        self.check_invariants();
        gone
    }

    /// Time passed: does what is due.
    pub fn handle_tick(&mut self, now_ms: u64) {
        if self.closed {
            return;
        }
        match self.credential.take_due(now_ms) {
            Some(Due::Prompt) => self.send(Frame::new(Action::Auth), now_ms),
            Some(Due::End(code)) => {
                self.disconnect(code.into(), now_ms);
                return self.check_invariants();
            }
            None => {}
        }
        for channel in self.presence.take_due(now_ms) {
            self.enter_again(channel);
        }
        if self.heartbeat_at().is_some_and(|at| at <= now_ms) {
            self.send(Frame::new(Action::Heartbeat), now_ms);
        }
        self.check_invariants();
    }

    /// The node is stopping: sends the client to another.
    pub fn handle_drain(&mut self, now_ms: u64) {
        if !self.closed {
            self.disconnect(ErrorCode::Draining.into(), now_ms);
            self.check_invariants();
        }
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
            self.presence.check_invariants();
            self.answers.check_invariants();
            assert!(!self.closed || self.attachments.is_empty() && self.answers.is_empty());
        }
    }

    fn on_attach(&mut self, frame: &Frame, now_ms: u64) {
        let Some(text) = &frame.channel else {
            return self.fail_bad("ATTACH names no channel", now_ms);
        };
        let channel = QualifiedName::parse(text);
        let wanted = match &channel {
            Ok(channel) => Wanted::of_frame(frame, channel, &self.identity.capability, self.echo),
            Err(error) => Err(error.clone()),
        };
        let name = channel.map(|channel| channel.name);
        let reply = match (wanted, name) {
            (Ok(wanted), Ok(name)) => self.attachments.on_attach(name, wanted),
            (Ok(_), Err(error)) => {
                let presence = &mut self.presence;
                self.attachments.on_refused(None, text, &error, presence)
            }
            (Err(error), name) => {
                let presence = &mut self.presence;
                self.attachments
                    .on_refused(name.ok().as_ref(), text, &error, presence)
            }
        };
        self.apply(reply, now_ms);
    }

    fn on_detach(&mut self, frame: &Frame, now_ms: u64) {
        let Some(text) = &frame.channel else {
            return self.fail_bad("DETACH names no channel", now_ms);
        };
        let name = QualifiedName::parse(text).ok().map(|channel| channel.name);
        let reply = self
            .attachments
            .on_detach(name.as_ref(), text, &mut self.presence);
        self.apply(reply, now_ms);
    }

    /// Old clients ask for the members of a channel; on one that is not attached there is nothing to tell.
    fn on_sync(&mut self, frame: &Frame, now_ms: u64) {
        let text = frame.channel.as_deref().unwrap_or_default();
        if let Ok(channel) = QualifiedName::parse(text) {
            let reply = self.attachments.on_sync(&channel.name);
            self.apply(reply, now_ms);
        }
    }

    fn on_auth(&mut self, frame: Frame, now_ms: u64) {
        let token = frame.auth.and_then(|auth| auth.access_token);
        match token.filter(|token| !token.is_empty()) {
            Some(token) => {
                let token = self.credential.offer(Secret::new(token));
                let check = token.map(|token| Effect::Authenticate { token });
                self.effects.extend(check);
            }
            None => {
                let error = ErrorInfo::new(ErrorCode::InvalidCredentials, "AUTH brings no token");
                self.fail(&error, now_ms);
            }
        }
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
        self.close(Some(refusal(error)), CLOSE_POLICY, Leave::Now, now_ms);
    }

    /// Ends the conversation here: the client goes on with the connection on another socket.
    fn disconnect(&mut self, error: ErrorInfo, now_ms: u64) {
        let frame = Frame {
            error: Some(error.into()),
            ..Frame::new(Action::Disconnected)
        };
        self.close(Some(frame), CLOSE_NORMAL, Leave::AfterGrace, now_ms);
    }

    fn close(&mut self, last: Option<Frame>, code: u16, leave: Leave, now_ms: u64) {
        self.closed = true;
        self.attachments.clear();
        self.answers.clear();
        match leave {
            Leave::Now => {
                let gone = self.presence.depart_all().into_iter();
                let departs = gone.map(|(channel, members)| Effect::Depart { channel, members });
                self.effects.extend(departs);
            }
            Leave::AfterGrace => {}
            Leave::Not => drop(self.presence.depart_all()),
        }
        if let Some(frame) = last {
            self.send(frame, now_ms);
        }
        self.effects.push_back(Effect::Close { code });
    }
}

#[cfg(test)]
mod tests;
