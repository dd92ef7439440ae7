//! One channel's index into the shard's log, over both tiers: newer records in memory, older ones in the archive.

use std::collections::BTreeMap;
use std::io;

use crate::channel::archive::{Archive, Archived, ChannelId, Place};
use crate::channel::held::{Held, KeyDigest, expires_ms};
use crate::channel::ledger::{Counts, Ledger, Mixer};
use crate::channel::presence::Presence;
use crate::channel::records::Records;
use crate::channel::{FORGET_AFTER, RETENTION_MIN};
use crate::stdx::stable_hash;
use crate::types::ChannelKey;

/// Entries of the archive read at a time, at most.
pub(super) const PAGE: usize = 256;

/// The older records of a channel, which lie in the archive.
///
/// Invariant: `count` is at least 1; they are all those above the channel's floor up to `through`. The archive may hold
/// others above `through`, from before a restart; they do not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cold {
    pub(super) id: ChannelId,
    pub(super) through: Place,
    pub(super) count: u64,
    pub(super) counts: Counts,
    /// The oldest.
    pub(super) front: Front,
}

/// What is known of a channel's oldest archived record without asking the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Front {
    pub(super) first: Place,
    pub(super) stamp_ms: u64,
    pub(super) retention_s: u32,
}

impl Front {
    pub(super) const fn of(record: &Archived) -> Self {
        Self {
            first: record.first,
            stamp_ms: record.stamp_ms,
            retention_s: record.retention_s,
        }
    }
}

/// How much of a channel is past the shortest time. Kept only where bytes are limited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Aged {
    /// Newest such record there has been.
    pub(super) through: Option<Place>,
    pub(super) bytes: u64,
    /// When the next one joins.
    pub(super) next_ms: Option<u64>,
}

/// The retained records of a channel, oldest first.
///
/// Invariant: firsts ascend strictly and are above `floor`; `head` is the newest record ever; each record of the
/// archive tier is older than each in memory; `moved` names retained records only. Which tier a record is in changes
/// nothing that anybody sees.
#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) records: Records,
    pub(super) cold: Option<Box<Cold>>,
    /// Where payloads lie that were moved: of records in memory, and of archived ones that the archive does not know of.
    #[expect(
        clippy::box_collection,
        reason = "most channels have none, and there are millions"
    )]
    pub(super) moved: Option<Box<BTreeMap<Place, Place>>>,
    pub(super) head: Option<Place>,
    pub(super) floor: Option<Place>,
    pub(super) forget_ms: u64,
    /// Rule of the newest publish: bytes beyond the shortest time, 0 for any.
    pub(super) retention_bytes: u64,
    pub(super) last_only: bool,
    pub(super) aged: Option<Box<Aged>>,
    /// Of the records in both tiers.
    pub(super) counts: Counts,
    /// There while there are members or presence records; a rebuilt channel has it before its records.
    pub(super) presence: Option<Box<Presence>>,
    /// A hash of the channel's key.
    pub(super) hash: u64,
}

/// The rule of a publish.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    pub(super) retention_bytes: u64,
    pub(super) last_only: bool,
}

impl Index {
    pub(super) fn new(key: &ChannelKey, floor: Option<Place>) -> Self {
        Self {
            floor,
            hash: stable_hash(&[key.app.as_str().as_bytes(), key.name.as_str().as_bytes()]),
            ..Self::default()
        }
    }

    /// Retained records in both tiers.
    pub(super) fn len(&self) -> u64 {
        let cold = self.cold.as_ref().map_or(0, |cold| cold.count);
        cold + u64::try_from(self.records.len()).expect("a usize fits a u64")
    }

    pub(super) fn is_empty(&self) -> bool {
        self.cold.is_none() && self.records.is_empty()
    }

    /// The first place above the floor.
    pub(super) fn bottom(&self) -> Place {
        self.floor.map_or(Place::MIN, Place::next)
    }

    /// Where the payload of the record lies that the tier says lies at `now`.
    pub(super) fn place(&self, first: Place, now: Place) -> Place {
        let moved = self.moved.as_ref().and_then(|moved| moved.get(&first));
        moved.copied().unwrap_or(now)
    }

    pub(super) fn full(&self, held: &Held) -> Archived {
        let first = held.first();
        held.record(self.place(first, first))
    }

