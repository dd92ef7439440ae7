//! The channels of one connection: what the client asked for, what it was granted, what is under way (§2.5.2).
//!
//! The owner works on one request per channel at a time; what the client asks meanwhile waits here, and only
//! the newest of it: a client that has sent ATTACH after DETACH no longer waits for DETACHED, and would take one for a
//! failure of its ATTACH.

use std::collections::BTreeMap;
use std::mem;

use crate::auth::{Capability, Operation};
use crate::session::Effect;
use crate::types::{ChannelName, ErrorCode, ErrorInfo, Retry, Serial};
use crate::wire::ably::{Action, ErrorBody, Frame, flags};

/// Modes of a client that names none. Annotations belong to it in the protocol, but not on this server.
const DEFAULT_MODES: u64 =
    flags::PUBLISH | flags::SUBSCRIBE | flags::PRESENCE | flags::PRESENCE_SUBSCRIBE;

/// Names of modes in `params.modes`.
const MODE_NAMES: &[(&str, u64)] = &[
    ("publish", flags::PUBLISH),
    ("subscribe", flags::SUBSCRIBE),
    ("presence", flags::PRESENCE),
    ("presence_subscribe", flags::PRESENCE_SUBSCRIBE),
    ("annotation_publish", flags::ANNOTATION_PUBLISH),
    ("annotation_subscribe", flags::ANNOTATION_SUBSCRIBE),
    ("object_publish", flags::OBJECT_PUBLISH),
    ("object_subscribe", flags::OBJECT_SUBSCRIBE),
];

/// Whether an attachment continues where the client was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuity {
    /// It begins at the present, as asked.
    Fresh,
    /// It goes on after the client's serial; with `backlog` there are messages to catch up on.
    Resumed { backlog: bool },
    /// Messages after the client's serial are gone: it begins at the present.
    Lost,
}

/// How an attachment began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachOutcome {
    /// The serial after which messages follow, backlog included.
    pub at: Serial,
    pub continuity: Continuity,
}

/// An ATTACH that passed every check that needs no channel state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    modes: u64,
    params: BTreeMap<String, String>,
    from: Option<Serial>,
    echo: bool,
    /// The client sent a serial, but none of this cluster's.
    foreign_serial: bool,
}

impl Wanted {
    /// # Errors
    /// `InvalidParameter` for an unknown mode, `CapabilityDenied` when nothing that is asked for is allowed.
    pub(super) fn of_frame(
        frame: &Frame,
        channel: &ChannelName,
        capability: &Capability,
        echo: bool,
    ) -> Result<Self, ErrorInfo> {
        let modes = requested_modes(frame)? & permitted_modes(capability, channel);
        if modes == 0 {
            let text = format!("none of the requested modes is permitted on `{channel}`");
            return Err(ErrorInfo::new(ErrorCode::CapabilityDenied, text));
        }
        let mut params = BTreeMap::new();
        if frame.params.contains_key("modes") {
            params.insert("modes".to_owned(), mode_names(modes));
        }
        // Only known values are kept: what is remembered per channel must not be the client's to size.
        let own_echo = frame
            .params
            .get("echo")
            .filter(|value| matches!(value.as_str(), "true" | "false"));
        if let Some(echo) = own_echo {
            params.insert("echo".to_owned(), echo.clone());
        }
        let serial = frame
            .channel_serial
            .as_deref()
            .filter(|serial| !serial.is_empty());
        let from = serial.and_then(|serial| serial.parse().ok());
        Ok(Self {
            modes,
            params,
            from,
            echo: echo && own_echo.is_none_or(|echo| echo != "false"),
            foreign_serial: serial.is_some() && from.is_none(),
        })
    }
}

fn requested_modes(frame: &Frame) -> Result<u64, ErrorInfo> {
    if let Some(names) = frame.params.get("modes") {
        return names.split(',').map(str::trim).try_fold(0, |modes, name| {
            let known = MODE_NAMES
                .iter()
                .find(|(known, _)| known.eq_ignore_ascii_case(name));
            let (_, mode) = known.ok_or_else(|| {
                ErrorInfo::new(
                    ErrorCode::InvalidParameter,
                    "params.modes names an unknown mode",
                )
            })?;
            Ok(modes | mode)
        });
    }
    match frame.flags.unwrap_or_default() & flags::MODES {
        0 => Ok(DEFAULT_MODES),
        modes => Ok(modes),
    }
}

fn permitted_modes(capability: &Capability, channel: &ChannelName) -> u64 {
    let table = [
        (
            Operation::Subscribe,
            flags::SUBSCRIBE | flags::PRESENCE_SUBSCRIBE,
        ),
        (Operation::Publish, flags::PUBLISH),
        (Operation::Presence, flags::PRESENCE),
    ];
    let permitted = table
        .iter()
        .filter(|(operation, _)| capability.allows(*operation, channel));
    permitted.fold(0, |modes, (_, more)| modes | more)
}

