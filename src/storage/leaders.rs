//! Who wrote which stretch of a group's entries: all that is needed to tell the id of each of them.

use std::collections::VecDeque;

use crate::storage::LogId;
use crate::storage::varint;

/// The first entry of each stretch that one leader wrote in one term, in order of index. The first one may have
/// started before the oldest entry that exists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Leaders(VecDeque<LogId>);

impl Leaders {
    /// An entry was added behind the last one.
    pub(super) fn push(&mut self, id: LogId) {
        let same = |start: &LogId| (start.term, start.node) == (id.term, id.node);
        if !self.0.back().is_some_and(same) {
            self.0.push_back(id);
        }
    }

    /// The id of the entry with this index, which exists.
    pub(super) fn id(&self, index: u64) -> Option<LogId> {
        let run = self.0.partition_point(|start| start.index <= index);
        let start = self.0.get(run.checked_sub(1)?)?;
        Some(LogId { index, ..*start })
    }

    /// Entries from `end` on are gone.
    pub(super) fn truncate(&mut self, end: u64) {
        let kept = self.0.partition_point(|start| start.index < end);
        self.0.truncate(kept);
    }

    /// Entries before `first` are gone.
    pub(super) fn purge(&mut self, first: u64) {
        let dead = self.0.partition_point(|start| start.index <= first);
        self.0.drain(..dead.saturating_sub(1));
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Those of the entries `first..=last`, the first one clipped to `first`.
    pub(super) fn of(&self, first: u64, last: u64) -> Vec<LogId> {
        let from = self.0.partition_point(|start| start.index <= first);
        let starts = self.0.iter().skip(from.saturating_sub(1));
        let clip = |id: &LogId| LogId {
            index: id.index.max(first),
            ..*id
        };
        starts
            .take_while(|start| start.index <= last)
            .map(clip)
            .collect()
    }

    /// Stretches of `first..=last`, whose leaders are `starts`, in which every id is the one that is known here.
    pub(super) fn agreeing(&self, starts: &[LogId], first: u64, last: u64) -> Vec<(u64, u64)> {
        let mut agreeing: Vec<(u64, u64)> = Vec::new();
        let mut at = first;
        while at <= last {
            let run = starts.partition_point(|start| start.index <= at);
            let theirs = run.checked_sub(1).map(|run| starts[run]);
            let ours = self.id(at);
            let next = self.0.partition_point(|start| start.index <= at);
            let end = [starts.get(run), self.0.get(next)]
                .into_iter()
                .flatten()
                .map(|start| start.index - 1)
                .fold(last, u64::min);
            let leader = |id: LogId| (id.term, id.node);
            if theirs.is_some() && theirs.map(leader) == ours.map(leader) {
                match agreeing.last_mut() {
                    Some((_, before)) if *before + 1 == at => *before = end,
                    _ => agreeing.push((at, end)),
                }
            }
            let Some(after) = end.checked_add(1) else {
                break;
            };
            at = after;
        }
        agreeing
    }
}

impl FromIterator<LogId> for Leaders {
    fn from_iter<I: IntoIterator<Item = LogId>>(ids: I) -> Self {
        let mut leaders = Self::default();
        ids.into_iter().for_each(|id| leaders.push(id));
        leaders
    }
}

/// Appends stretches: their number, then each one's index (after the one before), term and node.
pub(super) fn put(out: &mut Vec<u8>, starts: &[LogId]) {
    varint::put(out, starts.len() as u64);
    let mut before = 0;
    for start in starts {
        varint::put(out, start.index - before);
        varint::put(out, start.term);
        varint::put(out, start.node);
        before = start.index;
    }
}

/// Takes what [`put`] wrote; `None` when that is not what stands there.
pub(super) fn take(bytes: &mut &[u8]) -> Option<Vec<LogId>> {
    let count = usize::try_from(varint::take(bytes)?).ok()?;
    let mut starts = Vec::with_capacity(count.min(bytes.len()));
    let mut index: u64 = 0;
    for _ in 0..count {
        index = index.checked_add(varint::take(bytes)?)?;
        let (term, node) = (varint::take(bytes)?, varint::take(bytes)?);
        starts.push(LogId { term, node, index });
    }
    Some(starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(term: u64, index: u64) -> LogId {
        LogId {
            term,
            node: term,
            index,
        }
    }

    #[test]
    fn stretches_agree_where_the_ids_do() {
        let ours: Leaders = [id(1, 1), id(2, 6), id(4, 9)].into_iter().collect();
        let agreeing = |starts: &[LogId], first, last| ours.agreeing(starts, first, last);
        assert_eq!(agreeing(&[id(1, 1)], 1, 10), [(1, 5)]);
        assert_eq!(agreeing(&[id(1, 2), id(2, 6), id(3, 8)], 2, 10), [(2, 7)]);
        assert_eq!(
            agreeing(&[id(1, 2), id(3, 5), id(4, 9)], 2, 12),
            [(2, 4), (9, 12)]
        );
        assert_eq!(agreeing(&[id(9, 2)], 2, 12), []);
    }

    #[test]
    fn starts_are_clipped_and_come_back() {
        let leaders: Leaders = [id(1, 1), id(2, 6), id(4, 9)].into_iter().collect();
        let starts = leaders.of(3, 8);
        assert_eq!(starts, [id(1, 3), id(2, 6)]);
        let mut bytes = Vec::new();
        put(&mut bytes, &starts);
        assert_eq!(take(&mut &bytes[..]), Some(starts));
        for short in 0..bytes.len() {
            assert_eq!(take(&mut &bytes[..short]), None);
        }
    }
}
