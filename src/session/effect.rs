//! What a session asks of its owner, and what the owner answers.

use crate::auth::Secret;
use crate::session::Ticket;
use crate::session::wanted::Occupancy;
use crate::types::{ChannelName, Serial};
use crate::wire::ably::{Frame, Message, PresenceMessage};

/// What one record is to hold.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    Messages(Vec<Message>),
    /// Enters, updates and leaves, each with its client id. Without `connection_id` they are of the publisher's own
    /// connection; without `id` theirs is the record's id and their place.
    Presence(Vec<PresenceMessage>),
}

/// Where an attachment begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Present,
    After(Serial),
    /// Before the newest `count` messages, those older than `within_ms` left out.
    Rewind {
        count: usize,
        within_ms: Option<u64>,
    },
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
    /// Store the content as one record, then [`Session::handle_published`](crate::session::Session::handle_published).
    /// Results may come in any order; records of one channel are stored in the order of their effects.
    Publish {
        ticket: Ticket,
        channel: ChannelName,
        /// Idempotency key: `connectionId:msgSerial`, or the base of the ids that the client chose.
        id: String,
        content: Content,
        /// Delivered, but no part of history.
        ephemeral: bool,
    },
    /// Follow the channel, then `handle_attached` or `handle_attachment_failed`. After `handle_attached` write no message
    /// of the channel before the ATTACHED and the SYNCs it gives. What of the channel is written afterwards, and
    /// under which name, [`Session::delivery`](crate::session::Session::delivery) says.
    Attach {
        channel: ChannelName,
        start: Start,
        /// Whether the connection's own messages come back to it.
        echo: bool,
        /// Whether messages are wanted.
        subscribe: bool,
        /// Whether presence events of others are wanted; own ones are in any case.
        presence_subscribe: bool,
        /// Whether the outcome must name the members.
        members: bool,
        /// The channel is attached already: keep its cursor, report it as `at`, change the rest.
        in_place: bool,
    },
    /// Stop following the channel and write nothing more of it, then `handle_detached`.
    Detach { channel: ChannelName },
    /// Members of this connection are on the channel since before this session: attend them from now on.
    Attend { channel: ChannelName },
    /// Have these members leave now; nobody waits for a result, and the end of the session does not undo it. The record's id
    /// must not begin with the connection's: nothing the client numbered is behind it.
    Depart {
        channel: ChannelName,
        members: Vec<PresenceMessage>,
    },
    /// Read the channel's members, then `handle_members`.
    Members { channel: ChannelName },
    /// Find out whose token this is and what it allows, then `handle_authenticated`.
    Authenticate { token: Secret },
    /// Write what is queued, then close the socket with this code and stop following every channel. The last
    /// effect of a session.
    Close { code: u16 },
}

/// Whether an attachment continues where the client was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuity {
    /// It begins where it was asked to begin; with `backlog` a rewind found messages.
    Fresh { backlog: bool },
    /// It goes on after the client's serial; with `backlog` there are messages to catch up on.
    Resumed { backlog: bool },
    /// Messages after the client's serial are gone: it begins at the present.
    Lost,
}

/// How an attachment began.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachOutcome {
    /// The serial after which messages follow, backlog included.
    pub at: Serial,
    pub continuity: Continuity,
    /// Members as of the present, this connection's own included, each with id, connection id and timestamp.
    pub members: Vec<PresenceMessage>,
}

/// What of a channel is written to the client now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery<'a> {
    /// What the client calls the channel: frames must name it so, qualifier included.
    pub name: &'a str,
    pub messages: bool,
    /// Whether its own messages come back to it.
    pub echo: bool,
    /// Presence events of others. Its own members' events are always written.
    pub presence: bool,
    pub occupancy: Option<Occupancy>,
    /// Modes in force: bits of `wire::ably::flags`.
    pub modes: u64,
}
