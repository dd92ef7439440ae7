//! What the files written so far say about one group: what the writer repeats at each segment's head, and which
//! segments the group's entries lie in. Runs behind the group's state in memory by what still waits to be written.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::storage::LogId;
use crate::storage::frame::{Frame, Kind};

#[derive(Debug, Default)]
pub(super) struct Track {
    pub(super) vote: Option<Bytes>,
    pub(super) committed: Option<LogId>,
    pub(super) purged: Option<LogId>,
    /// The newest entry; meaningful while `runs` is not empty.
    last: Option<LogId>,
    /// Live entries by segment, in order, without holes, none empty.
    runs: VecDeque<Run>,
}

#[derive(Debug)]
struct Run {
    segment: u32,
    first: u64,
    last: u64,
}

impl Track {
    /// An entry was written to `segment`. Its index follows the last one.
    pub(super) fn append(&mut self, segment: u32, id: LogId) {
        self.last = Some(id);
        match self.runs.back_mut() {
            Some(run) if run.segment == segment => run.last = id.index,
            _ => self.runs.push_back(Run {
                segment,
                first: id.index,
                last: id.index,
            }),
        }
    }

    /// Only entries up to `keep` remain.
    pub(super) fn truncate(&mut self, keep: Option<LogId>) {
        let end = keep.map_or(0, |id| id.index.saturating_add(1));
        while let Some(run) = self.runs.back_mut() {
            if run.first < end {
                run.last = run.last.min(end - 1);
                break;
            }
            self.runs.pop_back();
        }
        self.last = keep;
    }

    /// Entries up to `upto` are gone.
    pub(super) fn purge(&mut self, upto: LogId) {
        self.purged = Some(upto);
        while let Some(run) = self.runs.front_mut() {
            if run.last > upto.index {
                run.first = run.first.max(upto.index + 1);
                break;
            }
            self.runs.pop_front();
        }
    }

    /// Segments that hold entries which still exist.
    pub(super) fn segments(&self) -> impl Iterator<Item = u32> {
        self.runs.iter().map(|run| run.segment)
    }

    /// The frames that repeat this state at a segment's head.
    pub(super) fn for_each_frame(&self, group: u32, mut put: impl FnMut(Frame<'_>)) {
        if let Some(vote) = &self.vote {
            put(Frame {
                group,
                payload: vote,
                ..Frame::bare(Kind::Vote)
            });
        }
        if self.committed.is_some() {
            put(Frame::mark(Kind::Committed, group, self.committed));
        }
        if self.purged.is_some() {
            put(Frame::mark(Kind::Purge, group, self.purged));
        }
        let first = self.runs.front().map(|run| run.first.to_le_bytes());
        put(Frame {
            payload: first.as_ref().map_or(&[], |bytes| bytes),
            ..Frame::mark(Kind::Span, group, self.last.filter(|_| first.is_some()))
        });
    }
}
