//! A shard: all its channels, and the positions of the Kafka sources that feed them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message as _;

use crate::channel::index::{Behind, Held, Index, KeyDigest, RecordRef};
use crate::channel::{FORGET_AFTER, RETENTION_MIN};
use crate::types::{ChannelKey, ChannelName, Range, Serial};
use crate::wire::entry;

/// A committed entry that this build cannot apply. The replica must stop: going on would make it differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("entry {index} cannot be decoded: {reason}")]
    Undecodable { index: u64, reason: String },
    #[error(
        "entry {index} has version {found}; this build applies up to {}",
        entry::VERSION
    )]
    NewerVersion { index: u64, found: u32 },
    #[error("entry {index} was applied already; the newest applied is {applied}")]
    OutOfOrder { index: u64, applied: u64 },
    #[error("entry {index} holds more publishes than positions")]
    TooManyPublishes { index: u64 },
}

/// What became of one publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Stored(Serial),
    /// Seen before; the first one's serial where it is known by id rather than by source position.
    Duplicate(Option<Serial>),
    /// Read from Kafka by an owner that has been replaced.
    Fenced,
    /// Read from Kafka, and the record it must follow is not here. To be sent again after that one.
    Gap,
    /// Names an app or channel that cannot exist; a correct proposer never sends it.
    Invalid,
}

/// A channel moved on.
#[derive(Clone, Debug)]
pub struct Event {
    pub key: ChannelKey,
    pub record: RecordRef,
    pub publish: entry::Publish,
}

/// What applying one entry did.
#[derive(Debug, Default)]
pub struct Applied {
    /// One for each publish of the entry, in order.
    pub outcomes: Vec<Outcome>,
    pub events: Vec<Event>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SourceState {
    pub(super) epoch: u64,
    pub(super) offset: i64,
}

/// Bridge, topic, partition.
pub(super) type SourceKey = (String, String, i32);

/// The replicated state of one shard at one log position.
///
/// Invariant: `timers` holds exactly one element for each channel, at its index's next change; stamps never go
/// back (`clock_ms` is their maximum).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shard {
    pub(super) incarnation: u16,
    pub(super) applied: u64,
    pub(super) clock_ms: u64,
    pub(super) channels: BTreeMap<ChannelKey, Index>,
    pub(super) timers: BTreeSet<(u64, ChannelKey)>,
    pub(super) sources: BTreeMap<SourceKey, SourceState>,
    /// Publishes in the log that became no record: whoever reads the log itself must skip them.
    pub(super) dropped: BTreeSet<(u64, u16)>,
    pub(super) forgotten: Option<Serial>,
}

impl Shard {
    #[must_use]
    pub fn new(incarnation: u16) -> Self {
        Self {
            incarnation,
            ..Self::default()
        }
    }

    /// Applies the entry at log `index`.
    ///
    /// # Errors
    /// When the entry is not one this build understands; nothing was changed then.
    pub fn apply(&mut self, index: u64, payload: Bytes) -> Result<Applied, Error> {
        if index <= self.applied {
            let applied = self.applied;
            return Err(Error::OutOfOrder { index, applied });
        }
        let entry = decode(index, payload)?;
        self.applied = index;
        self.clock_ms = self.clock_ms.max(entry.stamp_ms);
        let mut applied = Applied::default();
        for (position, publish) in (0_u16..).zip(entry.publishes) {
            let serial = self.serial(index, position);
            let outcome = self.on_publish(serial, publish, &mut applied.events);
            if !matches!(outcome, Outcome::Stored(_)) {
                self.dropped.insert((index, position));
            }
            applied.outcomes.push(outcome);
        }
        self.expire();
        Ok(applied)
    }

    /// Notes that an entry without publishes (blank, membership) lies at `index`.
    pub fn skip(&mut self, index: u64) {
        self.applied = self.applied.max(index);
    }

