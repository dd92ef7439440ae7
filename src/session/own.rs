//! A connection's own members of one channel. The session alone changes them, so it knows what an event means before
//! the log has it: whether an update is an enter, what a leave without data carries, whether there is anything to leave.
//!
//! Results come later and may be refusals, so each member is its newest *sure* state and what was asked for since.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::session::Ticket;
use crate::wire::ably::{PresenceAction, PresenceMessage};

/// What became of a presence publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Stored,
    /// It did not happen and, with `later`, may succeed another time.
    Refused {
        later: bool,
    },
    /// It may have happened. Believed where that keeps a member: to leave once too often changes nothing.
    Unknown,
}

/// A member's last event, with its id; `None`: not a member.
type State = Option<Arc<PresenceMessage>>;

/// A change without a result.
#[derive(Debug)]
struct Asked {
    ticket: Ticket,
    state: State,
    /// The client did not ask for it: the member was lost and is entered again.
    again: bool,
}

#[derive(Debug, Default)]
struct Member {
    sure: State,
    /// Oldest first; at most one per ticket.
    asked: VecDeque<Asked>,
    /// Somebody else removed it, and it is to be entered again.
    lost: State,
}

impl Member {
    fn state(&self) -> &State {
        self.asked.back().map_or(&self.sure, |asked| &asked.state)
    }

    /// The result of a change: whatever was asked for before it is settled too.
    fn becomes(&mut self, ticket: Ticket, state: State) {
        self.asked.retain(|asked| asked.ticket > ticket);
        self.sure = state;
    }

    fn is_nothing(&self) -> bool {
        self.sure.is_none() && self.asked.is_empty() && self.lost.is_none()
    }

    fn bytes(&self) -> usize {
        let asked = self.asked.iter().map(|asked| &asked.state);
        // What is believed and entered again all the same is one event.
        let same = |lost: &&Arc<PresenceMessage>| {
            (self.sure.as_ref()).is_none_or(|sure| !Arc::ptr_eq(sure, lost))
        };
        let lost = self.lost.as_ref().filter(same);
        let all = asked.chain([&self.sure]).flatten().chain(lost);
        all.map(|event| cost(event)).sum()
    }
}

/// Bytes that an event may hold in memory; the constant stands for what is the same for all.
fn cost(event: &PresenceMessage) -> usize {
    const FIXED: usize = 512;
    event.size() + event.id.as_ref().map_or(0, String::len) + FIXED
}

/// What a presence publish comes to.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Planned {
    /// Events that the record is to hold.
    pub(super) events: Vec<PresenceMessage>,
    /// Places, among the events that came, of those that change nothing.
    pub(super) without: Vec<u16>,
    /// A present member entered again with the event that made it one.
    pub(super) entered_again: bool,
    states: BTreeMap<String, State>,
}

impl Planned {
    /// Whether it makes or changes a member.
    pub(super) fn enters(&self) -> bool {
        self.states.values().any(Option::is_some)
    }
}

/// Invariant: no member is kept that neither is one, nor may become one, nor is to be entered again.
#[derive(Debug, Default)]
pub(super) struct OwnMembers {
    members: BTreeMap<String, Member>,
    /// Whether the members that the connection had before this session are among them.
    known: bool,
    bytes: usize,
}

impl OwnMembers {
    pub(super) fn new(known: bool) -> Self {
        Self {
            known,
            ..Self::default()
        }
    }