    /// Adds the channel's newest record, under its rule.
    pub(super) fn push(&mut self, record: &Archived, rule: Rule, ledger: &mut Ledger) {
        if record.presence && self.presence.is_none() {
            let message = self.head.filter(|head| Some(*head) > self.floor);
            self.presence = Some(Box::new(Presence::new(message)));
        }
        if let Some(presence) = self.presence.as_mut().filter(|_| !record.presence) {
            presence.message = Some(record.first);
        }
        self.head = Some(record.first);
        let expires_ms = expires_ms(record.stamp_ms, record.retention_s);
        self.forget_ms = expires_ms.saturating_add(millis(FORGET_AFTER));
        self.set_rule(rule);
        let aging_ms = record.stamp_ms.saturating_add(millis(RETENTION_MIN));
        if let Some(aged) = &mut self.aged {
            aged.next_ms.get_or_insert(aging_ms);
        }
        self.counts.add(record);
        self.records.push(Held::new(record));
        ledger.in_memory += 1;
        ledger.add(self.hash, record);
    }

    fn set_rule(&mut self, rule: Rule) {
        self.last_only = rule.last_only;
        self.retention_bytes = rule.retention_bytes;
        if rule.retention_bytes == 0 {
            self.aged = None;
        } else if self.aged.is_none() {
            let next_ms = self.front().map(|(stamp_ms, _)| aging_ms(stamp_ms));
            self.aged = Some(Box::new(Aged {
                through: None,
                bytes: 0,
                next_ms,
            }));
        }
    }

    /// Newest record that holds no presence events, where there is one that is retained.
    pub(super) fn newest_message(&self) -> Option<Place> {
        match &self.presence {
            Some(presence) => presence.message,
            None => self.head,
        }
    }

    pub(super) fn has_members(&self) -> bool {
        (self.presence.as_ref()).is_some_and(|presence| presence.has_members())
    }

    /// First place of the oldest record.
    pub(super) fn oldest(&self) -> Option<Place> {
        match &self.cold {
            Some(cold) => Some(cold.front.first),
            None => self.records.front().map(Held::first),
        }
    }

    /// Stamp and end of the oldest record.
    pub(super) fn front(&self) -> Option<(u64, u64)> {
        match &self.cold {
            Some(cold) => {
                let Front {
                    stamp_ms,
                    retention_s,
                    ..
                } = cold.front;
                Some((stamp_ms, expires_ms(stamp_ms, retention_s)))
            }
            None => (self.records.front()).map(|held| (held.stamp_ms(), held.expires_ms())),
        }
    }

    /// The first place of the retained record with this key. `at` is the place of the publish that asks, where it is
    /// one of the log.
    pub(super) fn find(
        &self,
        key: &KeyDigest,
        at: Option<Place>,
        archive: &dyn Archive,
    ) -> io::Result<Option<Place>> {
        if let Some(held) = self.records.find(key) {
            return Ok(Some(held.first()));
        }
        let Some(cold) = &self.cold else {
            return Ok(None);
        };
        match archive.find(cold.id, key)? {
            Some(first) if first < self.bottom() => Ok(None),
            Some(first) if first <= cold.through => Ok(Some(first)),
            // From before a restart: this very publish was stored then, so nothing had its key.
            Some(first) if Some(first) == at => Ok(None),
            // From before a restart, and the key was used again since: the one that counts is hidden behind it.
            Some(_) => self.search(key, cold, archive),
            None => Ok(None),
        }
    }

    fn search(
        &self,
        key: &KeyDigest,
        cold: &Cold,
        archive: &dyn Archive,
    ) -> io::Result<Option<Place>> {
        let mut from = self.bottom();
        loop {
            let page = archive.range(cold.id, from, cold.through, false, PAGE)?;
            if let Some(found) = page.iter().find(|record| record.key == *key) {
                return Ok(Some(found.first));
            }
            let Some(last) = page.last() else {
                return Ok(None);
            };
            from = last.first.next();
        }
    }

    /// The retained record that was first stored at this place.
    pub(super) fn get(&self, first: Place, archive: &dyn Archive) -> io::Result<Option<Archived>> {
        if first < self.bottom() {
            return Ok(None);
        }
        match &self.cold {
            Some(cold) if first <= cold.through => {
                let found = archive.get(cold.id, first)?;
                Ok(found.map(|record| Archived {
                    now: self.place(first, record.now),
                    ..record
                }))
            }
            _ => Ok(self.records.get(first).map(|held| self.full(held))),
        }
    }

