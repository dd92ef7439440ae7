//! Frames that the client numbers, so that each must be answered in its turn: publishes and presence (§2.6, §2.7).

use crate::auth::{ClientId, Operation};
use crate::session::Session;
use crate::session::admission::{admit, check_presence};
use crate::session::answers::{Accepted, Ticket};
use crate::session::effect::{Content, Effect};
use crate::session::qualified::QualifiedName;
use crate::types::{ChannelName, ErrorCode, ErrorInfo};
use crate::wire::ably::{Action, Frame, flags};

/// What a numbered frame comes to.
struct Accepting {
    /// Messages or events in the frame.
    count: u16,
    /// Places of those that are no part of the record.
    without: Vec<u16>,
    /// `None`: there is nothing to store, and it is answered at once.
    publish: Option<Effect>,
}

impl Session {
    pub(super) fn on_numbered(&mut self, frame: Frame, now_ms: u64) {
        let Some(msg_serial) = frame.msg_serial else {
            return self.fail_bad("frame needs a msgSerial to be answered", now_ms);
        };
        self.presence.numbered(msg_serial);
        match self.answers.accept(msg_serial) {
            Accepted::Open(ticket) => match self.take_up(frame, msg_serial, ticket) {
                Ok(accepting) => {
                    self.answers
                        .expect(ticket, accepting.count, accepting.without);
                    match accepting.publish {
                        Some(publish) => self.effects.push_back(publish),
                        None => self.answers.resolve(ticket, Ok(None)),
                    }
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

    fn take_up(
        &mut self,
        frame: Frame,
        msg_serial: u64,
        ticket: Ticket,
    ) -> Result<Accepting, ErrorInfo> {
        let unsupported = |what| Err(ErrorInfo::new(ErrorCode::BadRequest, what));
        let forced = frame.params.get("_forceNack");
        if forced.is_some_and(|value| value == "true") {
            return Err(ErrorCode::ForcedNack.into());
        }
        match frame.action {
            Action::Annotation => unsupported("annotations are not supported by this server yet"),
            Action::Object => unsupported("objects are not supported by this server yet"),
            Action::Presence => self.take_up_presence(frame, msg_serial, ticket),
            _ => self.take_up_messages(frame, msg_serial, ticket),
        }
    }

    fn take_up_messages(
        &self,
        frame: Frame,
        msg_serial: u64,
        ticket: Ticket,
    ) -> Result<Accepting, ErrorInfo> {
        let channel = channel_name(&frame)?;
        self.check_allowed(Operation::Publish, &channel)?;
        if let Some(modes) = self.attachments.modes(&channel)
            && modes & flags::PUBLISH == 0
        {
            return Err(ErrorCode::ModeDenied.into());
        }
        let limit = self.limits.max_message_bytes;
        let admission = admit(frame.messages, &self.identity.client_id, limit)?;
        if admission.privileged {
            self.check_allowed(Operation::PrivilegedHeaders, &channel)?;
        }
        let id = admission.base_id;
        Ok(Accepting {
            count: admission.count,
            without: vec![],
            publish: Some(Effect::Publish {
                ticket,
                channel,
                id: id.unwrap_or_else(|| self.record_id(msg_serial)),
                content: Content::Messages(admission.messages),
                ephemeral: admission.ephemeral,
            }),
        })
    }

    fn take_up_presence(
        &mut self,
        frame: Frame,
        msg_serial: u64,
        ticket: Ticket,
    ) -> Result<Accepting, ErrorInfo> {
        let channel = channel_name(&frame)?;
        self.check_allowed(Operation::Presence, &channel)?;
        match self.attachments.modes(&channel) {
            Some(modes) if modes & flags::PRESENCE == 0 => {
                return Err(ErrorCode::ModeDenied.into());
            }
            Some(_) => {}
            // A client that resumed may send again, before it attaches again, what it got no answer to.
            None if self.presence.resumed() => {}
            None => return Err(ErrorCode::PresenceNotAttached.into()),
        }
        if self.identity.client_id == ClientId::Anonymous {
            return Err(ErrorCode::PresenceWithoutClientId.into());
        }
        let limit = self.limits.max_message_bytes;
        let events = check_presence(frame.presence, &self.identity.client_id, limit)?;
        let count = u16::try_from(events.len()).map_err(|_| ErrorCode::TooManyMessages)?;
        let id = self.record_id(msg_serial);
        let mut planned = self.presence.plan(&channel, events, &id)?;
        // Members that this session made are attended as it is.
        if planned.entered_again && self.presence.resumed() {
            let channel = channel.clone();
            self.effects.push_back(Effect::Attend { channel });
        }
        let without = std::mem::take(&mut planned.without);
        let events = std::mem::take(&mut planned.events);
        let publish = (!events.is_empty()).then(|| {
            self.presence.ask(&channel, ticket, planned);
            Effect::Publish {
                ticket,
                channel,
                id,
                content: Content::Presence(events),
                ephemeral: false,
            }
        });
        Ok(Accepting {
            count,
            without,
            publish,
        })
    }

    /// Has lost members of the channel enter again, if they still may.
    pub(super) fn enter_again(&mut self, channel: ChannelName) {
        let modes = self.attachments.modes(&channel);
        let may = modes.is_none_or(|modes| modes & flags::PRESENCE != 0);
        if !may || self.check_allowed(Operation::Presence, &channel).is_err() {
            return;
        }
        let ticket = self.answers.silent_ticket();
        if let Some((id, events)) = self.presence.enter_again(&channel, ticket) {
            self.effects.push_back(Effect::Publish {
                ticket,
                channel,
                id,
                content: Content::Presence(events),
                ephemeral: false,
            });
        }
    }

    fn check_allowed(&self, operation: Operation, channel: &ChannelName) -> Result<(), ErrorInfo> {
        if self.identity.capability.allows(operation, channel) {
            return Ok(());
        }
        let text = format!("no permission for `{}` on `{channel}`", operation.text());
        Err(ErrorInfo::new(ErrorCode::CapabilityDenied, text))
    }

    fn record_id(&self, msg_serial: u64) -> String {
        format!("{}:{msg_serial}", self.connection_id)
    }
}

fn channel_name(frame: &Frame) -> Result<ChannelName, ErrorInfo> {
    let text = frame.channel.as_deref().unwrap_or_default();
    QualifiedName::parse(text).map(|channel| channel.name)
}
