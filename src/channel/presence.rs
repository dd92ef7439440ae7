//! Who is present in a channel, and which node attends them: what presence events change beside making a record.
//!
//! Members are state, not records: a member is still there when the record of its last event is long gone.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message as _;

use crate::channel::archive::Place;
use crate::channel::ledger::Mixer;
use crate::channel::shard::Outcome;
use crate::stdx::stable_hash;
use crate::types::{ChannelKey, Serial};
use crate::wire::entry;

const ENTER: u32 = 2;
const LEAVE: u32 = 3;
const UPDATE: u32 = 4;

/// A node's process, which attends connections: the node, and the random number that its process drew at its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attendant {
    pub node: u64,
    pub boot: u64,
}

/// A member as readers get it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub connection_id: String,
    pub client_id: String,
    /// Its last event: an encoded [`entry::Message`].
    pub event: Bytes,
    /// The idempotency key of the event's record, and the event's place among the record's events.
    pub id: String,
    pub offset: u32,
    /// Of the event's record.
    pub serial: Serial,
    /// When the event was stored, milliseconds since 1970.
    pub stamp_ms: u64,
}

/// The members of one connection in one channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attended {
    pub key: ChannelKey,
    pub connection_id: String,
    /// In the order of their client ids.
    pub members: Vec<Member>,
}

/// Client id before connection id: the order in which members are listed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct MemberKey {
    pub(super) client_id: String,
    pub(super) connection_id: String,
}

/// A member's last event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub(super) event: Bytes,
    pub(super) id: String,
    pub(super) offset: u32,
    pub(super) place: Place,
    pub(super) stamp_ms: u64,
}

/// Who attends a connection, and whom it brought into the channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attendance {
    pub(super) by: Attendant,
    clients: BTreeSet<String>,
}

/// Who is present in one channel.
///
/// Invariant: `attendances` has exactly the connections of `members`, each with its client ids; `digest` is the wrapping
/// sum of the hashes of all members and attendances.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Presence {
    /// Newest record ever that holds no presence events.
    pub(super) message: Option<Place>,
    members: BTreeMap<MemberKey, Held>,
    attendances: BTreeMap<String, Attendance>,
    digest: u64,
}

/// What a publish changes among the members. At least one of its events has an effect.
#[derive(Debug)]
pub(super) struct Changes {
    /// Who is there with which last event, or is not there any more.
    members: BTreeMap<MemberKey, Option<Held>>,
    /// Who attends their connections from now on, for who enters is here; `None` leaves that as it is.
    by: Option<Attendant>,
}

/// A connection is attended by somebody else, or has no members any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Handover {
    pub(super) connection_id: String,
    pub(super) from: Option<Attendant>,
    pub(super) to: Option<Attendant>,
}

impl Attendant {
    pub(super) const fn of(asked: &entry::Presence) -> Self {
        Self {
            node: asked.node,
            boot: asked.boot,
        }
    }
}

/// What the events of `publish`, stored at `at`, change among those present; or its outcome, when it makes no record.
///
/// An event of a connection that is older than the member's last one, by the connection's own numbers, has no effect: a
/// publish that changed nothing is not remembered, and may come again behind its successors.
pub(super) fn decide(
    now: Option<&Presence>,
    at: Place,
    stamp_ms: u64,
    publish: &entry::Publish,
    asked: &entry::Presence,
) -> Result<Changes, Outcome> {
    let events = events(publish, asked).ok_or(Outcome::Invalid)?;
    let by = Attendant::of(asked);
    let mut changes = Changes {
        members: BTreeMap::new(),
        by: (!asked.if_attended).then_some(by),
    };
    let mut count = now.map_or(0, |now| now.members.len());
    let mut unattended = false;
    for (offset, (change, event)) in (0_u32..).zip(asked.changes.iter().zip(events)) {
        let key = member_key(publish, change).ok_or(Outcome::Invalid)?;
        let known = now.and_then(|now| now.members.get(&key));
        let there = (changes.members.get(&key)).map_or(known.is_some(), Option::is_some);
        let attended = now.and_then(|now| now.attendances.get(&key.connection_id));
        unattended |= asked.if_attended && attended.is_none_or(|attended| attended.by != by);
        let changed = match change.action {
            ENTER | UPDATE if !asked.if_attended => Some(Held {
                // A slice would keep the whole entry in memory.
                event: Bytes::copy_from_slice(&event),
                id: publish.id.clone(),
                offset,
                place: at,
                stamp_ms,
            }),
            LEAVE => None,
            _ => return Err(Outcome::Invalid),
        };
        if known.is_some_and(|known| is_newer(&known.id, publish, &key.connection_id)) {
            continue;
        }
        match (there, changed.is_some()) {
            (false, true) => count += 1,
            (true, false) => count -= 1,
            (true, true) => {}
            (false, false) => continue,
        }
        let max = usize::try_from(asked.members_max).unwrap_or(usize::MAX);
        if !there && max > 0 && count > max {
            return Err(Outcome::Full);
        }
        changes.members.insert(key, changed);
    }
    // Who has a member leave need not be here for the connection's other ones.
    if changes.members.values().all(Option::is_none) {
        changes.by = None;
    }
    match changes.members.is_empty() || unattended {
        true => Err(Outcome::Unchanged),
        false => Ok(changes),
    }
}

