//! What the log was given and what it has said of it, and whether what is found after a crash can come of that.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::storage::tests::crash::Random;
use crate::storage::{Done, Entry, GroupLog, LogId};

/// What one group holds. Contents follow from the size and the id, see [`payload`].
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct State {
    pub(super) entries: BTreeMap<u64, (LogId, usize)>,
    pub(super) purged: Option<LogId>,
    pub(super) vote: Option<Bytes>,
}

/// A record as the log writes it; an append of several entries is several changes.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Entry(LogId, usize),
    Truncate(Option<u64>),
    Purge(LogId),
    Vote(Bytes),
}

/// All groups since the log was opened. The log has one order for all of them, so after a crash exactly the changes before
/// some moment are there, and that moment is not before the last acknowledgement.
#[derive(Debug)]
pub(super) struct History {
    /// As found when the log was opened.
    base: Vec<State>,
    changes: Vec<(usize, Change)>,
    /// With all changes: what readers see.
    pub(super) now: Vec<State>,
    /// Marks that may be found, by group.
    committed: Vec<Vec<Option<LogId>>>,
    told: Arc<Mutex<Told>>,
}

/// What callbacks said.
#[derive(Debug, Default)]
struct Told {
    /// This many changes, the oldest, are durable.
    acknowledged: usize,
    /// Of callbacks handed in.
    asked: u64,
    answered: u64,
    failed: bool,
    wrong: Option<String>,
}

impl State {
    pub(super) fn last(&self) -> Option<LogId> {
        self.entries
            .last_key_value()
            .map(|(_, (id, _))| *id)
            .or(self.purged)
    }

    fn apply(&mut self, change: &Change) {
        match change {
            Change::Entry(id, size) => drop(self.entries.insert(id.index, (*id, *size))),
            Change::Truncate(None) => self.entries.clear(),
            Change::Truncate(Some(keep)) => drop(self.entries.split_off(&(keep + 1))),
            Change::Purge(upto) => {
                self.purged = Some(*upto);
                self.entries = self.entries.split_off(&(upto.index + 1));
            }
            Change::Vote(vote) => self.vote = Some(vote.clone()),
        }
    }

    /// What the log says of a group, every byte compared. Of an entry that cannot be read the id counts; `size` tells
    /// how large it was.
    pub(super) fn of(group: &GroupLog, number: usize, size: impl Fn(LogId) -> usize) -> Self {
        let mut entries = BTreeMap::new();
        let mut at = group.first().unwrap_or(0);
        let end = group.last().map_or(0, |last| last.index + 1);
        let holes = group.holes();
        for hole in holes.iter().cloned().chain(std::iter::once(end..end)) {
            if at < hole.start {
                for entry in group.read(at..hole.start, usize::MAX).unwrap() {
                    check(&entry, number);
                    entries.insert(entry.id.index, (entry.id, entry.payload.len()));
                }
            }
            for index in hole.clone() {
                let id = group.id(index).expect("it exists");
                assert!(group.read(index..index + 1, 0).is_err(), "read from a hole");
                entries.insert(index, (id, size(id)));
            }
            at = hole.end;
        }
        let (purged, vote) = (group.purged(), group.vote());
        let state = Self {
            entries,
            purged,
            vote,
        };
        assert_eq!(
            group.last(),
            state.last(),
            "the group's end against what can be read"
        );
        state
    }
}

/// An entry's bytes: other ones for each group, id and size.
pub(super) fn payload(group: usize, id: LogId, size: usize) -> Bytes {
    let mut random =
        Random::new((group as u64) << 48 ^ id.term << 32 ^ id.index << 16 ^ size as u64);
    let bytes: Vec<u8> = std::iter::repeat_with(|| random.below(1 << 31).to_le_bytes())
        .flat_map(|eight| [eight[0], eight[1], eight[2]])
        .take(size)
        .collect();
    bytes.into()
}

pub(super) fn entry(group: usize, id: LogId, size: usize) -> Entry {
    Entry {
        id,
        kind: kind(id),
        payload: payload(group, id, size),
    }
}

fn kind(id: LogId) -> u8 {
    u8::try_from((id.index + id.term) % 5).expect("less than five")
}

/// The entry is one that was handed in for this group, byte by byte.
pub(super) fn check(found: &Entry, group: usize) {
    let expected = entry(group, found.id, found.payload.len());
    assert!(
        *found == expected,
        "group {group}: entry {:?} has other bytes than were handed in",
        found.id
    );
}

impl History {
    /// Everything in `base` is durable.
    pub(super) fn new(base: Vec<State>, committed: Vec<Option<LogId>>) -> Self {
        Self {
            now: base.clone(),
            base,
            changes: Vec::new(),
            committed: committed.into_iter().map(|mark| vec![mark]).collect(),
            told: Arc::default(),
        }
    }

