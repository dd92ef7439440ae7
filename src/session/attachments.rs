//! The channels of one connection: what the client asked for, what it was granted, what is under way (§2.5.2).
//!
//! The owner works on one request per channel at a time; what the client asks meanwhile waits here, and only
//! the newest of it: a client that has sent ATTACH after DETACH no longer waits for DETACHED, and would take one for a
//! failure of its ATTACH.
//!
//! A connection is attached to a channel once. A client that writes its name in two ways (`a`, `[?rewind=1]a`) has the
//! attachment under the newer one, and is told by ERROR that the older one is over.

use std::collections::BTreeMap;
use std::mem;

use crate::auth::Capability;
use crate::session::effect::{AttachOutcome, Continuity, Delivery, Effect};
use crate::session::presence::Presence;
use crate::session::sync;
use crate::session::wanted::{Wanted, denied};
use crate::types::{ChannelName, ErrorCode, ErrorInfo, Retry, Serial};
use crate::wire::ably::{Action, ErrorBody, Frame, PresenceMessage, flags};

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
    /// The client asked for the members, and the owner is reading them.
    syncing: bool,
}

/// Invariant: at most `max` channels; requests wait only while another is under way.
#[derive(Debug)]
pub(super) struct Attachments {
    channels: BTreeMap<ChannelName, Attachment>,
    max: usize,
    syncs: u64,
}

impl Attachments {
    pub(super) const fn new(max: usize) -> Self {
        Self {
            channels: BTreeMap::new(),
            max,
            syncs: 0,
        }
    }

    /// Modes of the attachment, if there is one or will be.
    pub(super) fn modes(&self, channel: &ChannelName) -> Option<u64> {
        let attachment = self.channels.get(channel)?;
        let leaving = matches!(attachment.phase, Phase::Detaching { .. });
        (!leaving).then_some(attachment.wanted.modes)
    }