fn mode_names(modes: u64) -> String {
    let granted = MODE_NAMES.iter().filter(|(_, mode)| modes & mode != 0);
    granted.map(|(name, _)| *name).collect::<Vec<_>>().join(",")
}

/// What the owner is doing for a channel.
#[derive(Debug)]
enum Phase {
    Attaching {
        in_place: bool,
    },
    Live,
    /// `answer`: the client waits for DETACHED.
    Detaching {
        answer: bool,
    },
}

#[derive(Debug)]
struct Attachment {
    phase: Phase,
    /// In force, or being brought into force.
    wanted: Wanted,
    /// To be done when the present attach is through, with what `Detaching::answer` says.
    then_detach: Option<bool>,
    /// To be done last.
    then_attach: Option<Wanted>,
}

/// Invariant: at most `max` channels; requests wait only while another is under way.
#[derive(Debug)]
pub(super) struct Attachments {
    channels: BTreeMap<ChannelName, Attachment>,
    max: usize,
}

impl Attachments {
    pub(super) const fn new(max: usize) -> Self {
        Self {
            channels: BTreeMap::new(),
            max,
        }
    }

    /// Modes of the attachment, if there is one or will be.
    pub(super) fn modes(&self, channel: &ChannelName) -> Option<u64> {
        let attachment = self.channels.get(channel)?;
        let leaving = matches!(attachment.phase, Phase::Detaching { .. });
        (!leaving).then_some(attachment.wanted.modes)
    }

    pub(super) fn on_attach(&mut self, name: ChannelName, wanted: Wanted) -> Vec<Effect> {
        if let Some(attachment) = self.channels.get_mut(&name) {
            return match attachment.phase {
                Phase::Live => vec![attachment.start(&name, wanted, true)],
                Phase::Attaching { .. } | Phase::Detaching { .. } => {
                    attachment.then_attach = Some(wanted);
                    vec![]
                }
            };
        }
        if self.channels.len() >= self.max {
            let text = format!("at most {} channels on one connection", self.max);
            let error = ErrorInfo::new(ErrorCode::TooManyChannels, text);
            return vec![channel_error(name.as_str(), &error)];
        }
        let phase = Phase::Attaching { in_place: false };
        let attachment = Attachment {
            phase,
            wanted,
            then_detach: None,
            then_attach: None,
        };
        let effect = attachment.attach(&name, false);
        self.channels.insert(name, attachment);
        vec![effect]
    }

    /// An ATTACH that is refused: the channel has failed for the client, so an attachment it had is given up.
    pub(super) fn on_refused(&mut self, text: &str, error: &ErrorInfo) -> Vec<Effect> {
        let mut effects = self.leave(text, false).unwrap_or_default();
        effects.push(channel_error(text, error));
        effects
    }

    /// Always ends in DETACHED, unless an ATTACH overtakes it.
    pub(super) fn on_detach(&mut self, text: &str) -> Vec<Effect> {
        self.leave(text, true)
            .unwrap_or_else(|| vec![detached(text, None)])
    }

    /// `None` when there is nothing to leave.
    fn leave(&mut self, text: &str, answer: bool) -> Option<Vec<Effect>> {
        let name = ChannelName::parse(text).ok()?;
        let attachment = self.channels.get_mut(&name)?;
        attachment.then_attach = None;
        match &mut attachment.phase {
            Phase::Attaching { .. } => attachment.then_detach = Some(answer),
            Phase::Detaching { answer: owed } => *owed = answer,
            Phase::Live => {
                attachment.phase = Phase::Detaching { answer };
                return Some(vec![Effect::Detach { channel: name }]);
            }
        }
        Some(vec![])
    }

    pub(super) fn on_attached(
        &mut self,
        name: &ChannelName,
        outcome: AttachOutcome,
    ) -> Vec<Effect> {
        let Some(attachment) = self.channels.get_mut(name) else {
            return vec![];
        };
        let Phase::Attaching { in_place } = attachment.phase else {
            return vec![];
        };
        if let Some(answer) = attachment.then_detach.take() {
            attachment.phase = Phase::Detaching { answer };
            return vec![Effect::Detach {
                channel: name.clone(),
            }];
        }
        attachment.phase = Phase::Live;
        let mut effects = vec![attachment.attached(name, outcome, in_place)];
        if let Some(wanted) = attachment.then_attach.take() {
            effects.push(attachment.start(name, wanted, true));
        }
        effects
    }

    pub(super) fn on_detached(&mut self, name: &ChannelName) -> Vec<Effect> {
        self.ended(name, |name| detached(name.as_str(), None))
    }

