//! What an ATTACH asks for: modes, parameters, where to begin; and what of it a capability grants (§2.5.2, §2.5.3).

use std::collections::BTreeMap;

use crate::auth::{Capability, Operation};
use crate::session::effect::{Effect, Start};
use crate::session::qualified::QualifiedName;
use crate::types::{ChannelName, ErrorCode, ErrorInfo};
use crate::wire::ably::{Frame, flags};

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

/// Most messages that a rewind gives.
const REWIND_MAX: usize = 100;

/// Categories of `params.occupancy` after `metrics.`.
const METRICS: &[&str] = &[
    "connections",
    "publishers",
    "subscribers",
    "presenceConnections",
    "presenceMembers",
    "presenceSubscribers",
    "objectPublishers",
    "objectSubscribers",
];

/// Which occupancy of its channel a client wants to hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occupancy {
    /// All categories.
    Metrics,
    /// One category, by its name in the protocol.
    Metric(&'static str),
}

impl Occupancy {
    fn parse(text: &str) -> Option<Self> {
        let category = text.strip_prefix("metrics")?;
        if category.is_empty() {
            return Some(Self::Metrics);
        }
        let category = category.strip_prefix('.')?;
        let known = METRICS.iter().find(|known| **known == category);
        known.map(|category| Self::Metric(category))
    }

    fn text(self) -> String {
        match self {
            Self::Metrics => "metrics".to_owned(),
            Self::Metric(category) => format!("metrics.{category}"),
        }
    }
}

/// An ATTACH that passed every check that needs no channel state.
///
/// Only what is understood is kept: what is remembered per channel must not be the client's to size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// The channel as the client wrote it.
    pub(super) name: String,
    /// Modes in force: those asked for that the capability permits. Never none.
    pub(super) modes: u64,
    asked: u64,
    start: Start,
    /// The client sent a serial, but none of this cluster's.
    pub(super) foreign_serial: bool,
    pub(super) echo: bool,
    occupancy: Option<Occupancy>,
    /// Whether the capability permits to hear of occupancy.
    metadata: bool,
    /// What ATTACHED tells of the parameters, beside modes and occupancy.
    echoed: BTreeMap<&'static str, String>,
    /// Modes that the client named, in its order.
    named: Vec<(&'static str, u64)>,
}

impl Wanted {
    /// `echo` is the connection's.
    ///
    /// # Errors
    /// `InvalidParameter` for an unknown mode or a rewind that is none, `CapabilityDenied` when nothing that is asked for is
    /// allowed.
    pub(super) fn of_frame(
        frame: &Frame,
        channel: &QualifiedName,
        capability: &Capability,
        echo: bool,
    ) -> Result<Self, ErrorInfo> {
        let param = |name: &str| {
            let own = frame.params.get(name);
            own.or_else(|| channel.params.get(name)).map(String::as_str)
        };
        let named = named_modes(param("modes"))?;
        let asked = requested_modes(&named, frame.flags);
        let rewind = param("rewind")
            .map(|rewind| parse_rewind(rewind, param("rewindLimit")))
            .transpose()?;
        let own_echo = param("echo").filter(|value| matches!(*value, "true" | "false"));
        let mut echoed = BTreeMap::new();
        if let Some(echo) = own_echo {
            echoed.insert("echo", echo.to_owned());
        }
        if let (Some(text), Some(_)) = (param("rewind"), rewind) {
            echoed.insert("rewind", text.to_owned());
            echoed.extend(param("rewindLimit").map(|limit| ("rewindLimit", limit.to_owned())));
        }
        let serial = frame.channel_serial.as_deref().filter(|s| !s.is_empty());
        let from = serial.and_then(|serial| serial.parse().ok());
        let attached_before = frame.flags.unwrap_or_default() & flags::ATTACH_RESUME != 0;
        let mut wanted = Self {
            name: frame.channel.clone().unwrap_or_default(),
            modes: 0,
            asked,
            start: match (from, rewind) {
                (Some(from), _) => Start::After(from),
                (None, Some(rewind)) if serial.is_none() && !attached_before => rewind,
                (None, _) => Start::Present,
            },
            foreign_serial: serial.is_some() && from.is_none(),
            echo: echo && own_echo != Some("false"),
            occupancy: param("occupancy").and_then(Occupancy::parse),
            metadata: false,
            echoed,
            named,
        };
        wanted.grant(capability, &channel.name);
        if wanted.modes == 0 {
            return Err(denied(&channel.name));
        }
        Ok(wanted)
    }