/// The events as they were encoded, one for each change. `None` when these do not belong together.
fn events(publish: &entry::Publish, asked: &entry::Presence) -> Option<Vec<Bytes>> {
    let body = entry::RawBody::decode(publish.body.clone()).ok()?;
    let fits = body.version == entry::VERSION
        && body.messages.len() == asked.changes.len()
        && publish.count == u32::try_from(body.messages.len()).ok()?
        && publish.source.is_none();
    fits.then_some(body.messages)
}

fn member_key(publish: &entry::Publish, change: &entry::Change) -> Option<MemberKey> {
    let connection_id = match change.connection_id.is_empty() {
        true => &publish.connection_id,
        false => &change.connection_id,
    };
    let key = MemberKey {
        client_id: change.client_id.clone(),
        connection_id: connection_id.clone(),
    };
    (!key.client_id.is_empty() && !key.connection_id.is_empty()).then_some(key)
}

/// Whether the connection numbered both publishes, and the one with this id after `publish`.
fn is_newer(id: &str, publish: &entry::Publish, connection_id: &str) -> bool {
    let number = |id: &str| {
        let number = id.strip_prefix(connection_id)?.strip_prefix(':')?;
        number.parse::<u64>().ok()
    };
    match (number(id), number(&publish.id)) {
        (Some(known), Some(this)) if publish.connection_id == connection_id => known > this,
        _ => false,
    }
}

impl Presence {
    pub(super) fn new(message: Option<Place>) -> Self {
        Self {
            message,
            ..Self::default()
        }
    }

    pub(super) fn has_members(&self) -> bool {
        !self.members.is_empty()
    }

    pub(super) const fn members(&self) -> &BTreeMap<MemberKey, Held> {
        &self.members
    }

    pub(super) const fn attendances(&self) -> &BTreeMap<String, Attendance> {
        &self.attendances
    }

    /// Hash of everything here.
    pub(super) fn digest(&self) -> u64 {
        Mixer::new(self.digest).maybe(self.message).finish()
    }

    pub(super) fn apply(&mut self, changes: Changes) -> Vec<Handover> {
        let mut before = BTreeMap::new();
        for (key, changed) in changes.members {
            let connection_id = key.connection_id.clone();
            let attendance = self.attendances.get(&connection_id);
            before
                .entry(connection_id)
                .or_insert_with(|| attendance.map(|attendance| attendance.by));
            match changed {
                Some(held) => self.put(key, held, changes.by.unwrap_or_default()),
                None => self.remove(&key),
            }
        }
        let mut handovers = Vec::new();
        for (connection_id, from) in before {
            let attendance = self.attendances.get_mut(&connection_id);
            let to = attendance.map(|attendance| {
                attendance.by = changes.by.unwrap_or(attendance.by);
                attendance.by
            });
            handovers.extend(self.hand_over(connection_id, from, to));
        }
        handovers
    }

    /// Has `by` attend a connection that has members here.
    pub(super) fn attend(&mut self, connection_id: &str, by: Attendant) -> Option<Handover> {
        let attendance = self.attendances.get_mut(connection_id)?;
        let from = Some(std::mem::replace(&mut attendance.by, by));
        self.hand_over(connection_id.to_owned(), from, Some(by))
    }

    /// Adds a member that a checkpoint tells of. Who attends it is to be said next.
    pub(super) fn restore(&mut self, key: MemberKey, held: Held) {
        self.put(key, held, Attendant::default());
    }

