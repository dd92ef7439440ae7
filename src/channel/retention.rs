//! What of a channel is over, and when.
//!
//! Retention is a prefix: a record never outlives an older one, so one floor says what is gone.

use std::io;

use crate::channel::archive::{Archive, Archived, ChannelId, Place};
use crate::channel::held::expires_ms;
use crate::channel::index::{Front, Index, PAGE, aging_ms, lost};
use crate::channel::ledger::Ledger;

impl Index {
    /// When something here next changes by time alone; 0 when it is overdue by the rule.
    pub(super) fn next_change_ms(&self) -> u64 {
        let Some((stamp_ms, expires_ms)) = self.front() else {
            // Members keep the channel; when the last one leaves there is a record again.
            return if self.has_members() {
                u64::MAX
            } else {
                self.forget_ms
            };
        };
        let mut due_ms = expires_ms;
        if self.last_only && self.oldest() < self.newest_message() {
            due_ms = due_ms.min(aging_ms(stamp_ms));
        }
        match &self.aged {
            Some(aged) if aged.bytes > self.retention_bytes => 0,
            Some(aged) => aged.next_ms.map_or(due_ms, |next_ms| due_ms.min(next_ms)),
            None => due_ms,
        }
    }

    /// Drops the oldest records that are over by their time or by the channel's rule. Says up to which place the
    /// archive holds nothing of use any more, if that changed.
    pub(super) fn expire(
        &mut self,
        now_ms: u64,
        ledger: &mut Ledger,
        archive: &dyn Archive,
    ) -> io::Result<Option<(ChannelId, Place)>> {
        self.age(now_ms, archive)?;
        let gone = self.expire_archived(now_ms, ledger, archive)?;
        while self.cold.is_none()
            && let Some(held) = self.records.front()
        {
            let record = self.full(held);
            if !self.is_over(&record, now_ms) {
                break;
            }
            self.records.pop_front();
            ledger.in_memory -= 1;
            self.drop_front(&record, ledger);
        }
        if self.counts.presence == 0 && !self.has_members() {
            // The newest record retained, if there is one, is a message again.
            self.presence = None;
        }
        Ok(gone)
    }

    fn is_over(&self, record: &Archived, now_ms: u64) -> bool {
        if expires_ms(record.stamp_ms, record.retention_s) <= now_ms {
            return true;
        }
        // Presence events neither take a message's place nor hold what a later message has taken.
        let replaced = self.last_only && Some(record.first) < self.newest_message();
        let too_much = (self.aged.as_ref()).is_some_and(|aged| aged.bytes > self.retention_bytes);
        (replaced || too_much) && aging_ms(record.stamp_ms) <= now_ms
    }

    /// Moves on what is past the shortest time. Everything that is over is among it.
    fn age(&mut self, now_ms: u64, archive: &dyn Archive) -> io::Result<()> {
        let Some(mut aged) = self.aged.take() else {
            return Ok(());
        };
        let mut limit = 2;
        while aged.next_ms.is_some_and(|next_ms| next_ms <= now_ms) {
            let from = aged.through.map_or(Place::MIN, Place::next);
            let page = self.page(archive, from, Place::MAX, false, limit)?;
            aged.next_ms = None;
            for record in page {
                if aging_ms(record.stamp_ms) > now_ms {
                    aged.next_ms = Some(aging_ms(record.stamp_ms));
                    break;
                }
                aged.through = Some(record.first);
                aged.bytes += u64::from(record.bytes);
                // Overdue, until the next page says otherwise.
                aged.next_ms = (Some(record.first) != self.head).then_some(0);
            }
            limit = (limit * 2).min(PAGE);
        }
        self.aged = Some(aged);
        Ok(())
    }

    fn expire_archived(
        &mut self,
        now_ms: u64,
        ledger: &mut Ledger,
        archive: &dyn Archive,
    ) -> io::Result<Option<(ChannelId, Place)>> {
        let Some(cold) = &self.cold else {
            return Ok(None);
        };
        let (id, through, floor) = (cold.id, cold.through, self.floor);
        // Mostly one record at a time is over; when many are, pages grow.
        let mut limit = 2;
        'pages: while self.cold.is_some() {
            let page = archive.range(id, self.bottom(), through, false, limit)?;
            if page.is_empty() {
                return Err(lost("fewer"));
            }
            for record in page {
                let now = self.place(record.first, record.now);
                let record = Archived { now, ..record };
                if !self.is_over(&record, now_ms) {
                    if let Some(cold) = &mut self.cold {
                        cold.front = Front::of(&record);
                    }
                    break 'pages;
                }
                let Some(cold) = &mut self.cold else {
                    return Err(lost("more"));
                };
                cold.count -= 1;
                cold.counts.remove(&record);
                if cold.count == 0 {
                    self.cold = None;
                }
                ledger.archived -= 1;
                self.drop_front(&record, ledger);
            }
            limit = (limit * 2).min(PAGE);
        }
        let gone = self.floor.filter(|_| self.floor != floor);
        Ok(gone.map(|gone| (id, gone)))
    }

    /// Accounts for the loss of the oldest record, which its tier no longer counts.
    fn drop_front(&mut self, record: &Archived, ledger: &mut Ledger) {
        if let Some(aged) = &mut self.aged
            && aged.through.is_some_and(|through| record.first <= through)
        {
            aged.bytes -= u64::from(record.bytes);
        }
        self.floor = Some(record.first);
        self.counts.remove(record);
        self.unmove(record.first);
        ledger.remove(self.hash, record);
    }
}
