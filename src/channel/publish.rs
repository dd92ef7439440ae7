//! What becomes of one publish of an entry.

use std::io;

use bytes::Bytes;
use prost::Message as _;

use crate::channel::RETENTION_MIN;
use crate::channel::archive::{Archived, Place};
use crate::channel::held::{KeyDigest, retention_s};
use crate::channel::index::{Index, Rule, millis};
use crate::channel::presence::{self, Attendant, Changes, Handover};
use crate::channel::read::RecordRef;
use crate::channel::shard::{Error, Event, Outcome, Shard, SourceState};
use crate::types::{ChannelKey, ChannelName, Serial};
use crate::wire::entry;

impl Shard {
    pub(super) fn on_publish(
        &mut self,
        at: Place,
        publish: entry::Publish,
        events: &mut Vec<Event>,
    ) -> io::Result<Outcome> {
        let outcome = match &publish.moved {
            Some(moved) => match self.on_moved(at, &publish, moved)? {
                true => return Ok(Outcome::Moved),
                // Dropped, so that a replica that is rebuilt does not take it for a record.
                false => Outcome::Moved,
            },
            None => self.on_new(at, publish, events)?,
        };
        if !matches!(outcome, Outcome::Stored(_)) {
            self.dropped.insert((at.index, at.position));
        }
        Ok(outcome)
    }

    fn on_new(
        &mut self,
        at: Place,
        publish: entry::Publish,
        events: &mut Vec<Event>,
    ) -> io::Result<Outcome> {
        let Some(key) = channel_key(&publish) else {
            return Ok(Outcome::Invalid);
        };
        let changes = match self.on_presence(&key, at, &publish)? {
            Ok(changes) => changes,
            Err(outcome) => return Ok(outcome),
        };
        if let Some(refused) = publish.source.as_ref().and_then(|at| self.on_source(at)) {
            return Ok(refused);
        }
        let record = record(at, at, self.clock_ms, &publish);
        let forgotten = self.forgotten;
        let index = self.channels.entry(key.clone());
        // A channel that was forgotten and comes back: its former records may be missed by a reader.
        let index = index.or_insert_with_key(|key| Index::new(key, forgotten));
        // Presence events were looked for already.
        if changes.is_none()
            && let Some(first) = index.find(&record.key, Some(at), &*self.archive)?
        {
            let first = first.serial(self.incarnation);
            return Ok(Outcome::Duplicate(Some(first)));
        }
        if index.head.is_some() {
            self.timers.remove(&(index.next_change_ms(), key.clone()));
            self.channels_digest = self.channels_digest.wrapping_sub(index.digest());
        }
        let predecessor = index.head.or(index.floor);
        index.push(&record, rule(&publish), &mut self.ledger);
        let presence = index.presence.as_mut();
        let handovers = presence
            .zip(changes)
            .map(|(now, changes)| now.apply(changes));
        self.timers.insert((index.next_change_ms(), key.clone()));
        self.channels_digest = self.channels_digest.wrapping_add(index.digest());
        for handover in handovers.into_iter().flatten() {
            self.note_handover(&key, handover);
        }
        let record = RecordRef::new(&record, predecessor, self.incarnation);
        let serial = record.serial;
        events.push(Event {
            key,
            record,
            publish,
        });
        Ok(Outcome::Stored(serial))
    }

    /// What the publish changes among those present, `None` when it holds messages; or its outcome, when it makes no record.
    fn on_presence(
        &mut self,
        key: &ChannelKey,
        at: Place,
        publish: &entry::Publish,
    ) -> io::Result<Result<Option<Changes>, Outcome>> {
        let Some(asked) = &publish.presence else {
            return Ok(Ok(None));
        };
        if asked.changes.is_empty() {
            self.on_attend(key, publish, asked);
            return Ok(Err(Outcome::Unchanged));
        }
        let Some(index) = self.channels.get(key) else {
            return Ok(presence::decide(None, at, self.clock_ms, publish, asked).map(Some));
        };
        // What was stored once is not decided again.
        let digest = digest(
            &publish.id,
            &publish.connection_id,
            publish.source.is_some(),
        );
        if let Some(first) = index.find(&digest, Some(at), &*self.archive)? {
            return Ok(Err(Outcome::Duplicate(Some(
                first.serial(self.incarnation),
            ))));
        }
        let now = index.presence.as_deref();
        Ok(presence::decide(now, at, self.clock_ms, publish, asked).map(Some))
    }

    /// Another node attends the publisher's connection from now on.
    fn on_attend(&mut self, key: &ChannelKey, publish: &entry::Publish, asked: &entry::Presence) {
        let Some(index) = self.channels.get_mut(key).filter(|_| !asked.if_attended) else {
            return;
        };
        let before = index.digest();
        let presence = index.presence.as_mut();
        let handover =
            presence.and_then(|now| now.attend(&publish.connection_id, Attendant::of(asked)));
        self.channels_digest = self.channels_digest.wrapping_sub(before);
        self.channels_digest = self.channels_digest.wrapping_add(index.digest());
        if let Some(handover) = handover {
            self.note_handover(key, handover);
        }
    }

    fn note_handover(&mut self, key: &ChannelKey, handover: Handover) {
        let of = (key.clone(), handover.connection_id);
        if let Some(from) = handover.from
            && let Some(of_node) = self.attending.get_mut(&from)
        {
            of_node.remove(&of);
            if of_node.is_empty() {
                self.attending.remove(&from);
            }
        }
        if let Some(to) = handover.to {
            self.attending.entry(to).or_default().insert(of);
        }
    }

