//! One Raft group's part of the log.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::storage::frame::PAYLOAD_MAX;
use crate::storage::group::{Group, invalid};
use crate::storage::log::{Condition, Log, Shared};
use crate::storage::writer::{Summed, What};
use crate::storage::{Done, Entry, LogId, locked};

/// One Raft group's part of the log. Clones are the same. Calls of one group take effect in the order in which
/// they are made; the caller sees to it that there is an order.
#[derive(Clone, Debug)]
pub struct GroupLog {
    log: Log,
    pub(super) group: Arc<Group>,
}

impl GroupLog {
    pub(super) fn new(log: Log, group: Arc<Group>) -> Self {
        Self { log, group }
    }

    /// Adds entries behind the last one. They can be read when this returns, and are durable when `done` is told so.
    /// Fails when they would overwrite entries or leave a hole (`InvalidInput`), and when the log has failed or is
    /// closed; then nothing was added, and `done` gets the same error.
    pub fn append(&self, entries: Vec<Entry>, done: Done) -> io::Result<()> {
        let summed = Summed::new(entries);
        self.shared().submit(&self.group, Some(done), |state| {
            check_sizes(&summed.entries)?;
            let stamp = state.append(&summed.entries)?;
            Ok(Some(What::Entries(stamp, summed)))
        })
    }

    /// Replaces the group's vote. `done` learns of every outcome.
    pub fn save_vote(&self, vote: Bytes, done: Done) {
        let saved = self.shared().submit(&self.group, Some(done), |state| {
            if vote.len() > PAYLOAD_MAX {
                return Err(invalid("a vote is larger than 1 GiB"));
            }
            state.vote = Some(vote.clone());
            Ok(Some(What::Vote(vote)))
        });
        // The callback was told.
        drop(saved);
    }

    /// The newest vote handed in, durable or not.
    #[must_use]
    pub fn vote(&self) -> Option<Bytes> {
        locked(&self.group.state).vote.clone()
    }

    /// Remembers how far the group had committed. Not synced by itself: after a crash an older mark may be found.
    pub fn save_committed(&self, committed: Option<LogId>) -> io::Result<()> {
        let mut state = locked(&self.group.state);
        let mut queue = locked(&self.shared().queue);
        match &queue.condition {
            Condition::Open => {}
            closed => return Err(closed.error()),
        }
        state.committed = committed;
        queue.committed.insert(self.group.number, committed);
        Ok(())
    }

    #[must_use]
    pub fn committed(&self) -> Option<LogId> {
        locked(&self.group.state).committed
    }

    /// Removes entries behind index `keep`, or all that are not purged. They are gone for readers when this returns,
    /// and on disk before anything handed in later. `InvalidInput` when `keep` lies before the purge mark.
    pub fn truncate_after(&self, keep: Option<u64>) -> io::Result<()> {
        self.shared().submit(&self.group, None, |state| {
            let (last, removed) = state.truncate(keep)?;
            Ok(removed.then_some(What::Truncate(last)))
        })
    }

    /// Forgets entries up to `upto`, which need not exist here. Segments that nothing lives in any more are freed
    /// after the mark is durable. `done` learns of every outcome; an older mark than the present one changes nothing.
    pub fn purge(&self, upto: LogId, done: Done) {
        let purged = self.shared().submit(&self.group, Some(done), |state| {
            if upto.index == u64::MAX {
                return Err(invalid("index is too large"));
            }
            Ok(state.purge(upto).then_some(What::Purge(upto)))
        });
        // The callback was told.
        drop(purged);
    }

    /// The newest entry, or the purge mark when no entry is left.
    #[must_use]
    pub fn last(&self) -> Option<LogId> {
        locked(&self.group.state).last()
    }

    /// The oldest entry's index.
    #[must_use]
    pub fn first(&self) -> Option<u64> {
        locked(&self.group.state).first()
    }

    #[must_use]
    pub fn purged(&self) -> Option<LogId> {
        locked(&self.group.state).purged
    }

    /// The id of an entry that exists, without reading it.
    #[must_use]
    pub fn id(&self, index: u64) -> Option<LogId> {
        locked(&self.group.state).id(index)
    }

    /// The first existing entry of each (term, node), in order. Nothing is read for it.
    #[must_use]
    pub fn leader_starts(&self) -> Vec<LogId> {
        locked(&self.group.state).leader_starts()
    }

    /// Indices of entries that exist but cannot be read, because their bytes were damaged or lost. In order, apart.
    /// Nothing is read for it.
    #[must_use]
    pub fn holes(&self) -> Vec<Range<u64>> {
        locked(&self.group.state).holes().ranges().to_vec()
    }

    /// Puts entries where others were lost, durably. They can be read when `done` is told so. `InvalidInput`, and
    /// nothing changed, unless each one lies in a hole and has the id that is known for it; then `done` gets that.
    pub fn repair(&self, entries: Vec<Entry>, done: Done) {
        let summed = Summed::new(entries);
        let repaired = self.shared().submit(&self.group, Some(done), |state| {
            check_sizes(&summed.entries)?;
            state.check_repair(&summed.entries)?;
            Ok(Some(What::Repair(summed)))
        });
        // The callback was told.
        drop(repaired);
    }

    /// Segments that begin behind the one which holds the group's first entry: what could be freed, in part, if that
    /// one did not hold it back. 0 when there is no entry, or when it is in the newest segment.
    #[must_use]
    pub fn newer_segments(&self) -> usize {
        let state = locked(&self.group.state);
        let segments = self.shared().segments();
        state
            .oldest_segment()
            .map_or(0, |oldest| segments.range(oldest + 1..).count())
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        self.log.shared()
    }
}

fn check_sizes(entries: &[Entry]) -> io::Result<()> {
    match entries
        .iter()
        .any(|entry| entry.payload.len() > PAYLOAD_MAX)
    {
        true => Err(invalid("an entry is larger than 1 GiB")),
        false => Ok(()),
    }
}
