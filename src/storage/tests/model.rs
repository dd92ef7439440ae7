//! Random operations on several groups against a simple model, across restarts and power cuts in quiet moments.

use super::crash::Random;
use super::*;

#[derive(Default)]
struct Model {
    entries: Vec<Entry>,
    purged: Option<LogId>,
    vote: Option<Bytes>,
    committed: Option<LogId>,
}

impl Model {
    fn last(&self) -> Option<LogId> {
        self.entries.last().map(|entry| entry.id).or(self.purged)
    }

    fn check(&self, group: &GroupLog, random: &mut Random, what: &str) {
        assert_eq!(group.last(), self.last(), "{what}");
        assert_eq!(group.purged(), self.purged, "{what}");
        assert_eq!(group.vote(), self.vote, "{what}");
        assert_eq!(
            group.first(),
            self.entries.first().map(|entry| entry.id.index),
            "{what}"
        );
        assert_eq!(group.committed(), self.committed, "{what}");
        assert_eq!(all(group), self.entries, "{what}");
        for entry in &self.entries {
            assert_eq!(group.id(entry.id.index), Some(entry.id), "{what}");
        }
        let mut starts: Vec<LogId> = self.entries.iter().map(|entry| entry.id).collect();
        starts.dedup_by_key(|id| (id.term, id.node));
        assert_eq!(group.leader_starts(), starts, "{what}");
        let bytes: usize = self.entries.iter().map(|entry| entry.payload.len()).sum();
        assert_eq!(group.bytes(), bytes as u64, "{what}");
        assert_eq!(group.holes(), [], "{what}");
        let (start, end) = (random.below(200), random.below(200));
        let inside = |entry: &&Entry| (start..end).contains(&entry.id.index);
        let expected: Vec<_> = self.entries.iter().filter(inside).cloned().collect();
        assert_eq!(
            group.read(start..end, usize::MAX).unwrap(),
            expected,
            "{what}"
        );
    }

    fn step(&mut self, group: &GroupLog, random: &mut Random, term: u64) {
        let last = self.last().map_or(0, |last| last.index);
        let purged = self.purged.map_or(0, |purged| purged.index);
        match random.below(12) {
            0 => {
                self.vote = Some(Bytes::from(format!("vote of {term}")));
                group.save_vote(self.vote.clone().unwrap(), done().0);
            }
            1 => {
                self.committed = self.last();
                group.save_committed(self.committed).unwrap();
            }
            2 => {
                let upto = id(term, purged + random.below(last - purged + 3));
                if self.purged.is_none_or(|purged| purged.index < upto.index) {
                    self.purged = Some(upto);
                    self.entries.retain(|entry| entry.id.index > upto.index);
                }
                group.purge(upto, done().0);
            }
            3 | 4 => {
                let keep = purged + random.below(last - purged + 2);
                self.entries.retain(|entry| entry.id.index <= keep);
                group.truncate_after(Some(keep)).unwrap();
            }
            5 if random.below(4) == 0 => {
                self.entries.clear();
                group.truncate_after(None).unwrap();
            }
            _ => {
                let size = usize::try_from(random.below(500)).unwrap();
                let count = random.below(8);
                let new: Vec<_> = (last + 1..=last + count)
                    .map(|index| entry(term, index, size))
                    .collect();
                self.entries.extend(new.clone());
                group.append(new, done().0).unwrap();
            }
        }
    }
}

fn run(seed: u64) {
    let mut random = Random::new(seed);
    let mut disk = MemoryDisk::default();
    let mut models: Vec<_> = (0..3).map(|_| Model::default()).collect();
    for restart in 0..6 {
        let options = Options {
            tail_bytes: usize::try_from(random.below(3) * 1000).unwrap(),
            ..options()
        };
        let log = Log::open_on(Arc::new(disk.clone()), options, &owner()).unwrap();
        let groups: Vec<_> = (0..3).map(|n| log.group(GroupId(n))).collect();
        for (model, group) in models.iter().zip(&groups) {
            model.check(
                group,
                &mut random,
                &format!("seed {seed}, restart {restart}"),
            );
        }
        for step in 0..60 {
            let n = usize::try_from(random.below(3)).unwrap();
            let term = restart * 10 + step / 10;
            models[n].step(&groups[n], &mut random, term);
            let what = format!("seed {seed}, restart {restart}, step {step}");
            models[n].check(&groups[n], &mut random, &what);
        }
        log.close().unwrap();
        disk = disk.power_cut(|| random.below(2) == 0);
    }
}

#[test]
fn behaves_like_the_model() {
    for seed in 0..100 {
        run(seed);
    }
}
