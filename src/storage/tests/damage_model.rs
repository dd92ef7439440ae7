//! Random operations, restarts and damage of sealed segments against a simple model: an entry is right or missing,
//! nothing comes back that was removed, and what is missing can be put back.

use super::crash::Random;
use super::*;
use crate::storage::{Disk, segment};

#[derive(Default)]
struct Model {
    entries: Vec<Entry>,
    purged: Option<LogId>,
}

impl Model {
    fn step(&mut self, group: &GroupLog, random: &mut Random, term: u64) {
        let last = self.entries.last().map(|entry| entry.id).or(self.purged);
        let last = last.map_or(0, |last| last.index);
        let purged = self.purged.map_or(0, |purged| purged.index);
        match random.below(10) {
            0 if last > purged => {
                let upto = group
                    .id(purged + 1 + random.below((last - purged).div_ceil(3)))
                    .unwrap();
                self.purged = Some(upto);
                self.entries.retain(|entry| entry.id.index > upto.index);
                group.purge(upto, done().0);
            }
            1 if last > purged => {
                let keep = last - random.below((last - purged).min(12));
                self.entries.retain(|entry| entry.id.index <= keep);
                group.truncate_after(Some(keep)).unwrap();
            }
            _ => {
                let size = usize::try_from(random.below(300)).unwrap();
                let new: Vec<_> = (last + 1..=last + random.below(8))
                    .map(|index| entry(term, index, size))
                    .collect();
                self.entries.extend(new.clone());
                append(group, new);
            }
        }
    }

    /// How many entries cannot be read.
    fn check(&self, group: &GroupLog, what: &str) -> usize {
        let ids: Vec<_> = self.entries.iter().map(|entry| entry.id).collect();
        let last = ids.last().copied().or(self.purged);
        assert_eq!(
            (group.last(), group.purged()),
            (last, self.purged),
            "{what}"
        );
        assert_eq!(group.first(), ids.first().map(|id| id.index), "{what}");
        let mut lost = Vec::new();
        for entry in &self.entries {
            let index = entry.id.index;
            assert_eq!(group.id(index), Some(entry.id), "{what}");
            match group.read(index..index + 1, 0) {
                Ok(found) => assert_eq!(found, std::slice::from_ref(entry), "{what}"),
                Err(_) => lost.push(index),
            }
        }
        let holes: Vec<_> = group.holes().into_iter().flatten().collect();
        assert_eq!(holes, lost, "{what}");
        lost.len()
    }

    fn repair(&self, group: &GroupLog, random: &mut Random) {
        for hole in group.holes() {
            let inside = self
                .entries
                .iter()
                .filter(|entry| hole.contains(&entry.id.index));
            let mut entries: Vec<_> = inside.cloned().collect();
            let second = entries.split_off(entries.len() / 2);
            // The newer half first, sometimes.
            let halves = match random.below(2) {
                0 => [entries, second],
                _ => [second, entries],
            };
            for half in halves {
                let (done, outcome) = done();
                group.repair(half, done);
                outcome.recv().unwrap().unwrap();
            }
        }
    }
}

/// Damages some segments, the newest apart.
fn harm(disk: &MemoryDisk, random: &mut Random) {
    let mut names = disk.list().unwrap();
    names.retain(|name| segment::number(name).is_some());
    names.pop();
    for name in names {
        let mut bytes = disk.bytes(&name);
        let mut at = || usize::try_from(random.below(bytes.len() as u64)).unwrap();
        let (from, bit) = (at(), at() % 8);
        match random.below(12) {
            0 => disk.remove(&name).unwrap(),
            1 => {
                let to = (from + 700).min(bytes.len());
                bytes[from..to].fill(0);
                disk.put_bytes(&name, bytes);
            }
            2 | 3 => {
                bytes[from] ^= 1 << bit;
                disk.put_bytes(&name, bytes);
            }
            4 => {
                bytes.truncate(from);
                disk.put_bytes(&name, bytes);
            }
            _ => {}
        }
    }
}

fn run(seed: u64) -> usize {
    let mut random = Random::new(seed);
    let mut disk = MemoryDisk::default();
    let mut models: Vec<_> = (0..3).map(|_| Model::default()).collect();
    let (mut term, mut lost) = (0, 0);
    for restart in 0..6 {
        let what = format!("seed {seed}, restart {restart}");
        let log = open(&disk);
        let groups: Vec<_> = (0..3).map(|n| log.group(GroupId(n))).collect();
        let scrubs = random.below(2) == 0;
        if scrubs {
            log.scrub_now().unwrap();
        }
        let before = log.stats().holes;
        for (model, group) in models.iter().zip(&groups) {
            lost += model.check(group, &what);
        }
        if scrubs {
            assert_eq!(
                log.stats().holes,
                before,
                "{what}: scrubbing has found them all"
            );
        }
        for step in 0..60 {
            let n = usize::try_from(random.below(3)).unwrap();
            term += 1;
            models[n].step(&groups[n], &mut random, term);
            if step == 20 || restart == 5 {
                models[n].repair(&groups[n], &mut random);
            }
        }
        for (model, group) in models.iter().zip(&groups) {
            if random.below(4) > 0 || restart == 5 {
                model.repair(group, &mut random);
                assert_eq!(model.check(group, &what), 0, "{what}: after repair");
            }
        }
        log.close().unwrap();
        disk = disk.power_cut(|| random.below(2) == 0);
        if restart < 4 {
            harm(&disk, &mut random);
        }
    }
    let log = open(&disk);
    for (n, model) in (0..).zip(&models) {
        assert_eq!(
            model.check(&log.group(GroupId(n)), "at the end"),
            0,
            "seed {seed}"
        );
    }
    lost
}

#[test]
fn behaves_like_the_model_when_segments_are_damaged() {
    let lost: usize = (0..60).map(run).sum();
    assert!(lost > 500, "{lost}: too little damage to tell");
}
