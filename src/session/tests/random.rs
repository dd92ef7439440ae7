//! Random conversations against a model of what clients and owners of sessions rely on.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use crate::auth::Capability;
use crate::session::tests::{EVERYTHING, FRESH, NOW, at, drain, name, opening, serial};
use crate::session::{
    AttachOutcome, Content, Continuity, Effect, Limits, Opening, Session, Ticket,
};
use crate::types::{ChannelName, ErrorCode};
use crate::wire::ably::{
    Action, Auth, Format, Frame, Message, PresenceAction, PresenceMessage, decode,
};

/// One input of a random conversation; numbers choose among what is under way.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "most inputs are frames")]
enum Input {
    Frame(Frame),
    /// Which publish, what became of it, and whether it happened where nobody knows.
    Published(prop::sample::Index, Result<(), ErrorCode>, bool),
    /// With so many members of its own from before.
    Attached(u8, Continuity, u8),
    Failed(u8, bool),
    Detached(u8),
    Discontinuity(u8),
    Members(u8, bool),
    /// With one of some capabilities, or not believed.
    Authenticated(Option<u8>),
    /// Somebody had the member leave.
    MemberLeft(u8, u8),
    RevocationAt(u64),
    Tick(u64),
    Undecodable,
    Drain,
    Revoked,
    Close,
    Gone,
}

const CAPABILITIES: [&str; 4] = [
    EVERYTHING,
    r#"{"*":["subscribe"]}"#,
    r#"{"a":["presence"],"b":["publish","presence"]}"#,
    r#"{"x":["*"]}"#,
];

fn input() -> impl Strategy<Value = Input> {
    let action = prop_oneof![
        8 => Just(15_i64), 4 => Just(10), 4 => Just(12), 8 => Just(14), 1 => Just(16), 1 => Just(17), 1 => 8..23_i64
    ];
    let channel = prop_oneof![
        8 => "(\\[\\?(rewind=[0-9x]m?)?\\])?[a-e]".prop_map(Some), 16 => "[a-e]".prop_map(Some), 1 => Just(None), 1 => "\\PC{0,3}".prop_map(Some)
    ];
    let step = prop_oneof![8 => Just(1_u64), 1 => 0..4_u64, 1 => any::<u64>()];
    // Mostly plain messages: the others take long to make up.
    let message =
        prop_oneof![9 => Just(Message::default()), 1 => crate::wire::ably::tests::message()];
    let event = prop_oneof![
        9 => (2..5_i64, "[m-p]", option::of("conn1:[0-3]:0")).prop_map(|(action, client_id, id)| PresenceMessage {
            action: Some(PresenceAction::from_number(action)),
            client_id: Some(client_id),
            id,
            ..PresenceMessage::default()
        }),
        1 => crate::wire::ably::tests::presence()
    ];
    // Mostly all modes: with few of them little happens.
    let modes = prop_oneof![Just(u64::MAX), any::<u64>()];
    let frame_parts = (
        action,
        channel,
        step,
        modes,
        (vec(message, 0..3), vec(event, 0..4)),
        "[0-9a-f-]{0,26}",
    );
    let frame = frame_parts.prop_map(
        |(action, channel, msg_serial, flags, (messages, presence), serial)| Frame {
            channel,
            msg_serial: Some(msg_serial),
            flags: Some(flags & 0xffff_ffff),
            messages,
            presence,
            auth: Some(Auth {
                access_token: Some("t".into()),
            }),
            channel_serial: Some(serial),
            ..Frame::new(Action::from_number(action))
        },
    );
    let continuity = prop_oneof![
        any::<bool>().prop_map(|backlog| Continuity::Fresh { backlog }),
        Just(Continuity::Lost),
        any::<bool>().prop_map(|backlog| Continuity::Resumed { backlog })
    ];
    prop_oneof![
        20 => frame.prop_map(Input::Frame),
        10 => (any::<prop::sample::Index>(), fate(), any::<bool>()).prop_map(|(n, fate, did)| Input::Published(n, fate, did)),
        6 => (0..5_u8, continuity, 0..3_u8).prop_map(|(n, c, own)| Input::Attached(n, c, own)),
        1 => (0..5_u8, any::<bool>()).prop_map(|(n, ok)| Input::Failed(n, ok)),
        4 => (0..5_u8).prop_map(Input::Detached),
        1 => (0..5_u8).prop_map(Input::Discontinuity),
        1 => (0..5_u8, any::<bool>()).prop_map(|(n, ok)| Input::Members(n, ok)),
        2 => (0..4_u8).prop_map(|n| Input::Authenticated(Some(n))),
        2 => (0..5_u8, 0..4_u8).prop_map(|(n, who)| Input::MemberLeft(n, who)),
        1 => (0..40_000_u64).prop_map(Input::Tick),
    ]
}