    /// Takes who attends a restored connection. `None` when it has no members.
    pub(super) fn restore_attendance(&mut self, connection_id: &str, by: Attendant) -> Option<()> {
        let attendance = self.attendances.get_mut(connection_id)?;
        attendance.by = by;
        let hash = attendance_hash(connection_id, by);
        self.digest = self.digest.wrapping_add(hash);
        Some(())
    }

    /// The members that a connection brought in.
    pub(super) fn of_connection(&self, connection_id: &str) -> Vec<(MemberKey, &Held)> {
        let clients = self.attendances.get(connection_id);
        let clients = clients.into_iter().flat_map(|it| &it.clients);
        let keys = clients.map(|client_id| MemberKey {
            client_id: client_id.clone(),
            connection_id: connection_id.to_owned(),
        });
        keys.filter_map(|key| self.members.get(&key).map(|held| (key, held)))
            .collect()
    }

    fn put(&mut self, key: MemberKey, held: Held, by: Attendant) {
        let attendance = self.attendances.entry(key.connection_id.clone());
        let attendance = attendance.or_insert_with(|| Attendance {
            by,
            clients: BTreeSet::new(),
        });
        attendance.clients.insert(key.client_id.clone());
        self.digest = self.digest.wrapping_add(member_hash(&key, &held));
        let hash = self.members.get(&key).map(|held| member_hash(&key, held));
        self.digest = self.digest.wrapping_sub(hash.unwrap_or(0));
        self.members.insert(key, held);
    }

    fn remove(&mut self, key: &MemberKey) {
        let Some(held) = self.members.remove(key) else {
            return;
        };
        self.digest = self.digest.wrapping_sub(member_hash(key, &held));
        if let Some(attendance) = self.attendances.get_mut(&key.connection_id) {
            attendance.clients.remove(&key.client_id);
            if attendance.clients.is_empty() {
                self.attendances.remove(&key.connection_id);
            }
        }
    }

    fn hand_over(
        &mut self,
        connection_id: String,
        from: Option<Attendant>,
        to: Option<Attendant>,
    ) -> Option<Handover> {
        if from == to {
            return None;
        }
        let hash = |by: Option<Attendant>| by.map_or(0, |by| attendance_hash(&connection_id, by));
        self.digest = (self.digest.wrapping_sub(hash(from))).wrapping_add(hash(to));
        Some(Handover {
            connection_id,
            from,
            to,
        })
    }

    /// # Panics
    /// When those present contradict themselves.
    pub(super) fn check_invariants(&self) {
        let mut clients: BTreeMap<&String, BTreeSet<String>> = BTreeMap::new();
        let mut digest = 0_u64;
        for (key, held) in &self.members {
            let of_connection = clients.entry(&key.connection_id).or_default();
            of_connection.insert(key.client_id.clone());
            digest = digest.wrapping_add(member_hash(key, held));
        }
        for (connection_id, attendance) in &self.attendances {
            let present = clients.remove(connection_id);
            assert_eq!(present.as_ref(), Some(&attendance.clients));
            digest = digest.wrapping_add(attendance_hash(connection_id, attendance.by));
        }
        assert!(clients.is_empty(), "every member is attended");
        assert_eq!(digest, self.digest, "digest of those present");
    }
}

/// A member as readers get it.
pub(super) fn member(key: &MemberKey, held: &Held, incarnation: u16) -> Member {
    Member {
        connection_id: key.connection_id.clone(),
        client_id: key.client_id.clone(),
        event: held.event.clone(),
        id: held.id.clone(),
        offset: held.offset,
        serial: held.place.serial(incarnation),
        stamp_ms: held.stamp_ms,
    }
}

fn member_hash(key: &MemberKey, held: &Held) -> u64 {
    let texts = [
        key.client_id.as_bytes(),
        key.connection_id.as_bytes(),
        held.id.as_bytes(),
        &held.event,
    ];
    let lengths = texts.map(|text| text.len() as u64);
    let mixer = Mixer::new(stable_hash(&texts));
    let mixer = lengths
        .into_iter()
        .fold(mixer, |mixer, len| mixer.word(len));
    (mixer.word(u64::from(held.offset)).place(held.place))
        .word(held.stamp_ms)
        .finish()
}

fn attendance_hash(connection_id: &str, by: Attendant) -> u64 {
    Mixer::new(stable_hash(&[connection_id.as_bytes()]))
        .word(by.node)
        .word(by.boot)
        .finish()
}