    /// Notes that the payload of a retained record lies at `now` from here on.
    pub(super) fn move_to(&mut self, record: &Archived, now: Place, ledger: &mut Ledger) {
        ledger.remove(self.hash, record);
        let record = Archived {
            now,
            ..record.clone()
        };
        ledger.add(self.hash, &record);
        let moved = self.moved.get_or_insert_default();
        moved.insert(record.first, now);
    }

    /// Whether the record is in the archive tier.
    pub(super) fn is_cold(&self, first: Place) -> bool {
        (self.cold.as_ref()).is_some_and(|cold| first <= cold.through)
    }

    /// Moves the older half of what memory holds to `batch`, which goes to the archive.
    pub(super) fn spill(
        &mut self,
        key: &ChannelKey,
        ledger: &mut Ledger,
        batch: &mut Vec<(ChannelId, Archived)>,
    ) {
        let id = self
            .cold
            .as_ref()
            .map_or_else(|| channel_id(key), |cold| cold.id);
        for _ in 0..self.records.len().div_ceil(2) {
            let Some(held) = self.records.pop_front() else {
                break;
            };
            let record = self.full(&held);
            self.unmove(record.first);
            self.add_cold(id, &record);
            ledger.in_memory -= 1;
            ledger.archived += 1;
            batch.push((id, record));
        }
    }

    /// Counts a record as one in the archive tier.
    pub(super) fn add_cold(&mut self, id: ChannelId, record: &Archived) {
        let cold = self.cold.get_or_insert_with(|| {
            Box::new(Cold {
                id,
                through: record.first,
                count: 0,
                counts: Counts::default(),
                front: Front::of(record),
            })
        });
        if record.first < cold.front.first {
            cold.front = Front::of(record);
        }
        cold.through = cold.through.max(record.first);
        cold.count += 1;
        cold.counts.add(record);
    }

    /// Puts into `batch` what the archive may learn of moved records: that they were moved by an entry up to `applied`.
    /// Whether it has more to learn.
    pub(super) fn flush_moves(
        &mut self,
        applied: u64,
        archive: &dyn Archive,
        batch: &mut Vec<(ChannelId, Archived)>,
    ) -> io::Result<bool> {
        let (Some(cold), Some(moved)) = (&self.cold, &self.moved) else {
            return Ok(false);
        };
        let mut flushed = Vec::new();
        let mut more = false;
        for (first, now) in moved.range(..=cold.through) {
            if now.index > applied {
                more = true;
                continue;
            }
            let record = archive.get(cold.id, *first)?.ok_or_else(|| lost("fewer"))?;
            let now = *now;
            batch.push((cold.id, Archived { now, ..record }));
            flushed.push(*first);
        }
        for first in flushed {
            self.unmove(first);
        }
        Ok(more)
    }

    pub(super) fn unmove(&mut self, first: Place) {
        if let Some(moved) = &mut self.moved {
            moved.remove(&first);
            if moved.is_empty() {
                self.moved = None;
            }
        }
    }

    /// Hash of everything but the records.
    pub(super) fn digest(&self) -> u64 {
        let mixer = Mixer::new(self.hash)
            .maybe(self.head)
            .maybe(self.floor)
            .word(self.forget_ms)
            .word(self.retention_bytes)
            .word(u64::from(self.last_only));
        let mixer = match &self.aged {
            Some(aged) => (mixer.maybe(aged.through).word(aged.bytes))
                .word(aged.next_ms.map_or(0, |next_ms| next_ms.wrapping_add(1))),
            None => mixer,
        };
        let mixer = match &self.presence {
            Some(presence) => mixer.word(presence.digest()),
            None => mixer,
        };
        mixer.finish()
    }
}

pub(super) fn lost(how: &str) -> io::Error {
    let what = format!("the archive holds {how} of a channel's records than were put there");
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// When a record of this stamp is past the shortest time.
pub(super) fn aging_ms(stamp_ms: u64) -> u64 {
    stamp_ms.saturating_add(millis(RETENTION_MIN))
}

/// App and name, apart by a byte that UTF-8 never holds.
pub(super) fn channel_id(key: &ChannelKey) -> ChannelId {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(key.app.as_str().as_bytes());
    context.update(&[0xff]);
    context.update(key.name.as_str().as_bytes());
    let mut id = ChannelId::default();
    id.copy_from_slice(&context.finish().as_ref()[..16]);
    id
}

pub(super) fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