/// Mostly what keeps a conversation going; now and then what may end it, for little happens afterwards.
fn inputs() -> impl Strategy<Value = Vec<Input>> {
    let ending = prop_oneof![
        Just(Input::Authenticated(None)),
        (0..120_000_u64).prop_map(Input::RevocationAt)
    ];
    vec(prop_oneof![80 => input(), 1 => ending], 0..120)
}

fn fate() -> impl Strategy<Value = Result<(), ErrorCode>> {
    let codes = [
        ErrorCode::Busy,
        ErrorCode::TooManyMembers,
        ErrorCode::Timeout,
    ];
    prop_oneof![3 => Just(Ok(())), 1 => prop::sample::select(codes.to_vec()).prop_map(Err)]
}

/// What happens to this connection's members, in the order of the log.
#[derive(Debug)]
enum Step {
    /// Who is there, or not, if the publish happened.
    Publish(Ticket, ChannelName, Vec<(String, bool)>),
    Leave(ChannelName, Vec<String>),
    Found(ChannelName, Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Attach,
    Detach,
}

/// What a client and the owner of a session may rely on, followed along a random conversation.
#[derive(Default)]
struct Model {
    /// Numbered frames without an answer.
    unanswered: BTreeSet<u64>,
    newest: Option<u64>,
    tickets: Vec<Ticket>,
    under_way: BTreeMap<ChannelName, Request>,
    followed: BTreeSet<ChannelName>,
    /// The newest request of the client for a channel, while it has no answer.
    expected: BTreeMap<String, Request>,
    /// Members of this connection, as the log will have them.
    log: Vec<Step>,
    /// Publishes that did not happen.
    failed: BTreeSet<Ticket>,
    /// Channels whose members from before were found.
    found: BTreeSet<ChannelName>,
    /// The present input is the owner's own ending of an attachment.
    gave_up: bool,
    closed: bool,
}

impl Model {
    /// Frames count up from the last one, so that most are new, some repeat and some leave gaps. Number 0 was used before the
    /// session: it made the members of [`from_before`].
    fn number(&mut self, frame: &mut Frame) {
        let step = frame.msg_serial.unwrap_or_default();
        let number = self.newest.map_or(step % 3 + 1, |newest| {
            newest.saturating_add(step).max(1) - u64::from(step > 1)
        });
        frame.msg_serial = Some(number);
        let numbered = matches!(
            frame.action,
            Action::Message | Action::Presence | Action::Annotation | Action::Object
        );
        if numbered && self.newest.is_none_or(|newest| number > newest) {
            self.newest = Some(number);
            self.unanswered.insert(number);
        }
    }

