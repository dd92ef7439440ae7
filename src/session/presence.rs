//! This connection's own members of all channels, and how they are kept: limits, results, leaving, entering again.
//!
//! Members outlive neither the connection nor its attachment, but they may be older than this session: a client that
//! resumed sends a presence publish again before it attaches, and finds members of its own when it has.

use std::collections::{BTreeMap, BTreeSet};

use crate::session::effect::Effect;
use crate::session::own::{OwnMembers, Planned, Verdict};
use crate::session::{Limits, Ticket};
use crate::types::{ChannelName, ErrorCode, ErrorInfo, Retry, Serial};
use crate::wire::ably::PresenceMessage;

/// How long after a refusal a lost member is entered again.
const AGAIN_AFTER_MS: u64 = 1000;

/// Invariant: no channel without a member; own members take at most `Limits::max_member_bytes`, those that were found
/// on an attach aside.
#[derive(Debug)]
pub(super) struct Presence {
    connection_id: String,
    /// Whether the connection is older than this session.
    resumed: bool,
    channels: BTreeMap<ChannelName, OwnMembers>,
    tickets: BTreeMap<Ticket, ChannelName>,
    /// Channels with members from before this session: found once, they are not found again after they left.
    adopted: BTreeSet<ChannelName>,
    /// The first number that the client used in this session.
    first_serial: Option<u64>,
    max_members: usize,
    max_bytes: usize,
    /// When lost members are entered again.
    again_at_ms: Option<u64>,
    /// Makes the ids of what is entered again this session's.
    began_ms: u64,
    again: u64,
}

impl Presence {
    pub(super) fn new(connection_id: &str, resumed: bool, limits: &Limits, now_ms: u64) -> Self {
        Self {
            connection_id: connection_id.to_owned(),
            resumed,
            channels: BTreeMap::new(),
            tickets: BTreeMap::new(),
            adopted: BTreeSet::new(),
            first_serial: None,
            max_members: limits.max_members,
            max_bytes: limits.max_member_bytes,
            again_at_ms: None,
            began_ms: now_ms,
            again: 0,
        }
    }

    /// The client used this number: what has lower ones was made before this session.
    pub(super) fn numbered(&mut self, msg_serial: u64) {
        self.first_serial.get_or_insert(msg_serial);
    }

    /// Whether members may be changed without an attachment: for what a resumed client sends again.
    pub(super) const fn resumed(&self) -> bool {
        self.resumed
    }

    /// What these events come to; see [`OwnMembers::plan`].
    ///
    /// # Errors
    /// `TooManyMembers` when they would make more members, or keep more bytes of them, than one connection may have.
    pub(super) fn plan(
        &self,
        channel: &ChannelName,
        events: Vec<PresenceMessage>,
        record_id: &str,
    ) -> Result<Planned, ErrorInfo> {
        let nobody = OwnMembers::new(!self.resumed);
        let own = self.channels.get(channel).unwrap_or(&nobody);
        let planned = own.plan(events, record_id);
        let refused = |what| Err(ErrorInfo::new(ErrorCode::TooManyMembers, what));
        // What only leaves is never too much.
        if planned.enters() {
            let (members, bytes) = own.outlook(&planned);
            if members > self.max_members {
                let max = self.max_members;
                return refused(format!(
                    "at most {max} members of one connection on a channel"
                ));
            }
            if self.bytes() + bytes > self.max_bytes {
                return refused("members of this connection take too much memory".to_owned());
            }
        }
        Ok(planned)
    }

    /// The plan is under way.
    pub(super) fn ask(&mut self, channel: &ChannelName, ticket: Ticket, planned: Planned) {
        self.tickets.insert(ticket, channel.clone());
        self.change(channel, |own| own.ask(ticket, planned));
    }

    /// A publish has its result. Most are no presence publishes, and nothing here.
    pub(super) fn settle(
        &mut self,
        ticket: Ticket,
        outcome: &Result<Option<Serial>, ErrorInfo>,
        now_ms: u64,
    ) {
        let Some(channel) = self.tickets.remove(&ticket) else {
            return;
        };
        let verdict = match outcome {
            Ok(_) => Verdict::Stored,
            Err(error) => match error.code.retry() {
                Retry::Unknown => Verdict::Unknown,
                Retry::Later => Verdict::Refused { later: true },
                Retry::Never | Retry::WithNewToken => Verdict::Refused { later: false },
            },
        };
        if self.change(&channel, |own| own.settle(ticket, verdict)) {
            self.again_at_ms
                .get_or_insert(now_ms.saturating_add(AGAIN_AFTER_MS));
        }
    }

