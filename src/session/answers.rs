//! The answers that a client is owed for what it numbered: given in its order, whatever order results come in.
//!
//! Client libraries take an ACK for `msgSerial` 5 as the end of 0 to 4 too, so an answer waits for all before it.

use std::collections::VecDeque;

use crate::types::{ErrorCode, ErrorInfo, Serial};
use crate::wire::ably::{Action, ErrorBody, Frame, PublishResult};

/// Most message serials in one ACK.
const ACK_SERIALS_MAX: u64 = 1000;

/// Refusals with gaps between them that are remembered beyond the limit before the client counts as abusive.
/// A client that numbers without gaps never comes near: its refusals melt into one.
const SLACK: usize = 16;

/// Names one publish between [`Effect::Publish`](crate::session::Effect::Publish) and its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// What is to be done with a numbered frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Accepted {
    /// New: resolve the ticket at once or later.
    Open(Ticket),
    /// Came before on this transport and is answered there.
    Repeated,
    /// Too many are waiting; its refusal stands in line already.
    Refused,
    /// Far too many are waiting.
    Flood,
}

#[derive(Debug)]
enum Outcome {
    Waiting,
    /// As this record; as none when it changed nothing.
    Done(Option<Serial>),
    Refused(ErrorInfo),
}

/// Consecutive numbered frames with one outcome; more than one frame only when refused for their number.
#[derive(Debug)]
struct Owed {
    ticket: Ticket,
    msg_serial: u64,
    frames: u64,
    messages: u16,
    /// Places of messages that are not in the record, in order.
    without: Vec<u16>,
    outcome: Outcome,
}

/// Invariant: in order of tickets and of `msgSerial`s; at most `max` + `SLACK` long.
#[derive(Debug)]
pub(super) struct Answers {
    owed: VecDeque<Owed>,
    max: usize,
    newest: Option<u64>,
    next_ticket: u64,
}

impl Answers {
    pub(super) const fn new(max: usize) -> Self {
        Self {
            owed: VecDeque::new(),
            max,
            newest: None,
            next_ticket: 0,
        }
    }

    /// Takes up a frame. The first may have any number: on a resumed connection old ones are sent again.
    pub(super) fn accept(&mut self, msg_serial: u64) -> Accepted {
        if self.newest.is_some_and(|newest| msg_serial <= newest) {
            return Accepted::Repeated;
        }
        let full = self.owed.len() >= self.max;
        let too_many = || {
            ErrorInfo::new(
                ErrorCode::ConnectionRateLimited,
                "too many publishes without an answer",
            )
        };
        if full
            && let Some(last) = self
                .owed
                .back_mut()
                .filter(|last| last.is_followed_by(msg_serial))
        {
            last.frames += 1;
            self.newest = Some(msg_serial);
            return Accepted::Refused;
        }
        if self.owed.len() >= self.max.saturating_add(SLACK) {
            return Accepted::Flood;
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.newest = Some(msg_serial);
        let outcome = if full {
            Outcome::Refused(too_many())
        } else {
            Outcome::Waiting
        };
        self.owed.push_back(Owed {
            ticket,
            msg_serial,
            frames: 1,
            messages: 0,
            without: Vec::new(),
            outcome,
        });
        if full {
            Accepted::Refused
        } else {
            Accepted::Open(ticket)
        }
    }

    /// The publish of this ticket is under way with so many messages, of which those at these places are no part of
    /// the record.
    pub(super) fn expect(&mut self, ticket: Ticket, messages: u16, without: Vec<u16>) {
        if let Some(owed) = self.waiting(ticket) {
            owed.messages = messages;
            owed.without = without;
        }
    }

    /// A ticket for a publish that the client did not ask for and hears nothing of.
    pub(super) const fn silent_ticket(&mut self) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        ticket
    }

    /// Results of tickets that nobody waits for are ignored.
    pub(super) fn resolve(&mut self, ticket: Ticket, outcome: Result<Option<Serial>, ErrorInfo>) {
        if let Some(owed) = self.waiting(ticket) {
            owed.outcome = match outcome {
                Ok(serial) => Outcome::Done(serial),
                Err(error) => Outcome::Refused(error),
            };
        }
    }

    fn waiting(&mut self, ticket: Ticket) -> Option<&mut Owed> {
        let place = self
            .owed
            .binary_search_by_key(&ticket, |owed| owed.ticket)
            .ok()?;
        let owed = &mut self.owed[place];
        matches!(owed.outcome, Outcome::Waiting).then_some(owed)
    }

    /// The next answer that is due: one NACK, or one ACK for as many as were stored in a row.
    pub(super) fn poll_frame(&mut self) -> Option<Frame> {
        match &self.owed.front()?.outcome {
            Outcome::Waiting => None,
            Outcome::Done(_) => self.ack(),
            Outcome::Refused(error) => {
                let error = ErrorBody::from(error);
                let owed = self.owed.pop_front()?;
                Some(Frame {
                    msg_serial: Some(owed.msg_serial),
                    count: Some(owed.frames),
                    error: Some(error),
                    ..Frame::new(Action::Nack)
                })
            }
        }
    }

    fn ack(&mut self) -> Option<Frame> {
        let first = self.owed.front()?.msg_serial;
        let (mut res, mut serials) = (Vec::new(), 0);
        for (place, owed) in (0_u64..).zip(&self.owed) {
            let Outcome::Done(record) = owed.outcome else {
                break;
            };
            serials += u64::from(owed.messages);
            if owed.msg_serial - first != place || (!res.is_empty() && serials > ACK_SERIALS_MAX) {
                break;
            }
            res.push(PublishResult {
                serials: owed.serials(record),
            });
        }
        self.owed.drain(..res.len());
        Some(Frame {
            msg_serial: Some(first),
            count: u64::try_from(res.len()).ok(),
            res,
            ..Frame::new(Action::Ack)
        })
    }

    /// Whether another frame would be taken up.
    pub(super) fn has_room(&self) -> bool {
        self.owed.len() < self.max
    }

    pub(super) fn is_empty(&self) -> bool {
        self.owed.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.owed = VecDeque::new();
    }

    pub(super) fn check_invariants(&self) {
        assert!(self.owed.len() <= self.max.saturating_add(SLACK));
        for (one, next) in self.owed.iter().zip(self.owed.iter().skip(1)) {
            assert!(one.ticket < next.ticket, "tickets out of order");
            assert!(
                one.msg_serial.saturating_add(one.frames) <= next.msg_serial,
                "answers overlap"
            );
        }
        if let Some(first) = self.owed.front() {
            assert!(
                matches!(first.outcome, Outcome::Waiting),
                "an answer that is due was not given"
            );
        }
    }
}

impl Owed {
    fn serials(&self, record: Option<Serial>) -> Vec<Option<String>> {
        let mut offset = 0;
        let serials = (0..self.messages).map(|place| {
            let record = record.filter(|_| self.without.binary_search(&place).is_err())?;
            offset += 1;
            Some(record.message(offset - 1).to_string())
        });
        serials.collect()
    }

    /// Whether a frame with this number can share this refusal for too many.
    fn is_followed_by(&self, msg_serial: u64) -> bool {
        let rate = matches!(&self.outcome, Outcome::Refused(e) if e.code == ErrorCode::ConnectionRateLimited);
        rate && self.msg_serial.checked_add(self.frames) == Some(msg_serial)
    }
}