    fn follow(&mut self, effects: Vec<Effect>) {
        assert!(effects.len() <= 64, "one input, many effects");
        for effect in effects {
            assert!(!self.closed, "an effect after Close");
            match effect {
                Effect::Send(frame) if matches!(frame.action, Action::Ack | Action::Nack) => {
                    self.answer(&frame)
                }
                Effect::Send(frame) => self.reply(&frame),
                Effect::Publish {
                    ticket,
                    content,
                    channel,
                    ..
                } => {
                    self.tickets.push(ticket);
                    if let Content::Presence(events) = content {
                        self.log
                            .push(Step::Publish(ticket, channel, changes(&events)));
                    }
                }
                Effect::Depart { channel, members } => self.leave(channel, &members),
                Effect::Attend { .. } | Effect::Members { .. } | Effect::Authenticate { .. } => {}
                Effect::Attach {
                    channel, in_place, ..
                } => {
                    assert_eq!(self.followed.contains(&channel), in_place, "{channel}");
                    assert!(
                        self.under_way.insert(channel, Request::Attach).is_none(),
                        "two requests at once"
                    );
                }
                Effect::Detach { channel } => {
                    assert!(self.followed.contains(&channel), "{channel}");
                    assert!(
                        self.under_way.insert(channel, Request::Detach).is_none(),
                        "two requests at once"
                    );
                }
                Effect::Close { .. } => self.closed = true,
            }
        }
    }

    fn leave(&mut self, channel: ChannelName, members: &[PresenceMessage]) {
        let leavers = changes(members);
        assert!(leavers.iter().all(|(_, stays)| !stays));
        self.log.push(Step::Leave(
            channel,
            leavers.into_iter().map(|(who, _)| who).collect(),
        ));
    }

    /// Everybody else left while nobody looked.
    fn skip(&mut self, channel: &ChannelName, stay: &[&str]) {
        let members = self.members().into_iter();
        let leavers = members.filter(|(of, who)| of == channel && !stay.contains(&&**who));
        let leavers = leavers.map(|(_, who)| who).collect();
        self.log.push(Step::Leave(channel.clone(), leavers));
    }

    /// Who is a member in the end. A leave of somebody else's making is a leave.
    fn members(&self) -> BTreeSet<(ChannelName, String)> {
        let mut members = BTreeSet::new();
        for step in &self.log {
            match step {
                Step::Publish(ticket, ..) if self.failed.contains(ticket) => {}
                Step::Publish(_, channel, changes) => {
                    for (who, stays) in changes {
                        let member = (channel.clone(), who.clone());
                        if *stays {
                            members.insert(member)
                        } else {
                            members.remove(&member)
                        };
                    }
                }
                Step::Leave(channel, leavers) => {
                    for who in leavers {
                        members.remove(&(channel.clone(), who.clone()));
                    }
                }
                Step::Found(channel, found) => {
                    members.extend(found.iter().map(|who| (channel.clone(), who.clone())));
                }
            }
        }
        members
    }

    fn request(&mut self, frame: &Frame) {
        let Some(channel) = frame.channel.clone() else {
            return;
        };
        match frame.action {
            Action::Attach => self.expected.insert(channel, Request::Attach),
            Action::Detach => self.expected.insert(channel, Request::Detach),
            _ => None,
        };
    }

    fn reply(&mut self, frame: &Frame) {
        let Some(channel) = &frame.channel else {
            return;
        };
        let expected = self.expected.remove(channel);
        if frame.action == Action::Attached {
            assert_ne!(expected, Some(Request::Detach), "ATTACHED after a DETACH");
        }
        if frame.action == Action::Detached && expected == Some(Request::Attach) {
            assert!(self.gave_up, "DETACHED after an ATTACH");
        }
    }

    /// The owner has nothing to do with the channel any more.
    fn ended(&mut self, channel: &ChannelName) {
        self.gave_up = self.under_way.remove(channel) != Some(Request::Detach);
        self.followed.remove(channel);
    }