    /// Members of the channel as of an attach. Whether some are this connection's and were not known.
    pub(super) fn found(&mut self, channel: &ChannelName, members: &[PresenceMessage]) -> bool {
        let from_before: Vec<PresenceMessage> = members
            .iter()
            .filter(|member| self.is_from_before(member))
            .cloned()
            .collect();
        let new = !from_before.is_empty() && self.adopted.insert(channel.clone());
        if new || self.channels.contains_key(channel) {
            let members = from_before.into_iter().filter(|_| new);
            self.change(channel, |own| own.found(members));
        }
        new
    }

    /// Whether it is a member of this connection that this session did not make. What it did make it knows: where that is
    /// not among its members it has left, and the owner's list is older.
    fn is_from_before(&self, member: &PresenceMessage) -> bool {
        let id = member.id.as_deref().unwrap_or_default();
        let own = member.connection_id.as_deref() == Some(&*self.connection_id);
        let number = id
            .strip_prefix(&*self.connection_id)
            .and_then(|rest| rest.strip_prefix(':'))
            .and_then(|rest| rest.split(':').next()?.parse::<u64>().ok());
        let made_now = match number {
            Some(number) => self.first_serial.is_some_and(|first| number >= first),
            None => id.starts_with(&self.again_prefix()),
        };
        own && self.resumed && !made_now
    }

    /// All members of the channel leave at once.
    pub(super) fn depart(&mut self, channel: &ChannelName) -> Option<Effect> {
        let members = self.channels.remove(channel)?.depart();
        (!members.is_empty()).then(|| Effect::Depart {
            channel: channel.clone(),
            members,
        })
    }

    /// All members leave: whom, and where.
    pub(super) fn depart_all(&mut self) -> Vec<(ChannelName, Vec<PresenceMessage>)> {
        self.tickets.clear();
        self.again_at_ms = None;
        let channels = std::mem::take(&mut self.channels).into_iter();
        let members = channels.map(|(name, mut own)| (name, own.depart()));
        members.filter(|(_, members)| !members.is_empty()).collect()
    }

    /// Somebody else removed a member. Whether it is to be entered again.
    pub(super) fn removed(&mut self, channel: &ChannelName, client_id: &str) -> bool {
        self.channels.contains_key(channel) && self.change(channel, |own| own.removed(client_id))
    }

    /// The channel's members, as of now. Whether own ones are missing that are to be entered again.
    pub(super) fn reconcile(&mut self, channel: &ChannelName, members: &[PresenceMessage]) -> bool {
        if !self.channels.contains_key(channel) {
            return false;
        }
        let connection_id = self.connection_id.clone();
        let own = members
            .iter()
            .filter(|member| member.connection_id.as_deref() == Some(&*connection_id));
        let present = own
            .filter_map(|member| member.client_id.as_deref())
            .collect();
        self.change(channel, |own| own.reconcile(&present))
    }

    /// Enters the channel's lost members again, under way as `ticket`: the record's id and its events.
    pub(super) fn enter_again(
        &mut self,
        channel: &ChannelName,
        ticket: Ticket,
    ) -> Option<(String, Vec<PresenceMessage>)> {
        self.again += 1;
        let id = format!("{}{}", self.again_prefix(), self.again);
        let events = self.change(channel, |own| own.enter_again(ticket, &id));
        if events.is_empty() {
            return None;
        }
        self.tickets.insert(ticket, channel.clone());
        Some((id, events))
    }

    /// Client libraries judge by time, not by number, what does not begin with the connection's id.
    fn again_prefix(&self) -> String {
        format!("again-{}-{:x}-", self.connection_id, self.began_ms)
    }

    /// Channels whose lost members are due to be entered again.
    pub(super) fn take_due(&mut self, now_ms: u64) -> Vec<ChannelName> {
        if self.again_at_ms.is_none_or(|at| at > now_ms) {
            return vec![];
        }
        self.again_at_ms = None;
        let lost = self.channels.iter().filter(|(_, own)| own.has_lost());
        lost.map(|(name, _)| name.clone()).collect()
    }

    pub(super) const fn deadline(&self) -> Option<u64> {
        self.again_at_ms
    }

    /// Bytes that own members take.
    pub(super) fn bytes(&self) -> usize {
        self.channels.values().map(OwnMembers::bytes).sum()
    }

    fn change<T>(&mut self, channel: &ChannelName, change: impl FnOnce(&mut OwnMembers) -> T) -> T {
        let known = !self.resumed;
        let own = self.channels.entry(channel.clone());
        let own = own.or_insert_with(|| OwnMembers::new(known));
        let result = change(own);
        if own.is_empty() {
            self.channels.remove(channel);
        }
        result
    }

    pub(super) fn check_invariants(&self) {
        for (name, own) in &self.channels {
            assert!(!own.is_empty(), "{name}: no member");
            own.check_invariants();
        }
    }
}