    /// What of the channel is to be written now; `None`: nothing.
    pub(super) fn delivery(&self, channel: &ChannelName) -> Option<Delivery<'_>> {
        let attachment = self.channels.get(channel)?;
        let wanted = &attachment.wanted;
        let began = matches!(
            attachment.phase,
            Phase::Live | Phase::Attaching { in_place: true }
        );
        began.then_some(Delivery {
            name: &wanted.name,
            messages: wanted.has(flags::SUBSCRIBE),
            echo: wanted.echo,
            presence: wanted.has(flags::PRESENCE_SUBSCRIBE),
            occupancy: wanted.occupancy(),
            modes: wanted.modes,
        })
    }

    pub(super) fn on_attach(&mut self, name: ChannelName, wanted: Wanted) -> Vec<Effect> {
        if let Some(attachment) = self.channels.get_mut(&name) {
            let mut effects = attachment.renamed(&wanted);
            match attachment.phase {
                Phase::Live => effects.push(attachment.start(&name, wanted, true)),
                Phase::Attaching { .. } | Phase::Detaching { .. } => {
                    attachment.then_attach = Some(wanted);
                }
            }
            return effects;
        }
        if self.channels.len() >= self.max {
            let text = format!("at most {} channels on one connection", self.max);
            let error = ErrorInfo::new(ErrorCode::TooManyChannels, text);
            return vec![channel_error(&wanted.name, &error)];
        }
        let effect = wanted.attach(&name, false);
        let attachment = Attachment {
            phase: Phase::Attaching { in_place: false },
            wanted,
            then_detach: None,
            then_attach: None,
            syncing: false,
        };
        self.channels.insert(name, attachment);
        vec![effect]
    }

    /// An ATTACH that is refused: the channel has failed for the client, so an attachment it had is given up.
    pub(super) fn on_refused(
        &mut self,
        name: Option<&ChannelName>,
        text: &str,
        error: &ErrorInfo,
        presence: &mut Presence,
    ) -> Vec<Effect> {
        let left = name.and_then(|name| self.leave(name, text, false, presence));
        let mut effects = left.unwrap_or_default();
        effects.push(channel_error(text, error));
        effects
    }

    /// Always ends in DETACHED, unless an ATTACH overtakes it.
    pub(super) fn on_detach(
        &mut self,
        name: Option<&ChannelName>,
        text: &str,
        presence: &mut Presence,
    ) -> Vec<Effect> {
        let left = name.and_then(|name| self.leave(name, text, true, presence));
        left.unwrap_or_else(|| vec![detached(text, None)])
    }

    /// `None` when there is nothing to leave that the client calls by this name.
    fn leave(
        &mut self,
        name: &ChannelName,
        text: &str,
        answer: bool,
        presence: &mut Presence,
    ) -> Option<Vec<Effect>> {
        let attachment = self.channels.get_mut(name)?;
        if attachment.newest_name() != text {
            return None;
        }
        // From now on the answer goes to whom the newest request came from.
        if let Some(wanted) = attachment.then_attach.take() {
            attachment.wanted.name = wanted.name;
        }
        match &mut attachment.phase {
            Phase::Attaching { .. } => attachment.then_detach = Some(answer),
            Phase::Detaching { answer: owed } => *owed = answer,
            Phase::Live => return Some(attachment.detach(name, answer, presence)),
        }
        Some(vec![])
    }

    pub(super) fn on_attached(
        &mut self,
        name: &ChannelName,
        outcome: AttachOutcome,
        presence: &mut Presence,
        now_ms: u64,
    ) -> Vec<Effect> {
        let Some(attachment) = self.channels.get_mut(name) else {
            return vec![];
        };
        let Phase::Attaching { in_place } = attachment.phase else {
            return vec![];
        };
        let found = !in_place && presence.found(name, &outcome.members);
        if let Some(answer) = attachment.then_detach.take() {
            return attachment.detach(name, answer, presence);
        }
        attachment.phase = Phase::Live;
        let next = attachment.then_attach.take();
        let mut effects = Vec::new();
        if found {
            effects.push(Effect::Attend {
                channel: name.clone(),
            });
        }
        if next
            .as_ref()
            .is_none_or(|next| next.name == attachment.wanted.name)
        {
            self.syncs += 1;
            let token = sync::token(now_ms, self.syncs);
            effects.extend(attachment.attached(outcome, in_place, &token));
        }
        effects.extend(next.map(|wanted| attachment.start(name, wanted, true)));
        effects
    }

    pub(super) fn on_detached(
        &mut self,
        name: &ChannelName,
        presence: &mut Presence,
    ) -> Vec<Effect> {
        self.ended(name, presence, |text| detached(text, None))
    }

    pub(super) fn on_failed(
        &mut self,
        name: &ChannelName,
        error: &ErrorInfo,
        presence: &mut Presence,
    ) -> Vec<Effect> {
        self.ended(name, presence, |text| match error.code.retry() {
            // A channel ERROR is for good; DETACHED makes the client try again, soon or after a pause.
            Retry::Never => channel_error(text, error),
            Retry::Later | Retry::Unknown | Retry::WithNewToken => detached(text, Some(error)),
        })
    }

    /// The owner no longer has the channel: goes on with what the client asked since, or tells it.
    fn ended(
        &mut self,
        name: &ChannelName,
        presence: &mut Presence,
        unasked: impl Fn(&str) -> Effect,
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
        let text = &attachment.wanted.name;
        let reply = match asked {
            Some(true) => Some(detached(text, None)),
            Some(false) => None,
            None => Some(unasked(text)),
        };
        // Nobody is a member of a channel that its connection has left. After a failure that passes the client attaches again,
        // and enters its members again.
        self.channels.remove(name);
        presence.depart(name).into_iter().chain(reply).collect()
    }

    pub(super) fn on_discontinuity(
        &mut self,
        name: &ChannelName,
        at: Serial,
        members: Vec<PresenceMessage>,
        error: &ErrorInfo,
        now_ms: u64,
    ) -> Vec<Effect> {
        let Some(attachment) = self.channels.get(name) else {
            return vec![];
        };
        if !matches!(attachment.phase, Phase::Live) {
            return vec![];
        }
        self.syncs += 1;
        let token = sync::token(now_ms, self.syncs);
        attachment.tell(at, 0, Some(error), members, &token)
    }

    /// The client asks for the members.
    pub(super) fn on_sync(&mut self, name: &ChannelName) -> Vec<Effect> {
        match self.channels.get_mut(name) {
            Some(attachment) if attachment.can_sync() && !attachment.syncing => {
                attachment.syncing = true;
                vec![Effect::Members {
                    channel: name.clone(),
                }]
            }
            _ => vec![],
        }
    }

    /// The members that the client asked for; `None`: they cannot be read, and it has to ask again.
    pub(super) fn on_members(
        &mut self,
        name: &ChannelName,
        members: Option<Vec<PresenceMessage>>,
        now_ms: u64,
    ) -> Vec<Effect> {
        let Some(attachment) = self.channels.get_mut(name) else {
            return vec![];
        };
        let asked = mem::take(&mut attachment.syncing);
        let Some(members) = members.filter(|_| asked && attachment.can_sync()) else {
            return vec![];
        };
        self.syncs += 1;
        let token = sync::token(now_ms, self.syncs);
        let pages = sync::pages(&attachment.wanted.name, members, &token);
        pages.into_iter().map(Effect::Send).collect()
    }

    /// The client may do more or less than before: recomputes the modes of every attachment.
    pub(super) fn on_capability(
        &mut self,
        capability: &Capability,
        presence: &mut Presence,
    ) -> Vec<Effect> {
        let names: Vec<ChannelName> = self.channels.keys().cloned().collect();
        let mut effects = Vec::new();
        for name in names {
            if let Some(attachment) = self.channels.get_mut(&name) {
                effects.extend(attachment.regrant(&name, capability, presence));
            }
        }
        effects
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
            let leaving = matches!(attachment.phase, Phase::Detaching { .. }) || detach.is_some();
            assert!(
                leaving || attachment.wanted.modes != 0,
                "{name}: attached without a mode"
            );
        }
    }
}

