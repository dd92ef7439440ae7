//! Getting the records of a shard back from the log, when everything else is known as of a later entry.
//!
//! Every record retained then has its payload in an entry after the horizon, at its first place or where it was moved
//! to, so those entries bring back all of them. Nothing is decided anew: what was dropped is known, and what is below
//! its channel's floor is over.

use std::io;

use crate::channel::archive::{Archived, ChannelId, Place};
use crate::channel::held::{Held, UINT48_MAX};
use crate::channel::index::{Index, channel_id};
use crate::channel::publish::{channel_key, first_place, record};
use crate::channel::read::RecordRef;
use crate::channel::shard::{Applied, Event, Outcome, Shard};
use crate::types::ChannelKey;
use crate::wire::entry;

impl Shard {
    pub(super) fn rebuild(&mut self, index: u64, entry: entry::Entry) -> io::Result<Applied> {
        let stamp_ms = self.stamp_of(index, entry.stamp_ms);
        let mut applied = Applied::default();
        for (position, publish) in (0_u16..).zip(entry.publishes) {
            let at = Place { index, position };
            let outcome = self.regain(at, stamp_ms, publish, &mut applied.events)?;
            applied.outcomes.push(outcome);
        }
        if !self.is_rebuilding() {
            self.derive();
        }
        Ok(applied)
    }

    fn stamp_of(&self, index: u64, stamp_ms: u64) -> u64 {
        let at = self.late.partition_point(|late| late.through < index);
        match self.late.get(at) {
            Some(late) if late.from <= index => late.stamp_ms,
            _ => stamp_ms.min(UINT48_MAX),
        }
    }

    fn regain(
        &mut self,
        at: Place,
        stamp_ms: u64,
        publish: entry::Publish,
        events: &mut Vec<Event>,
    ) -> io::Result<Outcome> {
        let dropped = self.dropped.contains(&(at.index, at.position));
        let outcome = match (&publish.moved, dropped) {
            (Some(_), _) => Outcome::Moved,
            (None, true) => return Ok(Outcome::Duplicate(None)),
            (None, false) => Outcome::Stored(at.serial(self.incarnation)),
        };
        let first = match &publish.moved {
            Some(moved) if !dropped => first_place(moved),
            Some(_) => None,
            None => Some(at),
        };
        let (Some(first), Some(key)) = (first, channel_key(&publish)) else {
            return Ok(outcome);
        };
        let Some(index) = self.channels.get_mut(&key) else {
            return Ok(outcome);
        };
        if first < index.bottom() {
            return Ok(outcome);
        }
        if let Some(moved) = &publish.moved {
            let record = record(at, first, moved.stamp_ms, &publish);
            self.regain_moved(key, &record)?;
            return Ok(outcome);
        }
        let record = record(at, first, stamp_ms, &publish);
        // Records up to the horizon that were moved may still be to come. Whoever holds everything up to there and
        // what was regained since has no gap.
        let before = index.newest().or(index.floor);
        let before = before.max(Some(Place {
            index: self.horizon,
            position: u16::MAX,
        }));
        index.insert(&record);
        self.ledger.in_memory += 1;
        self.ledger.add(index.hash, &record);
        let record = RecordRef::new(&record, before, self.incarnation);
        events.push(Event {
            key,
            record,
            publish,
        });
        Ok(outcome)
    }

    /// Takes note of a record at the place where it was appended again: it is here already, or was appended first at
    /// or below the horizon.
    fn regain_moved(&mut self, key: ChannelKey, record: &Archived) -> io::Result<()> {
        let Some(index) = self.channels.get_mut(&key) else {
            return Ok(());
        };
        let present = index.get(record.first, &*self.archive)?;
        // What the archive knows from later on was put there before a restart, and does not count.
        if let Some(present) = present.filter(|present| present.now < record.now) {
            index.move_to(&present, record.now, &mut self.ledger);
            if index.is_cold(record.first) {
                self.moved_cold.insert(key);
            }
            return Ok(());
        }
        self.ledger.add(index.hash, record);
        if index.is_cold(record.first) {
            let id: ChannelId = channel_id(&key);
            index.counts.add(record);
            index.add_cold(id, record);
            self.ledger.archived += 1;
            return self.put(&mut vec![(id, record.clone())]);
        }
        index.insert(record);
        self.ledger.in_memory += 1;
        Ok(())
    }

    /// Makes lookups and timers for all channels, once the records are here.
    pub(super) fn derive(&mut self) {
        self.decided = 0;
        self.timers.clear();
        for (key, index) in &mut self.channels {
            index.records.index();
            self.timers.insert((index.next_change_ms(), key.clone()));
        }
    }
}

impl Index {
    /// The newest record retained and known.
    pub(super) fn newest(&self) -> Option<Place> {
        let held = self.records.back().map(Held::first);
        held.or(self.cold.as_ref().map(|cold| cold.through))
    }

    pub(super) fn insert(&mut self, record: &Archived) {
        self.records.insert(Held::new(record));
        self.counts.add(record);
        if record.now != record.first {
            let moved = self.moved.get_or_insert_default();
            moved.insert(record.first, record.now);
        }
    }
}