    /// Notes that this is about to be handed in.
    pub(super) fn push(&mut self, group: usize, change: Change) {
        self.now[group].apply(&change);
        self.changes.push((group, change));
    }

    /// The payload's size of an entry that was handed in.
    pub(super) fn size(&self, group: usize, id: LogId) -> usize {
        let changed = self.changes.iter().rev().find_map(|change| match change {
            (of, Change::Entry(found, size)) if (*of, *found) == (group, id) => Some(*size),
            _ => None,
        });
        let before = || {
            self.base[group]
                .entries
                .get(&id.index)
                .filter(|(found, _)| *found == id)
        };
        let size = changed.or_else(|| before().map(|(_, size)| *size));
        size.unwrap_or_else(|| panic!("group {group}: {id:?} was never handed in"))
    }

    /// How many changes were handed in.
    pub(super) fn len(&self) -> usize {
        self.changes.len()
    }

    /// All but the first `len` changes were refused at once, so they may never appear.
    pub(super) fn refused(&mut self, len: usize) {
        self.changes.truncate(len);
    }

    pub(super) fn commit(&mut self, group: usize, mark: Option<LogId>) {
        self.committed[group].push(mark);
    }

    /// The newest mark handed in.
    pub(super) fn committed(&self, group: usize) -> Option<LogId> {
        *self.committed[group]
            .last()
            .expect("there is one from the start")
    }

    /// A callback for what was pushed so far.
    pub(super) fn done(&self) -> Done {
        let (told, changes) = (self.told.clone(), self.changes.len());
        let number = {
            let mut told = told.lock().unwrap();
            told.asked += 1;
            told.asked
        };
        Box::new(move |result| {
            let mut told = told.lock().unwrap();
            told.answered += 1;
            // Refusals come at once, on the caller's thread, and may overtake.
            if result.is_ok() && told.answered != number {
                told.wrong = Some(format!(
                    "callback {number} was told as number {}",
                    told.answered
                ));
            }
            if result.is_ok() && told.failed {
                told.wrong = Some("acknowledged after a failure".to_owned());
            }
            match result {
                Ok(()) => told.acknowledged = told.acknowledged.max(changes),
                Err(_) => told.failed = true,
            }
        })
    }

    /// Whether a callback was told of a failure.
    pub(super) fn has_failed(&self) -> bool {
        self.told.lock().unwrap().failed
    }

    /// After the log has ended: every callback was told once, in order, and none was told well after one was told ill.
    pub(super) fn check_callbacks(&self) {
        let told = self.told.lock().unwrap();
        assert_eq!(told.wrong, None);
        assert_eq!(told.asked, told.answered, "callbacks that were never told");
    }

    /// The log was closed well: everything is durable.
    pub(super) fn close(&mut self) {
        self.told.lock().unwrap().acknowledged = self.changes.len();
        for marks in &mut self.committed {
            marks.drain(..marks.len() - 1);
        }
    }

    /// `found` holds the changes before some moment, not before the last acknowledgement.
    pub(super) fn check(&self, found: &[State], committed: &[Option<LogId>]) {
        let acknowledged = self.told.lock().unwrap().acknowledged;
        let mut states = self.base.clone();
        let mut same: Vec<bool> = (states.iter().zip(found))
            .map(|(state, found)| state == found)
            .collect();
        let mut possible = acknowledged == 0 && same.iter().all(|same| *same);
        for (n, (group, change)) in (1..).zip(&self.changes) {
            states[*group].apply(change);
            same[*group] = states[*group] == found[*group];
            possible |= n >= acknowledged && same.iter().all(|same| *same);
        }
        assert!(possible, "{}", self.explain(found, acknowledged));
        for (group, (found, possible)) in committed.iter().zip(&self.committed).enumerate() {
            assert!(
                possible.contains(found),
                "group {group}: committed mark {found:?} is none of {possible:?}"
            );
        }
    }

    fn explain(&self, found: &[State], acknowledged: usize) -> String {
        let mut durable = self.base.clone();
        for (group, change) in &self.changes[..acknowledged] {
            durable[*group].apply(change);
        }
        let mut text = format!(
            "what is found is no state from change {acknowledged} (acknowledged) to {}",
            self.changes.len()
        );
        for (group, (found, durable)) in found.iter().zip(&durable).enumerate() {
            if found != durable {
                text += &format!(
                    "\n  group {group} acknowledged {}\n  group {group} found        {}",
                    brief(durable),
                    brief(found)
                );
            }
        }
        text += &format!("\n  not acknowledged: {:?}", &self.changes[acknowledged..]);
        text
    }
}

fn brief(state: &State) -> String {
    let ids: Vec<_> = state
        .entries
        .values()
        .map(|(id, size)| format!("{}.{}/{size}", id.term, id.index))
        .collect();
    let purged = state.purged.map(|id| (id.term, id.index));
    format!(
        "vote {:?}, purged {purged:?}, entries (term.index/size) {}",
        state.vote,
        ids.join(" ")
    )
}