    /// What these events come to. Each has its client id, and is an enter, an update or a leave.
    /// The record will have the id `record_id`.
    pub(super) fn plan(&self, events: Vec<PresenceMessage>, record_id: &str) -> Planned {
        let mut planned = Planned::default();
        for (place, mut event) in (0_u16..).zip(events) {
            let client_id = event.client_id.clone().unwrap_or_default();
            let asked_id = event.id.take();
            let state = planned
                .states
                .get(&client_id)
                .or_else(|| self.state(&client_id));
            let member = state.and_then(Option::as_ref);
            match (event.action, member) {
                (Some(PresenceAction::Leave), None) if self.known && !self.is_lost(&client_id) => {
                    planned.without.push(place);
                    continue;
                }
                (Some(PresenceAction::Leave), Some(member)) if event.data.is_none() => {
                    event.data.clone_from(&member.data);
                    event.encoding.clone_from(&member.encoding);
                }
                (Some(PresenceAction::Enter), Some(member))
                    if asked_id.is_some() && asked_id == member.id =>
                {
                    planned.without.push(place);
                    planned.entered_again = true;
                    continue;
                }
                (Some(PresenceAction::Update), None) => event.action = Some(PresenceAction::Enter),
                _ => {}
            }
            let leaves = event.action == Some(PresenceAction::Leave);
            let id = format!("{record_id}:{}", planned.events.len());
            let state = (!leaves).then(|| Arc::new(with_id(&event, id)));
            planned.states.insert(client_id, state);
            planned.events.push(event);
        }
        planned
    }

    /// Whether it would be entered again.
    fn is_lost(&self, client_id: &str) -> bool {
        let member = self.members.get(client_id);
        member.is_some_and(|member| member.lost.is_some())
    }

    fn state(&self, client_id: &str) -> Option<&State> {
        self.members.get(client_id).map(Member::state)
    }

    /// How many members there would be after this, and how many more bytes.
    pub(super) fn outlook(&self, planned: &Planned) -> (usize, usize) {
        let others = self.members.iter().filter(|(client_id, member)| {
            member.state().is_some() && !planned.states.contains_key(*client_id)
        });
        let new = planned.states.values().flatten();
        let bytes = new.clone().map(|event| cost(event)).sum();
        (others.count() + new.count(), bytes)
    }

    /// The plan is under way.
    pub(super) fn ask(&mut self, ticket: Ticket, planned: Planned) {
        for (client_id, state) in planned.states {
            self.change(&client_id, |member| {
                member.lost = None;
                member.asked.push_back(Asked {
                    ticket,
                    state,
                    again: false,
                });
            });
        }
    }

    /// A plan has its result. Gives whether a member that was entered again without the client's asking is still lost.
    pub(super) fn settle(&mut self, ticket: Ticket, verdict: Verdict) -> bool {
        let asking = self.members.iter().filter(|(_, member)| {
            let mut asked = member.asked.iter();
            asked.any(|asked| asked.ticket == ticket)
        });
        let clients: Vec<String> = asking.map(|(client_id, _)| client_id.clone()).collect();
        let mut lost = false;
        for client_id in clients {
            self.change(&client_id, |member| {
                let place = member.asked.iter().position(|asked| asked.ticket == ticket);
                let Some(asked) = place.and_then(|place| member.asked.remove(place)) else {
                    return;
                };
                match verdict {
                    Verdict::Stored => member.becomes(ticket, asked.state),
                    Verdict::Unknown if asked.state.is_some() => {
                        member.becomes(ticket, asked.state.clone());
                        // Of what the client asked for itself it hears the fate, and asks again.
                        if asked.again && member.asked.is_empty() {
                            member.lost = asked.state;
                            lost = true;
                        }
                    }
                    // Unless the client has asked for something else since.
                    Verdict::Refused { later: true } if asked.again && member.asked.is_empty() => {
                        member.lost = asked.state;
                        lost = true;
                    }
                    Verdict::Refused { .. } | Verdict::Unknown => {}
                }
            });
        }
        lost
    }

    /// The members that the connection had before this session.
    pub(super) fn found(&mut self, members: impl Iterator<Item = PresenceMessage>) {
        for member in members {
            let client_id = member.client_id.clone().unwrap_or_default();
            self.change(&client_id, |own| {
                own.sure.get_or_insert_with(|| Arc::new(member));
            });
        }
        self.known = true;
    }

