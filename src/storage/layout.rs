//! Which entries of a group lie in which sealed segment, and which lie nowhere any more.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::storage::index::Index;

/// Entries `first..=last`, which lie in one sealed segment.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) segment: u32,
    /// They are replacements: frames of kind `Repaired`.
    pub(super) repaired: bool,
    pub(super) first: u64,
    pub(super) last: u64,
    /// Of payload; unknown once the part was clipped.
    pub(super) bytes: Option<u64>,
    pub(super) index: Where,
}

/// The index that tells where each entry lies. It may cover more than the part.
#[derive(Clone, Debug)]
pub(super) enum Where {
    /// A frame in the segment, with a payload of this length.
    Frame { at: u32, length: u32 },
    /// In memory: the segment has no readable one.
    Memory(Arc<Index>),
}

impl Part {
    fn clip(&mut self, first: u64, last: u64) {
        if (first, last) != (self.first, self.last) {
            (self.first, self.last, self.bytes) = (first, last, None);
        }
    }

    pub(super) fn clipped(&self, first: u64, last: u64) -> Self {
        let mut part = self.clone();
        part.clip(first, last);
        part
    }
}

/// Parts that do not overlap, by their first index.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout(BTreeMap<u64, Part>);

impl Layout {
    pub(super) fn parts(&self) -> impl Iterator<Item = &Part> {
        self.0.values()
    }

    pub(super) fn parts_mut(&mut self) -> impl Iterator<Item = &mut Part> {
        self.0.values_mut()
    }

    /// The part that holds this index.
    pub(super) fn at(&self, index: u64) -> Option<&Part> {
        let (_, part) = self.0.range(..=index).next_back()?;
        (part.last >= index).then_some(part)
    }

    /// The first part of which something lies at or behind this index.
    pub(super) fn from(&self, index: u64) -> Option<&Part> {
        let behind = || self.0.range(index..).next().map(|(_, part)| part);
        self.at(index).or_else(behind)
    }

    /// Puts a part in the place of everything from its first index on.
    pub(super) fn append(&mut self, part: Part) {
        self.truncate(part.first);
        self.0.insert(part.first, part);
    }

    /// Puts a part in the place of what lay at the same indices.
    pub(super) fn overlay(&mut self, part: Part) {
        let behind = self.0.split_off(&part.first);
        let after = part.last.saturating_add(1);
        if let Some((_, before)) = self.0.last_key_value()
            && before.last >= part.first
        {
            let before = before.clone();
            self.truncate(part.first);
            if before.last > part.last {
                self.0.insert(after, before.clipped(after, before.last));
            }
        }
        for (first, part) in behind {
            if part.last >= after {
                let first = first.max(after);
                self.0.insert(first, part.clipped(first, part.last));
            }
        }
        self.0.insert(part.first, part);
    }

    /// Nothing lies at `first..=last` any more.
    pub(super) fn cut(&mut self, of: &Part, first: u64, last: u64) {
        self.overlay(of.clipped(first, last));
        self.0.remove(&first);
    }

    /// Nothing from `end` on exists.
    pub(super) fn truncate(&mut self, end: u64) {
        self.0.split_off(&end);
        if let Some(mut entry) = self.0.last_entry() {
            let part = entry.get_mut();
            part.clip(part.first, part.last.min(end.saturating_sub(1)));
        }
    }

    /// Nothing before `first` exists.
    pub(super) fn purge(&mut self, first: u64) {
        let kept = self.0.split_off(&first);
        let crossing = self.0.last_key_value().map(|(_, part)| part.clone());
        self.0 = kept;
        if let Some(part) = crossing.filter(|part| part.last >= first) {
            self.0.insert(first, part.clipped(first, part.last));
        }
    }

    /// Indices of `range` that no part holds.
    pub(super) fn gaps(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for part in self.parts().filter(|part| part.last >= range.start) {
            if part.first >= range.end {
                break;
            }
            if part.first > at {
                gaps.push(at..part.first);
            }
            at = part.last.saturating_add(1);
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }
}

/// Indices of entries that cannot be read. Ranges are in order, apart, and not empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Holes(Vec<Range<u64>>);

impl Holes {
    pub(super) fn ranges(&self) -> &[Range<u64>] {
        &self.0
    }