impl Attachment {
    /// What the client called the channel last.
    fn newest_name(&self) -> &str {
        &self.then_attach.as_ref().unwrap_or(&self.wanted).name
    }

    /// Tells the client that what it attached under another name is over, unless it is leaving that anyway.
    fn renamed(&self, wanted: &Wanted) -> Vec<Effect> {
        let leaving = self.then_attach.is_none()
            && (self.then_detach.is_some() || matches!(self.phase, Phase::Detaching { .. }));
        let former = self.newest_name();
        if former == wanted.name {
            return vec![];
        }
        if leaving {
            return vec![detached(former, None)];
        }
        let text = format!(
            "the channel was attached under another name, `{}`",
            wanted.name
        );
        vec![channel_error(
            former,
            &ErrorInfo::new(ErrorCode::BadRequest, text),
        )]
    }

    fn start(&mut self, name: &ChannelName, wanted: Wanted, in_place: bool) -> Effect {
        self.phase = Phase::Attaching { in_place };
        self.wanted = wanted;
        self.wanted.attach(name, in_place)
    }

    fn detach(&mut self, name: &ChannelName, answer: bool, presence: &mut Presence) -> Vec<Effect> {
        self.phase = Phase::Detaching { answer };
        let mut effects: Vec<Effect> = presence.depart(name).into_iter().collect();
        effects.push(Effect::Detach {
            channel: name.clone(),
        });
        effects
    }

    fn can_sync(&self) -> bool {
        matches!(self.phase, Phase::Live) && self.wanted.has(flags::PRESENCE_SUBSCRIBE)
    }