    /// The channel's members of this connection, as of now: those that are missing are to be entered again. Whether there
    /// are such.
    pub(super) fn reconcile(&mut self, present: &BTreeSet<&str>) -> bool {
        let known = self.members.iter();
        let missing = known.filter(|(client_id, member)| {
            member.sure.is_some() && member.asked.is_empty() && !present.contains(&***client_id)
        });
        let missing: Vec<String> = missing.map(|(client_id, _)| client_id.clone()).collect();
        let removed = missing.iter().map(|client_id| self.removed(client_id));
        removed.fold(false, |any, removed| any | removed)
    }

    /// Somebody else removed a member. Whether it is to be entered again.
    pub(super) fn removed(&mut self, client_id: &str) -> bool {
        let mut lost = false;
        if self.members.contains_key(client_id) {
            self.change(client_id, |member| {
                let state = member.state().clone();
                member.sure = None;
                member.lost = state;
                lost = member.lost.is_some();
            });
        }
        lost
    }

    /// The members that are to be entered again; then they are under way as `ticket`.
    pub(super) fn enter_again(&mut self, ticket: Ticket, record_id: &str) -> Vec<PresenceMessage> {
        let lost = self.members.iter().filter(|(_, m)| m.lost.is_some());
        let clients: Vec<String> = lost.map(|(client_id, _)| client_id.clone()).collect();
        let mut events = Vec::with_capacity(clients.len());
        for client_id in clients {
            self.change(&client_id, |member| {
                let Some(former) = member.lost.take() else {
                    return;
                };
                let event = PresenceMessage {
                    action: Some(PresenceAction::Enter),
                    id: None,
                    connection_id: None,
                    timestamp: None,
                    ..(*former).clone()
                };
                let id = format!("{record_id}:{}", events.len());
                let state = Some(Arc::new(with_id(&event, id)));
                member.asked.push_back(Asked {
                    ticket,
                    state,
                    again: true,
                });
                events.push(event);
            });
        }
        events
    }

    /// Leaves of all that are or may be members; then there is none.
    pub(super) fn depart(&mut self) -> Vec<PresenceMessage> {
        self.bytes = 0;
        let members = std::mem::take(&mut self.members);
        let last = members.into_values().filter_map(|member| {
            let asked = member
                .asked
                .into_iter()
                .rev()
                .filter_map(|asked| asked.state);
            asked.chain(member.sure).next()
        });
        let leave = |event: Arc<PresenceMessage>| PresenceMessage {
            action: Some(PresenceAction::Leave),
            client_id: event.client_id.clone(),
            data: event.data.clone(),
            encoding: event.encoding.clone(),
            ..PresenceMessage::default()
        };
        last.map(leave).collect()
    }

    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether nobody is or may become a member.
    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(super) fn has_lost(&self) -> bool {
        self.members.values().any(|member| member.lost.is_some())
    }

    /// The one place where a member changes: keeps the bytes right and forgets who is nothing.
    fn change(&mut self, client_id: &str, change: impl FnOnce(&mut Member)) {
        let mut member = self.members.remove(client_id).unwrap_or_default();
        self.bytes -= member.bytes();
        change(&mut member);
        if !member.is_nothing() {
            self.bytes += member.bytes();
            self.members.insert(client_id.to_owned(), member);
        }
    }

    pub(super) fn check_invariants(&self) {
        let bytes: usize = self.members.values().map(Member::bytes).sum();
        assert_eq!(bytes, self.bytes, "bytes of members");
        for (client_id, member) in &self.members {
            assert!(!member.is_nothing(), "{client_id}: kept for nothing");
            let tickets = member.asked.iter().map(|asked| asked.ticket);
            assert!(tickets.is_sorted(), "{client_id}: asked out of order");
        }
    }
}

fn with_id(event: &PresenceMessage, id: String) -> PresenceMessage {
    PresenceMessage {
        id: Some(id),
        ..event.clone()
    }
}