    /// Sets what a capability permits of what was asked for; whether that changed anything. Nothing may be left.
    pub(super) fn grant(&mut self, capability: &Capability, channel: &ChannelName) -> bool {
        let former = (self.modes, self.occupancy());
        self.modes = self.asked & permitted_modes(capability, channel);
        self.metadata = capability.allows(Operation::ChannelMetadata, channel);
        former != (self.modes, self.occupancy())
    }

    pub(super) fn occupancy(&self) -> Option<Occupancy> {
        let heard = self.metadata && self.modes & flags::SUBSCRIBE != 0;
        self.occupancy.filter(|_| heard)
    }

    pub(super) const fn has(&self, mode: u64) -> bool {
        self.modes & mode != 0
    }

    /// The parameters that were understood, as ATTACHED tells them.
    pub(super) fn params(&self) -> BTreeMap<String, String> {
        let echoed = self.echoed.iter();
        let mut params: BTreeMap<String, String> = echoed
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect();
        if !self.named.is_empty() {
            params.insert("modes".to_owned(), self.granted_names());
        }
        if let Some(occupancy) = self.occupancy() {
            params.insert("occupancy".to_owned(), occupancy.text());
        }
        params
    }

    /// What was named and granted, as the client named it: client libraries compare the text.
    fn granted_names(&self) -> String {
        let granted = self.named.iter().filter(|(_, mode)| self.has(*mode));
        granted.map(|(name, _)| *name).collect::<Vec<_>>().join(",")
    }

    pub(super) fn attach(&self, channel: &ChannelName, in_place: bool) -> Effect {
        let rewinds = matches!(self.start, Start::Rewind { .. });
        // In place, the owner's cursor is right: the client's serial is older by what is on its way.
        let present = in_place || (rewinds && !self.has(flags::SUBSCRIBE));
        Effect::Attach {
            channel: channel.clone(),
            start: if present { Start::Present } else { self.start },
            echo: self.echo,
            subscribe: self.has(flags::SUBSCRIBE),
            presence_subscribe: self.has(flags::PRESENCE_SUBSCRIBE),
            members: self.has(flags::PRESENCE | flags::PRESENCE_SUBSCRIBE),
            in_place,
        }
    }
}

pub(super) fn denied(channel: &ChannelName) -> ErrorInfo {
    let text = format!("none of the requested modes is permitted on `{channel}`");
    ErrorInfo::new(ErrorCode::CapabilityDenied, text)
}

/// The modes of `params.modes`, in their order and each once.
fn named_modes(names: Option<&str>) -> Result<Vec<(&'static str, u64)>, ErrorInfo> {
    let mut named = Vec::new();
    for name in names.into_iter().flat_map(|names| names.split(',')) {
        let known = MODE_NAMES
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name.trim()));
        let known = known.ok_or_else(|| invalid("params.modes names an unknown mode"))?;
        if !named.contains(known) {
            named.push(*known);
        }
    }
    Ok(named)
}

fn requested_modes(named: &[(&str, u64)], flags: Option<u64>) -> u64 {
    if !named.is_empty() {
        return named.iter().fold(0, |modes, (_, mode)| modes | mode);
    }
    match flags.unwrap_or_default() & flags::MODES {
        0 => DEFAULT_MODES,
        modes => modes,
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

/// `N` messages, or those of the last `N` seconds (`Ns`) or minutes (`Nm`).
fn parse_rewind(text: &str, limit: Option<&str>) -> Result<Start, ErrorInfo> {
    let unreadable = || invalid("params.rewind is not a number, or one with `s` or `m`");
    let limit = limit.map_or(Some(REWIND_MAX), |limit| {
        small(limit).and_then(|limit| usize::try_from(limit).ok())
    });
    let limit = limit.ok_or_else(|| invalid("params.rewindLimit is not a number"))?;
    let limit = limit.min(REWIND_MAX);
    let within = |text, unit_ms| small(text).map(|n| n * unit_ms).ok_or_else(unreadable);
    let (count, within_ms) = if let Some(seconds) = text.strip_suffix('s') {
        (limit, Some(within(seconds, 1000)?))
    } else if let Some(minutes) = text.strip_suffix('m') {
        (limit, Some(within(minutes, 60_000)?))
    } else {
        let count = within(text, 1)?;
        (
            usize::try_from(count).unwrap_or(REWIND_MAX).min(REWIND_MAX),
            None,
        )
    };
    if count == 0 || within_ms == Some(0) {
        return Ok(Start::Present);
    }
    Ok(Start::Rewind { count, within_ms })
}

/// Digits only, and few enough that no unit makes the number overflow.
fn small(text: &str) -> Option<u64> {
    let digits = (1..=9).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

fn invalid(what: &str) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::InvalidParameter, what)
}