    fn attached(&mut self, outcome: AttachOutcome, in_place: bool, token: &str) -> Vec<Effect> {
        let foreign = mem::take(&mut self.wanted.foreign_serial) && !in_place;
        let (flags, error) = match outcome.continuity {
            Continuity::Lost => (0, Some(ErrorCode::ContinuityLost.into())),
            _ if foreign => {
                let text = "channelSerial is not one of this cluster; attached at the present";
                (0, Some(ErrorInfo::new(ErrorCode::ContinuityLost, text)))
            }
            Continuity::Fresh { .. } if in_place => (flags::RESUMED, None),
            Continuity::Fresh { backlog: true } => (flags::HAS_BACKLOG, None),
            Continuity::Fresh { backlog: false } => (0, None),
            Continuity::Resumed { backlog: true } => (flags::RESUMED | flags::HAS_BACKLOG, None),
            Continuity::Resumed { backlog: false } => (flags::RESUMED, None),
        };
        self.tell(outcome.at, flags, error.as_ref(), outcome.members, token)
    }

    /// ATTACHED, and the members if the client wants them.
    fn tell(
        &self,
        at: Serial,
        flags: u64,
        error: Option<&ErrorInfo>,
        members: Vec<PresenceMessage>,
        token: &str,
    ) -> Vec<Effect> {
        let syncs = self.wanted.has(flags::PRESENCE_SUBSCRIBE) && !members.is_empty();
        let presence = if syncs { flags::HAS_PRESENCE } else { 0 };
        let attached = Frame {
            channel_serial: Some(at.to_string()),
            flags: Some(self.wanted.modes | flags | presence),
            params: self.wanted.params(),
            error: error.map(ErrorBody::from),
            ..Frame::of_channel(Action::Attached, &*self.wanted.name)
        };
        let mut frames = vec![attached];
        if syncs {
            frames.extend(sync::pages(&self.wanted.name, members, token));
        }
        frames.into_iter().map(Effect::Send).collect()
    }

    /// Brings the modes in line with a new capability. What is in force changes at once; what the owner has to do for
    /// it is an attach in place, of which the client hears as of any other.
    fn regrant(
        &mut self,
        name: &ChannelName,
        capability: &Capability,
        presence: &mut Presence,
    ) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Some(wanted) = &mut self.then_attach {
            wanted.grant(capability, name);
            if wanted.modes == 0 {
                effects.push(channel_error(&wanted.name, &denied(name)));
                self.then_attach = None;
                match &mut self.phase {
                    Phase::Detaching { answer } => *answer = false,
                    Phase::Attaching { .. } | Phase::Live => self.then_detach = Some(false),
                }
            }
        }
        if matches!(self.phase, Phase::Detaching { .. }) || self.then_detach.is_some() {
            return effects;
        }
        let had_presence = self.wanted.has(flags::PRESENCE);
        let changed = self.wanted.grant(capability, name);
        if had_presence && !self.wanted.has(flags::PRESENCE) {
            effects.extend(presence.depart(name));
        }
        if self.wanted.modes == 0 {
            effects.extend(self.give_up(name, presence));
        } else if changed {
            match self.phase {
                Phase::Live => effects.push(self.start(name, self.wanted.clone(), true)),
                Phase::Attaching { .. } if self.then_attach.is_none() => {
                    self.then_attach = Some(self.wanted.clone());
                }
                Phase::Attaching { .. } | Phase::Detaching { .. } => {}
            }
        }
        effects
    }

    /// No mode is left: the channel has failed for the client, unless it has asked for something else since.
    fn give_up(&mut self, name: &ChannelName, presence: &mut Presence) -> Vec<Effect> {
        let error = channel_error(&self.wanted.name, &denied(name));
        match self.phase {
            Phase::Live => {
                let mut effects = self.detach(name, false, presence);
                effects.push(error);
                effects
            }
            Phase::Attaching { .. } | Phase::Detaching { .. } => {
                self.then_detach = Some(false);
                let waits = self.then_attach.is_some();
                (!waits).then_some(error).into_iter().collect()
            }
        }
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