    fn answer(&mut self, frame: &Frame) {
        let (first, count) = (frame.msg_serial.unwrap(), frame.count.unwrap());
        assert!(count > 0);
        if frame.action == Action::Ack {
            assert_eq!(u64::try_from(frame.res.len()), Ok(count));
        }
        for number in (0..count).map(|place| first + place) {
            assert_eq!(
                self.unanswered.pop_first(),
                Some(number),
                "answers out of order"
            );
        }
    }
}

fn changes(events: &[PresenceMessage]) -> Vec<(String, bool)> {
    let stays = |event: &PresenceMessage| event.action != Some(PresenceAction::Leave);
    let change = |event: &PresenceMessage| (event.client_id.clone().unwrap(), stays(event));
    events.iter().map(change).collect()
}

/// A session of a resumed connection with small limits.
fn session() -> Session {
    let mut opening = Opening {
        resumed: true,
        ..opening(EVERYTHING, "*")
    };
    opening.limits = Limits {
        max_members: 3,
        max_member_bytes: 20_000,
        ..opening.limits
    };
    let mut session = Session::new(opening, NOW);
    drain(&mut session);
    session
}

const CLIENTS: [&str; 4] = ["m", "n", "o", "p"];

/// Members that the connection had before the session began: their numbers are lower than the session's.
fn from_before(own: u8) -> Vec<PresenceMessage> {
    let member = |who: &&str| PresenceMessage {
        id: Some("conn1:0:0".into()),
        action: Some(PresenceAction::Present),
        client_id: Some((*who).to_owned()),
        connection_id: Some("conn1".into()),
        ..PresenceMessage::default()
    };
    CLIENTS[..usize::from(own)].iter().map(member).collect()
}

#[expect(clippy::too_many_lines, reason = "a flat dispatch of inputs")]
fn apply(session: &mut Session, model: &mut Model, input: Input, now: &mut u64) {
    let channel = |n: u8| name(["a", "b", "c", "d", "e"][usize::from(n)]);
    model.gave_up = false;
    match input {
        Input::Frame(mut frame) => {
            model.number(&mut frame);
            model.request(&frame);
            session.handle_frame(frame, *now);
        }
        Input::Published(index, fate, happened) => {
            if model.tickets.is_empty() {
                return;
            }
            let ticket = model.tickets.swap_remove(index.index(model.tickets.len()));
            let unknown = fate == Err(ErrorCode::Timeout);
            if fate.is_err() && !(unknown && happened) {
                model.failed.insert(ticket);
            }
            let outcome = fate.map(|()| Some(serial(3))).map_err(Into::into);
            session.handle_published(ticket, outcome, *now);
        }
        Input::Attached(n, continuity, own) => {
            if model.under_way.get(&channel(n)) != Some(&Request::Attach) {
                return;
            }
            model.under_way.remove(&channel(n));
            let in_place = !model.followed.insert(channel(n));
            let changed = model.log.iter().any(|step| match step {
                Step::Publish(_, name, _) | Step::Leave(name, _) | Step::Found(name, _) => {
                    *name == channel(n)
                }
            });
            // Members from before are there when the channel is attached first, and a session that is over learns of nobody:
            // whoever attended them before lets them go.
            let nobody = changed || in_place || model.closed;
            let own = if nobody { 0 } else { own };
            if own > 0 && model.found.insert(channel(n)) {
                let found = CLIENTS[..usize::from(own)]
                    .iter()
                    .map(|who| (*who).to_owned());
                model.log.push(Step::Found(channel(n), found.collect()));
            }
            let outcome = AttachOutcome {
                members: from_before(own),
                ..at(5, continuity)
            };
            session.handle_attached(&channel(n), outcome, *now);
        }
        Input::Failed(n, later) => {
            model.ended(&channel(n));
            let code = if later {
                ErrorCode::NoLeader
            } else {
                ErrorCode::TooManyChannels
            };
            session.handle_attachment_failed(&channel(n), &code.into(), *now);
        }
        Input::Detached(n) => {
            model.ended(&channel(n));
            session.handle_detached(&channel(n), *now);
        }
        Input::Discontinuity(n) => {
            model.skip(&channel(n), &CLIENTS);
            session.handle_discontinuity(
                &channel(n),
                serial(7),
                from_before(4),
                &ErrorCode::ContinuityLost.into(),
                *now,
            );
        }
        Input::Members(n, ok) => {
            let members = if ok {
                Ok(from_before(2))
            } else {
                Err(ErrorCode::Timeout.into())
            };
            session.handle_members(&channel(n), members, *now);
        }
        Input::Authenticated(capability) => {
            let mut identity = session.identity().clone();
            let outcome = match capability {
                Some(n) => {
                    let capability = Capability::parse(CAPABILITIES[usize::from(n)]).unwrap();
                    identity.capability = std::sync::Arc::new(capability);
                    Ok(identity)
                }
                None => Err(ErrorCode::InvalidCredentials.into()),
            };
            session.handle_authenticated(outcome, *now);
        }
        Input::MemberLeft(n, who) => {
            let who = CLIENTS[usize::from(who)].to_owned();
            model.log.push(Step::Leave(channel(n), vec![who.clone()]));
            session.handle_member_left(&channel(n), &who, *now);
        }
        Input::RevocationAt(ms) => session.handle_revocation_at(*now + ms, *now),
        Input::Tick(ms) => {
            *now += ms;
            session.handle_tick(*now);
            assert!(
                session
                    .next_deadline()
                    .is_none_or(|deadline| deadline > *now)
            );
        }
        Input::Undecodable => {
            session.handle_undecodable(decode(Format::Json, b"").unwrap_err(), *now)
        }
        Input::Drain => session.handle_drain(*now),
        Input::Revoked => session.handle_revoked(*now),
        Input::Close => session.handle_frame(Frame::new(Action::Close), *now),
        Input::Gone => {
            for (channel, members) in session.handle_gone(*now) {
                model.leave(channel, &members);
            }
        }
    }
    // Those found are not counted: at most three, and small.
    assert!(
        session.presence.bytes() <= 20_000 + 15 * 600,
        "too much memory"
    );
    assert!(session.effects.len() <= 64);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_conversation_breaks_the_promises(
        inputs in inputs(),
        end in prop_oneof![
            Just(Input::Undecodable), Just(Input::Drain), Just(Input::Revoked), Just(Input::Close), Just(Input::Gone),
        ],
    ) {
        let mut session = session();
        let mut model = Model::default();
        let mut now = NOW;
        for input in inputs {
            apply(&mut session, &mut model, input, &mut now);
            model.follow(drain(&mut session));
        }
        for ticket in std::mem::take(&mut model.tickets) {
            session.handle_published(ticket, Ok(Some(serial(9))), now);
            model.follow(drain(&mut session));
        }
        model.gave_up = false;
        while let Some((channel, request)) = model.under_way.pop_first() {
            match request {
                Request::Attach => {
                    model.followed.insert(channel.clone());
                    session.handle_attached(&channel, at(5, FRESH), now);
                }
                Request::Detach => {
                    model.followed.remove(&channel);
                    session.handle_detached(&channel, now);
                }
            }
            model.follow(drain(&mut session));
        }
        prop_assert!(model.closed || model.unanswered.is_empty(), "never answered: {:?}", model.unanswered);
        prop_assert!(model.closed || model.expected.is_empty(), "never answered: {:?}", model.expected);
        apply(&mut session, &mut model, end, &mut now);
        model.follow(drain(&mut session));
        prop_assert!(session.is_closed() && session.next_deadline().is_none());
        for (channel, members) in session.handle_gone(now) {
            model.leave(channel, &members);
        }
        prop_assert_eq!(model.members(), BTreeSet::new(), "who nobody has leave: {:?}", model.log);
        prop_assert_eq!(session.presence.bytes(), 0);
    }

    /// An owner that reports what it was never asked for confuses itself, but brings nothing down.
    #[test]
    fn a_confused_owner_panics_nothing(inputs in inputs()) {
        let mut session = session();
        for (input, now) in inputs.into_iter().zip(NOW..) {
            match input {
                Input::Frame(frame) => session.handle_frame(frame, now),
                Input::Attached(n, continuity, _) => {
                    session.handle_attached(&name(&"abcde"[usize::from(n)..=usize::from(n)]), at(1, continuity), now);
                }
                other => apply(&mut session, &mut Model::default(), other, &mut { now }),
            }
            drop(drain(&mut session));
        }
    }
}