    /// Whether the publish is a retained record, whose payload lies at `at` from now on. It counts only when it is that
    /// record to the byte, so that a replica that knows nothing else of the record gets it from here.
    fn on_moved(
        &mut self,
        at: Place,
        publish: &entry::Publish,
        moved: &entry::Moved,
    ) -> io::Result<bool> {
        let (Some(key), Some(first)) = (channel_key(publish), first_place(moved)) else {
            return Ok(false);
        };
        let Some(index) = self.channels.get_mut(&key) else {
            return Ok(false);
        };
        let Some(record) = index.get(first, &*self.archive)? else {
            return Ok(false);
        };
        let same = Archived {
            now: record.now,
            ..self::record(at, first, moved.stamp_ms, publish)
        };
        if record != same {
            return Ok(false);
        }
        index.move_to(&record, at, &mut self.ledger);
        if index.is_cold(first) {
            self.moved_cold.insert(key);
        }
        Ok(true)
    }

    /// Moves the source on, or says why the record does not count.
    fn on_source(&mut self, at: &entry::Source) -> Option<Outcome> {
        let key = (at.bridge.clone(), at.topic.clone(), at.partition);
        let fresh = SourceState {
            epoch: at.epoch,
            offset: i64::MIN,
        };
        let state = self.sources.entry(key).or_insert(fresh);
        if at.epoch < state.epoch {
            return Some(Outcome::Fenced);
        }
        state.epoch = at.epoch;
        if at.offset <= state.offset {
            return Some(Outcome::Duplicate(None));
        }
        if at.after.is_some_and(|after| state.offset < after) {
            return Some(Outcome::Gap);
        }
        state.offset = at.offset;
        None
    }

    /// The first serial of a client's publish with this idempotency key, while it is remembered. `None` also when it
    /// cannot be told now: applying the publish decides.
    #[must_use]
    pub fn seen(&self, key: &ChannelKey, id: &str, connection_id: &str) -> Option<Serial> {
        let digest = digest(id, connection_id, false);
        let index = self.channels.get(key)?;
        let found = index.find(&digest, None, &*self.archive);
        Some(found.ok()??.serial(self.incarnation))
    }

    /// What `publish`, read from this place of the log, needs as its `moved` to be appended again. `None` when the place
    /// is not where a retained record's payload lies now, or when that cannot be told.
    #[must_use]
    pub fn movable(
        &self,
        index: u64,
        position: u16,
        publish: &entry::Publish,
    ) -> Option<entry::Moved> {
        let at = Place { index, position };
        let first = match &publish.moved {
            Some(moved) => first_place(moved)?,
            None => at,
        };
        let index = self.channels.get(&channel_key(publish)?)?;
        let record = index.get(first, &*self.archive).ok()??;
        (record.now == at).then(|| entry::Moved {
            index: first.index,
            position: u32::from(first.position),
            stamp_ms: record.stamp_ms,
        })
    }
}

pub(super) fn decode(index: u64, payload: Bytes) -> Result<entry::Entry, Error> {
    let entry = entry::Entry::decode(payload).map_err(|err| Error::Undecodable {
        index,
        reason: err.to_string(),
    })?;
    if entry.version > entry::VERSION_MAX {
        let found = entry.version;
        return Err(Error::NewerVersion { index, found });
    }
    if entry.publishes.len() >= usize::from(u16::MAX) {
        return Err(Error::TooManyPublishes { index });
    }
    Ok(entry)
}

pub(super) fn channel_key(publish: &entry::Publish) -> Option<ChannelKey> {
    Some(ChannelKey {
        app: publish.app.parse().ok()?,
        name: ChannelName::parse(&publish.channel).ok()?,
    })
}

pub(super) fn first_place(moved: &entry::Moved) -> Option<Place> {
    Some(Place {
        index: moved.index,
        position: u16::try_from(moved.position).ok()?,
    })
}

const fn rule(publish: &entry::Publish) -> Rule {
    Rule {
        retention_bytes: publish.retention_bytes,
        last_only: publish.last_only,
    }
}

/// The record that `publish` makes, with its payload at `now`.
pub(super) fn record(
    now: Place,
    first: Place,
    stamp_ms: u64,
    publish: &entry::Publish,
) -> Archived {
    let shortest_ms = millis(RETENTION_MIN);
    let retention_ms = match publish.ephemeral {
        true => shortest_ms,
        false => publish.retention_ms.max(shortest_ms),
    };
    let from_kafka = publish.source.is_some();
    Archived {
        first,
        now,
        stamp_ms,
        retention_s: retention_s(retention_ms),
        bytes: u32::try_from(publish.body.len()).unwrap_or(u32::MAX),
        count: u16::try_from(publish.count).unwrap_or(u16::MAX),
        ephemeral: publish.ephemeral,
        presence: publish.presence.is_some(),
        key: digest(&publish.id, &publish.connection_id, from_kafka),
    }
}

/// Ids that a connection's numbering gives (`connectionId:msgSerial`) and ids that publishers choose never meet: nobody
/// can take another connection's next publish for a repetition by choosing its id first.
/// Records read from Kafka have ids that anybody could foretell: they, too, are apart.
pub(super) fn digest(id: &str, connection_id: &str, from_kafka: bool) -> KeyDigest {
    let numbered = !connection_id.is_empty()
        && id
            .strip_prefix(connection_id)
            .is_some_and(|rest| rest.starts_with(':'));
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let kind = match (from_kafka, numbered) {
        (true, _) => 2,
        (false, true) => 1,
        (false, false) => 0,
    };
    context.update(&[kind]);
    context.update(id.as_bytes());
    let mut key = KeyDigest::default();
    key.copy_from_slice(&context.finish().as_ref()[..16]);
    key
}