    pub(super) fn on_failed(&mut self, name: &ChannelName, error: &ErrorInfo) -> Vec<Effect> {
        self.ended(name, |name| match error.code.retry() {
            // A channel ERROR is for good; DETACHED makes the client try again, soon or after a pause.
            Retry::Never => channel_error(name.as_str(), error),
            Retry::Later | Retry::Unknown | Retry::WithNewToken => {
                detached(name.as_str(), Some(error))
            }
        })
    }

    /// The owner no longer has the channel: goes on with what the client asked since, or tells it.
    fn ended(
        &mut self,
        name: &ChannelName,
        unasked: impl Fn(&ChannelName) -> Effect,
    ) -> Vec<Effect> {
        let Some(attachment) = self.channels.get_mut(name) else {
            return vec![];
        };
        if let Some(wanted) = attachment.then_attach.take() {
            attachment.then_detach = None;
            return vec![attachment.start(name, wanted, false)];
        }
        // Whether the client asked to leave, and if so, whether it waits for an answer.
        let asked = match attachment.phase {
            Phase::Detaching { answer } => Some(answer),
            Phase::Attaching { .. } => attachment.then_detach,
            Phase::Live => None,
        };
        let reply = match asked {
            Some(true) => Some(detached(name.as_str(), None)),
            Some(false) => None,
            None => Some(unasked(name)),
        };
        self.channels.remove(name);
        reply.into_iter().collect()
    }

    pub(super) fn on_discontinuity(
        &mut self,
        name: &ChannelName,
        at: Serial,
        error: &ErrorInfo,
    ) -> Vec<Effect> {
        let Some(attachment) = self.channels.get(name) else {
            return vec![];
        };
        if !matches!(attachment.phase, Phase::Live) {
            return vec![];
        }
        vec![attachment.frame(name, at, 0, Some(error))]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.channels.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.channels = BTreeMap::new();
    }

    pub(super) fn check_invariants(&self) {
        assert!(
            self.channels.len() <= self.max,
            "more channels than allowed"
        );
        for (name, attachment) in &self.channels {
            let (detach, attach) = (attachment.then_detach, attachment.then_attach.is_some());
            match attachment.phase {
                Phase::Live => assert!(
                    detach.is_none() && !attach,
                    "{name}: a request waits for nothing"
                ),
                Phase::Detaching { .. } => assert!(detach.is_none(), "{name}: two detaches"),
                Phase::Attaching { .. } => {}
            }
            assert_ne!(
                attachment.wanted.modes, 0,
                "{name}: attached without a mode"
            );
        }
    }
}

impl Attachment {
    fn start(&mut self, name: &ChannelName, wanted: Wanted, in_place: bool) -> Effect {
        self.phase = Phase::Attaching { in_place };
        self.wanted = wanted;
        self.attach(name, in_place)
    }

    fn attach(&self, name: &ChannelName, in_place: bool) -> Effect {
        Effect::Attach {
            channel: name.clone(),
            // In place, the owner's cursor is right: the client's serial is older by what is on its way.
            from: self.wanted.from.filter(|_| !in_place),
            echo: self.wanted.echo,
            subscribe: self.wanted.modes & flags::SUBSCRIBE != 0,
            in_place,
        }
    }

    fn attached(&mut self, name: &ChannelName, outcome: AttachOutcome, in_place: bool) -> Effect {
        let foreign = mem::take(&mut self.wanted.foreign_serial) && !in_place;
        let (flags, error) = match outcome.continuity {
            Continuity::Lost => (0, Some(ErrorCode::ContinuityLost.into())),
            _ if foreign => {
                let text = "channelSerial is not one of this cluster; attached at the present";
                (0, Some(ErrorInfo::new(ErrorCode::ContinuityLost, text)))
            }
            Continuity::Fresh if in_place => (flags::RESUMED, None),
            Continuity::Fresh => (0, None),
            Continuity::Resumed { backlog: true } => (flags::RESUMED | flags::HAS_BACKLOG, None),
            Continuity::Resumed { backlog: false } => (flags::RESUMED, None),
        };
        self.frame(name, outcome.at, flags, error.as_ref())
    }

    fn frame(
        &self,
        name: &ChannelName,
        at: Serial,
        flags: u64,
        error: Option<&ErrorInfo>,
    ) -> Effect {
        Effect::Send(Frame {
            channel_serial: Some(at.to_string()),
            flags: Some(self.wanted.modes | flags),
            params: self.wanted.params.clone(),
            error: error.map(ErrorBody::from),
            ..Frame::of_channel(Action::Attached, name.as_str())
        })
    }
}

fn channel_error(channel: &str, error: &ErrorInfo) -> Effect {
    Effect::Send(Frame {
        error: Some(error.into()),
        ..Frame::of_channel(Action::Error, channel)
    })
}

fn detached(channel: &str, error: Option<&ErrorInfo>) -> Effect {
    Effect::Send(Frame {
        error: error.map(ErrorBody::from),
        ..Frame::of_channel(Action::Detached, channel)
    })
}
