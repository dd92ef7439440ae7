//! What must hold of a shard at all times, checked from scratch.

use std::collections::{BTreeMap, BTreeSet};

use crate::channel::archive::{Archive, Place};
use crate::channel::index::{Index, aging_ms};
use crate::channel::ledger::{Counts, Ledger};
use crate::channel::shard::Shard;

impl Shard {
    /// Reads all of the shard's records, from both tiers.
    ///
    /// # Panics
    /// When the state contradicts itself: a defect of this room; or when the archive fails.
    pub fn check_invariants(&self) {
        let mut ledger = Ledger::default();
        let mut channels_digest = 0_u64;
        let mut attending: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        for (key, index) in &self.channels {
            index.check_invariants(&*self.archive, self, &mut ledger);
            channels_digest = channels_digest.wrapping_add(index.digest());
            assert!(index.head.is_some_and(|head| head.index <= self.decided()));
            if !self.is_rebuilding() {
                assert!(self.timers.contains(&(index.next_change_ms(), key.clone())));
            }
            for (connection_id, attendance) in
                (index.presence.iter()).flat_map(|presence| presence.attendances())
            {
                let of_node = attending.entry(attendance.by).or_default();
                of_node.insert((key.clone(), connection_id.clone()));
            }
            let moved = index
                .moved
                .as_ref()
                .and_then(|moved| moved.first_key_value());
            if moved.is_some_and(|(first, _)| index.is_cold(*first)) {
                assert!(self.moved_cold.contains(key), "moves are flushed some day");
            }
        }
        if !self.is_rebuilding() {
            assert_eq!(self.timers.len(), self.channels.len(), "a timer a channel");
        }
        assert_eq!(channels_digest, self.channels_digest, "channels' digests");
        assert_eq!(attending, self.attending, "who attends whom");
        let live = |ledger: &Ledger| ledger.live.iter().collect::<Vec<_>>();
        assert_eq!(
            live(&ledger),
            live(&self.ledger),
            "live records of each entry"
        );
        let sums = |ledger: &Ledger| (ledger.bytes, ledger.digest);
        assert_eq!(sums(&ledger), sums(&self.ledger), "sums over all records");
        let tiers = (ledger.in_memory, ledger.archived);
        assert_eq!(tiers, self.tiers());
        assert!(self.ledger.in_memory <= self.options.records_max);
        assert!(self.horizon <= self.live_floor() || self.is_rebuilding());
        let above = |index: u64| index > self.horizon && index <= self.decided();
        assert!(self.dropped.iter().all(|(index, _)| above(*index)));
        assert!(self.late.iter().all(|late| above(late.through)));
        assert!((self.late).is_sorted_by(|a, b| a.through < b.from && a.stamp_ms < b.stamp_ms));
    }
}

impl Index {
    /// Adds the records up in `ledger`.
    fn check_invariants(&self, archive: &dyn Archive, shard: &Shard, ledger: &mut Ledger) {
        let rebuilding = shard.is_rebuilding();
        self.records.check_invariants(!rebuilding);
        let page = self.page(archive, Place::MIN, Place::MAX, false, usize::MAX);
        let mut page = page.expect("the archive can be read");
        if rebuilding {
            // From before a restart: counted once their move is applied again.
            page.retain(|record| record.now.index <= shard.applied());
        }
        assert!(page.is_sorted_by(|a, b| a.first < b.first), "firsts ascend");
        assert!(page.is_sorted_by_key(|record| record.stamp_ms));
        assert_eq!(page.len() as u64, self.len(), "as many as are counted");
        let mut counts = Counts::default();
        page.iter().for_each(|record| counts.add(record));
        assert_eq!(counts, self.counts, "records of each kind");
        if let Some(presence) = &self.presence {
            presence.check_invariants();
        }
        for record in &page {
            assert!(Some(record.first) > self.floor && Some(record.first) <= self.head);
            ledger.add(self.hash, record);
        }
        ledger.in_memory += self.records.len();
        ledger.archived += page.len() - self.records.len();
        if let Some(cold) = &self.cold {
            assert!(cold.count > 0);
            assert_eq!(cold.front.first, page[0].first);
            assert_eq!(cold.front.stamp_ms, page[0].stamp_ms);
            assert_eq!(cold.front.retention_s, page[0].retention_s);
            let front = self.records.front();
            assert!(front.is_none_or(|held| held.first() > cold.through));
        }
        for first in self.moved.iter().flat_map(|moved| moved.keys()) {
            assert!(page.iter().any(|record| record.first == *first));
        }
        if rebuilding {
            return;
        }
        let present = self.has_members() || counts.presence > 0;
        assert_eq!(self.presence.is_some(), present);
        let message = page.iter().rfind(|record| !record.presence);
        let message = message.map(|record| record.first);
        let known = self.newest_message().filter(|at| Some(*at) > self.floor);
        assert_eq!(known, message, "newest message retained");
        let aged = page.iter();
        let aged = aged.take_while(|record| aging_ms(record.stamp_ms) <= shard.clock_ms());
        let aged: Vec<_> = aged.collect();
        if let Some(state) = &self.aged {
            let bytes: u64 = aged.iter().map(|record| u64::from(record.bytes)).sum();
            assert_eq!(state.bytes, bytes, "bytes past the shortest time");
            assert!(state.bytes <= self.retention_bytes);
            let next = page.get(aged.len());
            assert_eq!(state.next_ms, next.map(|record| aging_ms(record.stamp_ms)));
        }
        assert_eq!(self.aged.is_some(), self.retention_bytes > 0);
        if self.last_only {
            assert!((aged.iter()).all(|record| Some(record.first) >= self.newest_message()));
        }
        assert!(
            self.front()
                .is_none_or(|(_, ends_ms)| ends_ms > shard.clock_ms())
        );
    }
}
