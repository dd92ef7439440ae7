//! Random conversations against a model of what clients and owners of sessions rely on.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;

use crate::session::tests::{NOW, at, drain, name, serial, session};
use crate::session::{Continuity, Effect, Session, Ticket};
use crate::types::{ChannelName, ErrorCode};
use crate::wire::ably::{Action, Format, Frame, Message, decode};

/// One input of a random conversation; numbers choose among what is under way.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "most inputs are frames")]
enum Input {
    Frame(Frame),
    Published(prop::sample::Index, bool),
    Attached(u8, Continuity),
    Failed(u8, bool),
    Detached(u8),
    Discontinuity(u8),
    Tick(u64),
    Undecodable,
    Drain,
}

fn input() -> impl Strategy<Value = Input> {
    let action = prop_oneof![
        8 => Just(15_i64), 4 => Just(10), 4 => Just(12), 2 => Just(14), 1 => 0..23_i64, 1 => any::<i64>()
    ];
    let channel = prop_oneof![
        8 => "[a-e]".prop_map(Some), 1 => Just(None), 1 => "\\PC{0,3}".prop_map(Some)
    ];
    let step = prop_oneof![8 => Just(1_u64), 1 => 0..4_u64, 1 => any::<u64>()];
    // Mostly plain messages: the others take long to make up.
    let message =
        prop_oneof![9 => Just(Message::default()), 1 => crate::wire::ably::tests::message()];
    let frame_parts = (
        action,
        channel,
        step,
        any::<u64>(),
        vec(message, 0..3),
        "[0-9a-f-]{0,26}",
    );
    let frame =
        frame_parts.prop_map(
            |(action, channel, msg_serial, flags, messages, serial)| Frame {
                channel,
                msg_serial: Some(msg_serial),
                flags: Some(flags & 0xffff_ffff),
                messages,
                channel_serial: Some(serial),
                ..Frame::new(Action::from_number(action))
            },
        );
    let continuity = prop_oneof![
        Just(Continuity::Fresh),
        Just(Continuity::Lost),
        any::<bool>().prop_map(|backlog| Continuity::Resumed { backlog })
    ];
    prop_oneof![
        20 => frame.prop_map(Input::Frame),
        8 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(n, ok)| Input::Published(n, ok)),
        4 => (0..5_u8, continuity).prop_map(|(n, c)| Input::Attached(n, c)),
        1 => (0..5_u8, any::<bool>()).prop_map(|(n, ok)| Input::Failed(n, ok)),
        4 => (0..5_u8).prop_map(Input::Detached),
        1 => (0..5_u8).prop_map(Input::Discontinuity),
        1 => (0..40_000_u64).prop_map(Input::Tick),
    ]
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
    /// The present input is the owner's own ending of an attachment.
    gave_up: bool,
    closed: bool,
}

impl Model {
    /// Frames count up from the last one, so that most are new, some repeat and some leave gaps.
    fn number(&mut self, frame: &mut Frame) {
        let step = frame.msg_serial.unwrap_or_default();
        let number = self.newest.map_or(step % 3, |newest| {
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
                Effect::Publish { ticket, .. } => self.tickets.push(ticket),
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

fn apply(session: &mut Session, model: &mut Model, input: Input, now: &mut u64) {
    let channel = |n: u8| name(["a", "b", "c", "d", "e"][usize::from(n)]);
    model.gave_up = false;
    match input {
        Input::Frame(mut frame) => {
            model.number(&mut frame);
            model.request(&frame);
            session.handle_frame(frame, *now);
        }
        Input::Published(index, ok) => {
            if model.tickets.is_empty() {
                return;
            }
            let ticket = model.tickets.swap_remove(index.index(model.tickets.len()));
            let outcome = if ok {
                Ok(serial(3))
            } else {
                Err(ErrorCode::Busy.into())
            };
            session.handle_published(ticket, outcome, *now);
        }
        Input::Attached(n, continuity) => {
            if model.under_way.get(&channel(n)) != Some(&Request::Attach) {
                return;
            }
            model.under_way.remove(&channel(n));
            model.followed.insert(channel(n));
            session.handle_attached(&channel(n), at(5, continuity), *now);
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
            session.handle_discontinuity(
                &channel(n),
                serial(7),
                &ErrorCode::ContinuityLost.into(),
                *now,
            );
        }
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
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_conversation_breaks_the_promises(
        inputs in vec(input(), 0..120),
        end in prop_oneof![Just(None), Just(Some(Input::Undecodable)), Just(Some(Input::Drain))],
    ) {
        let mut session = session();
        let mut model = Model::default();
        let mut now = NOW;
        for input in inputs {
            apply(&mut session, &mut model, input, &mut now);
            model.follow(drain(&mut session));
        }
        for ticket in std::mem::take(&mut model.tickets) {
            session.handle_published(ticket, Ok(serial(9)), now);
            model.follow(drain(&mut session));
        }
        model.gave_up = false;
        while let Some((channel, request)) = model.under_way.pop_first() {
            match request {
                Request::Attach => {
                    model.followed.insert(channel.clone());
                    session.handle_attached(&channel, at(5, Continuity::Fresh), now);
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
        if let Some(end) = end {
            apply(&mut session, &mut model, end, &mut now);
            model.follow(drain(&mut session));
            prop_assert!(session.is_closed());
        }
    }
    /// An owner that reports what it was never asked for confuses itself, but brings nothing down.
    #[test]
    fn a_confused_owner_panics_nothing(inputs in vec(input(), 0..120)) {
        let mut session = session();
        for (input, now) in inputs.into_iter().zip(NOW..) {
            match input {
                Input::Frame(frame) => session.handle_frame(frame, now),
                Input::Attached(n, continuity) => {
                    session.handle_attached(&name(&"abcde"[usize::from(n)..=usize::from(n)]), at(1, continuity), now);
                }
                other => apply(&mut session, &mut Model::default(), other, &mut { now }),
            }
            drop(drain(&mut session));
        }
    }
}