    pub(super) fn len(&self) -> u64 {
        self.0.iter().map(|hole| hole.end - hole.start).sum()
    }

    /// The hole that this index lies in.
    pub(super) fn at(&self, index: u64) -> Option<&Range<u64>> {
        let after = self.0.partition_point(|hole| hole.start <= index);
        let hole = &self.0[after.checked_sub(1)?];
        hole.contains(&index).then_some(hole)
    }

    /// Where the first hole behind `index` begins.
    pub(super) fn next(&self, index: u64) -> Option<u64> {
        let after = self.0.partition_point(|hole| hole.start <= index);
        self.0.get(after).map(|hole| hole.start)
    }

    pub(super) fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let from = self.0.partition_point(|hole| hole.end < range.start);
        let to = self.0.partition_point(|hole| hole.start <= range.end);
        let touched = &self.0[from..to];
        let start = touched
            .first()
            .map_or(range.start, |hole| hole.start.min(range.start));
        let end = touched
            .last()
            .map_or(range.end, |hole| hole.end.max(range.end));
        self.0.drain(from..to);
        self.0.insert(from, start..end);
    }

    pub(super) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let holes = std::mem::take(&mut self.0);
        for hole in holes {
            let before = hole.start..hole.end.min(range.start);
            let behind = hole.start.max(range.end)..hole.end;
            self.0
                .extend([before, behind].into_iter().filter(|left| !left.is_empty()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn part(segment: u32, first: u64, last: u64) -> Part {
        let index = Where::Frame { at: 0, length: 0 };
        Part {
            segment,
            repaired: false,
            first,
            last,
            bytes: Some(1),
            index,
        }
    }

    proptest! {
        #[test]
        fn a_layout_is_a_map_from_index_to_segment(
            steps in proptest::collection::vec((0..4, 0..40_u64, 0..10_u64), 0..30),
        ) {
            let mut layout = Layout::default();
            let mut model: BTreeMap<u64, u32> = BTreeMap::new();
            for (segment, (what, at, more)) in (0..).zip(steps) {
                match what {
                    0 => {
                        layout.append(part(segment, at, at + more));
                        model.split_off(&at);
                        model.extend((at..=at + more).map(|index| (index, segment)));
                    }
                    1 => {
                        layout.overlay(part(segment, at, at + more));
                        model.extend((at..=at + more).map(|index| (index, segment)));
                    }
                    2 => {
                        layout.truncate(at);
                        model.split_off(&at);
                    }
                    _ => {
                        layout.purge(at);
                        model = model.split_off(&at);
                    }
                }
                for index in 0..60 {
                    let found = layout.at(index).map(|part| part.segment);
                    prop_assert_eq!(found, model.get(&index).copied());
                    let next = model.range(index..).next().map(|(_, segment)| *segment);
                    prop_assert_eq!(layout.from(index).map(|part| part.segment), next);
                }
                let missing: Vec<_> = layout.gaps(5..50).into_iter().flatten().collect();
                let expected: Vec<_> = (5..50).filter(|index| !model.contains_key(index)).collect();
                prop_assert_eq!(missing, expected);
            }
        }

        #[test]
        fn holes_are_a_set_of_indices(
            steps in proptest::collection::vec((any::<bool>(), 0..40_u64, 0..10_u64), 0..30),
        ) {
            let mut holes = Holes::default();
            let mut model = BTreeSet::new();
            for (add, start, more) in steps {
                let range = start..start + more;
                match add {
                    true => {
                        holes.add(range.clone());
                        model.extend(range);
                    }
                    false => {
                        holes.remove(range.clone());
                        model.retain(|index| !range.contains(index));
                    }
                }
                let found: Vec<_> = holes.ranges().iter().cloned().flatten().collect();
                prop_assert_eq!(&found, &model.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(holes.len(), model.len() as u64);
                prop_assert!(holes.ranges().windows(2).all(|pair| pair[0].end < pair[1].start));
                for index in 0..60 {
                    prop_assert_eq!(holes.at(index).is_some(), model.contains(&index));
                }
            }
        }
    }
}