    fn on_publish(
        &mut self,
        serial: Serial,
        publish: entry::Publish,
        events: &mut Vec<Event>,
    ) -> Outcome {
        let Some(key) = channel_key(&publish) else {
            return Outcome::Invalid;
        };
        if let Some(refused) = publish.source.as_ref().and_then(|at| self.on_source(at)) {
            return refused;
        }
        let digest = digest(
            &publish.id,
            &publish.connection_id,
            publish.source.is_some(),
        );
        let forgotten = self.forgotten;
        let index = self.channels.entry(key.clone());
        // A channel that was forgotten and comes back: its former records may be missed by a reader.
        let index = index.or_insert_with(|| Index {
            floor: forgotten,
            ..Index::default()
        });
        if let Some(first) = index.keys.get(&digest) {
            return Outcome::Duplicate(Some(*first));
        }
        if index.head.is_some() {
            self.timers.remove(&(index.next_change_ms(), key.clone()));
        }
        let predecessor = index.head.or(index.floor);
        let retention_ms = publish.retention_ms.max(millis(RETENTION_MIN));
        let expires_ms = self.clock_ms.saturating_add(retention_ms);
        index.forget_ms = expires_ms.saturating_add(millis(FORGET_AFTER));
        index.push(Held {
            serial,
            stamp_ms: self.clock_ms,
            expires_ms,
            count: publish.count,
            key: digest,
        });
        self.timers.insert((index.next_change_ms(), key.clone()));
        let record = RecordRef {
            serial,
            predecessor,
            stamp_ms: self.clock_ms,
            count: publish.count,
        };
        events.push(Event {
            key,
            record,
            publish,
        });
        Outcome::Stored(serial)
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

    fn expire(&mut self) {
        while let Some((_, key)) = self.timers.pop_first_if_due(self.clock_ms) {
            let Some(index) = self.channels.get_mut(&key) else {
                continue;
            };
            index.expire(self.clock_ms);
            if index.records.is_empty() && index.forget_ms <= self.clock_ms {
                self.forgotten = self.forgotten.max(index.head);
                self.channels.remove(&key);
            } else {
                self.timers.insert((index.next_change_ms(), key));
            }
        }
    }

    const fn serial(&self, index: u64, position: u16) -> Serial {
        Serial {
            incarnation: self.incarnation,
            index,
            position,
        }
    }

    /// Newest log index applied.
    #[must_use]
    pub const fn applied(&self) -> u64 {
        self.applied
    }

    /// Newest stamp applied, milliseconds since 1970.
    #[must_use]
    pub const fn clock_ms(&self) -> u64 {
        self.clock_ms
    }

    /// The place after everything applied: where an attachment that wants only what is to come starts.
    #[must_use]
    pub const fn now(&self) -> Serial {
        self.serial(self.applied, u16::MAX)
    }

    /// Whether time alone will change something here; a leader without publishes then proposes an empty entry.
    #[must_use]
    pub fn has_due(&self, now_ms: u64) -> bool {
        self.timers.first().is_some_and(|(due, _)| *due <= now_ms)
    }

    /// The first serial of a client's publish with this idempotency key, while it is remembered.
    #[must_use]
    pub fn seen(&self, key: &ChannelKey, id: &str, connection_id: &str) -> Option<Serial> {
        let digest = digest(id, connection_id, false);
        self.channels.get(key)?.keys.get(&digest).copied()
    }

    /// Newest record of the channel ever, if the channel is remembered.
    #[must_use]
    pub fn head(&self, key: &ChannelKey) -> Option<Serial> {
        self.channels.get(key)?.head
    }

    /// Up to `limit` records after `cursor`, oldest first.
    ///
    /// # Errors
    /// When records after `cursor` are gone, or may be.
    pub fn after(
        &self,
        key: &ChannelKey,
        cursor: Serial,
        limit: usize,
    ) -> Result<Vec<RecordRef>, Behind> {
        if cursor.incarnation != self.incarnation {
            return Err(Behind { floor: self.now() });
        }
        match (self.channels.get(key), self.forgotten) {
            (Some(index), _) => index.after(cursor, limit),
            (None, Some(floor)) if cursor < floor => Err(Behind { floor }),
            (None, _) => Ok(Vec::new()),
        }
    }

    /// Up to `limit` of the channel's retained records within `range`.
    #[must_use]
    pub fn range(&self, key: &ChannelKey, range: &Range, limit: usize) -> Vec<RecordRef> {
        (self.channels.get(key)).map_or_else(Vec::new, |index| index.range(range, limit))
    }

    /// Whether the publish at this place of the log became no record.
    #[must_use]
    pub fn is_dropped(&self, index: u64, position: u16) -> bool {
        self.dropped.contains(&(index, position))
    }

    /// Channels remembered, and records retained in all of them.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        let records = self.channels.values().map(|index| index.records.len());
        (self.channels.len(), records.sum())
    }

    /// # Panics
    /// When the state contradicts itself: a defect of this room.
    pub fn check_invariants(&self) {
        assert_eq!(self.timers.len(), self.channels.len(), "a timer a channel");
        for (key, index) in &self.channels {
            index.check_invariants();
            assert!(self.timers.contains(&(index.next_change_ms(), key.clone())));
            assert!(index.head.is_some_and(|head| head.index <= self.applied));
        }
    }
}

trait PopDue {
    fn pop_first_if_due(&mut self, now_ms: u64) -> Option<(u64, ChannelKey)>;
}

impl PopDue for BTreeSet<(u64, ChannelKey)> {
    fn pop_first_if_due(&mut self, now_ms: u64) -> Option<(u64, ChannelKey)> {
        let (due, _) = self.first()?;
        if *due <= now_ms {
            self.pop_first()
        } else {
            None
        }
    }
}

fn decode(index: u64, payload: Bytes) -> Result<entry::Entry, Error> {
    let entry = entry::Entry::decode(payload).map_err(|err| Error::Undecodable {
        index,
        reason: err.to_string(),
    })?;
    if entry.version > entry::VERSION {
        let found = entry.version;
        return Err(Error::NewerVersion { index, found });
    }
    if entry.publishes.len() >= usize::from(u16::MAX) {
        return Err(Error::TooManyPublishes { index });
    }
    Ok(entry)
}

fn channel_key(publish: &entry::Publish) -> Option<ChannelKey> {
    Some(ChannelKey {
        app: publish.app.parse().ok()?,
        name: ChannelName::parse(&publish.channel).ok()?,
    })
}

/// Ids that a connection's numbering gives (`connectionId:msgSerial`) and ids that publishers choose never meet: nobody
/// can take another connection's next publish for a repetition by choosing its id first.
/// Records read from Kafka have ids that anybody could foretell: they, too, are apart.
fn digest(id: &str, connection_id: &str, from_kafka: bool) -> KeyDigest {
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

fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
