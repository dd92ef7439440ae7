//! Power cuts at random moments: whatever was confirmed is there afterwards, and nothing that was not written.

use super::*;
use std::collections::BTreeMap;

/// A small generator, so that a seed names a run: xorshift64*.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// From 0 to `end` - 1.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % end
    }
}

const GROUPS: u64 = 4;

/// What one group was told is durable. Changes of a group are numbered, the callbacks raise `confirmed`.
#[derive(Default)]
struct Told {
    /// State of the group after each change that was handed in, oldest first.
    states: Vec<Expected>,
    confirmed: usize,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Expected {
    entries: BTreeMap<u64, u64>,
    purged: Option<LogId>,
    vote: Option<Bytes>,
}

fn found(group: &GroupLog) -> Expected {
    Expected {
        entries: all(group)
            .into_iter()
            .map(|found| {
                let size = found.payload.len();
                assert_eq!(
                    found,
                    entry(found.id.term, found.id.index, size),
                    "contents"
                );
                (found.id.index, found.id.term)
            })
            .collect(),
        purged: group.purged(),
        vote: group.vote(),
    }
}

/// Hands in one random change and notes what it leads to.
fn change(random: &mut Random, term: u64, group: &GroupLog, told: &Arc<Mutex<Told>>) {
    let mut next = told.lock().unwrap().states.last().unwrap().clone();
    let number = told.lock().unwrap().states.len();
    let confirm = told.clone();
    let done: Done = Box::new(move |result| {
        result.unwrap();
        let mut told = confirm.lock().unwrap();
        assert!(told.confirmed < number, "confirmed out of order");
        told.confirmed = number;
    });
    let last = group.last().map_or(0, |last| last.index);
    let first = group.purged().map_or(0, |purged| purged.index);
    match random.below(10) {
        0 => {
            next.vote = Some(Bytes::from(format!("vote {number}")));
            group.save_vote(next.vote.clone().unwrap(), done);
        }
        1 if last > first => {
            let upto = group.id(first + 1 + random.below(last - first)).unwrap();
            next.purged = Some(upto);
            next.entries.retain(|index, _| *index > upto.index);
            group.purge(upto, done);
        }
        2 if last > first => {
            let keep = first + random.below(last - first + 1);
            next.entries.retain(|index, _| *index <= keep);
            // Two changes: the truncation may be found without the append.
            told.lock().unwrap().states.push(next.clone());
            group.truncate_after(Some(keep)).unwrap();
            return change(random, term, group, told);
        }
        _ => {
            let new: Vec<_> = (last + 1..last + 2 + random.below(6))
                .map(|index| entry(term, index, usize::try_from(random.below(700)).unwrap()))
                .collect();
            // One frame at a time: a crash may find a beginning of what was handed in together.
            for entry in &new {
                next.entries.insert(entry.id.index, entry.id.term);
                told.lock().unwrap().states.push(next.clone());
            }
            let number = told.lock().unwrap().states.len() - 1;
            let confirm = told.clone();
            let done: Done = Box::new(move |result| {
                result.unwrap();
                confirm.lock().unwrap().confirmed = number;
            });
            group.append(new, done).unwrap();
            return;
        }
    }
    told.lock().unwrap().states.push(next);
}

fn run(seed: u64) {
    let mut random = Random::new(seed);
    let mut disk = MemoryDisk::default();
    let mut told: Vec<_> = (0..GROUPS)
        .map(|_| {
            let states = vec![Expected::default()];
            Arc::new(Mutex::new(Told {
                states,
                confirmed: 0,
            }))
        })
        .collect();
    for term in 1..6 {
        let log = open(&disk);
        let groups: Vec<_> = (0..4).map(|n| log.group(GroupId(n))).collect();
        for (group, told) in groups.iter().zip(&mut told) {
            let found = found(group);
            let before = told.lock().unwrap();
            let possible = &before.states[before.confirmed..];
            assert!(
                possible.contains(&found),
                "seed {seed}, term {term}: {found:?} is none of {possible:?}"
            );
            drop(before);
            let states = vec![found];
            *told = Arc::new(Mutex::new(Told {
                states,
                confirmed: 0,
            }));
        }
        for _ in 0..random.below(60) {
            let n = usize::try_from(random.below(GROUPS)).unwrap();
            change(&mut random, term, &groups[n], &told[n]);
            if random.below(4) == 0 {
                let (done, outcome) = done();
                groups[n].append(Vec::new(), done).unwrap();
                outcome.recv().unwrap().unwrap();
            }
        }
        if random.below(8) == 0 {
            log.close().unwrap();
        }
        // What is confirmed from here on may or may not be in the image; what was confirmed before must.
        let before: Vec<_> = told
            .iter()
            .map(|told| told.lock().unwrap().confirmed)
            .collect();
        disk = disk.power_cut(|| random.below(2) == 0);
        let stopped = log.close();
        assert!(stopped.is_ok(), "{stopped:?}");
        for (told, confirmed) in told.iter().zip(before) {
            told.lock().unwrap().confirmed = confirmed;
        }
    }
}

#[test]
fn what_was_confirmed_survives_power_cuts() {
    for seed in 0..300 {
        run(seed);
    }
}
