//! One run: a node that starts, works as Raft would have it, and dies in some way, several times over.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;

use bytes::Bytes;

use super::oracle::{Change, History, State, check, entry};
use crate::storage::tests::crash::Random;
use crate::storage::tests::owner;
use crate::storage::{Error, Faults, GroupLog, Log, LogId, MemoryDisk, Options, PowerCut};
use crate::types::GroupId;

pub(super) const GROUPS: usize = 4;
const LIVES: u64 = 6;

pub(super) struct Run {
    seed: u64,
    pub(super) random: Random,
    pub(super) disk: MemoryDisk,
    pub(super) history: History,
    /// A change is waited for one time in so many; 1 is always.
    patience: u64,
    /// All entries have this size, so that what a torn write left behind fits to what is written next.
    alike: Option<usize>,
    term: u64,
    directory_id: Option<String>,
}

pub(super) fn run(seed: u64) {
    let mut run = Run::new(seed);
    for _ in 0..LIVES {
        let (log, groups) = run.start();
        run.work(&groups);
        run.end(log);
    }
    let (log, _) = run.start();
    log.close().unwrap();
}

impl Run {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        Self {
            seed,
            patience: [1, 4, 1000][usize::try_from(random.below(3)).unwrap()],
            // Without a payload they are as large as every mark.
            alike: [Some(0), Some(0), Some(100), None, None, None]
                [usize::try_from(random.below(6)).unwrap()],
            random,
            disk: MemoryDisk::default(),
            history: History::new(vec![State::default(); GROUPS], vec![None; GROUPS]),
            term: 1,
            directory_id: None,
        }
    }

    fn one_in(&mut self, times: u64) -> bool {
        self.random.below(times) == 0
    }

    fn pick<const N: usize>(&mut self, of: [u64; N]) -> u64 {
        of[usize::try_from(self.random.below(N as u64)).unwrap()]
    }

    fn options(&mut self) -> Options {
        Options {
            segment_bytes: self.pick([4096, 4096, 8192, 16384]),
            tail_bytes: usize::try_from(self.pick([0, 1000, 1 << 20])).unwrap(),
            spare_segments: usize::try_from(self.random.below(4)).unwrap(),
            ..Options::new("log")
        }
    }

    /// Opens the log, which may take several tries when the disk fails meanwhile, and compares what is there.
    pub(super) fn start(&mut self) -> (Log, Vec<GroupLog>) {
        for attempt in 0.. {
            let faults = match attempt < 3 && self.one_in(3) {
                true => self.start_faults(),
                false => Faults::default(),
            };
            self.disk.set_faults(faults, self.random.below(1 << 31));
            let options = self.options();
            match Log::open_on(Arc::new(self.disk.clone()), options, &owner()) {
                Ok(log) => {
                    let unread = self.disk.has_failed();
                    self.disk.set_faults(Faults::default(), 0);
                    let groups = self.found(&log, unread);
                    return (log, groups);
                }
                // A crash is no damage: only the disk's own failures are a reason to refuse.
                Err(Error::Io { .. }) if self.disk.has_failed() => {}
                Err(error) => panic!("the log does not open: {error}"),
            }
            self.fall();
        }
        unreachable!("without faults a log opens")
    }

    fn start_faults(&mut self) -> Faults {
        match self.random.below(3) {
            0 => Faults {
                power_off_at: 1 + self.random.below(24),
                ..Faults::default()
            },
            1 => Faults {
                read_errors: 8,
                ..Faults::default()
            },
            _ => Faults {
                write_errors: 6,
                sync_errors: 6,
                name_errors: 6,
                full: 8,
                ..Faults::default()
            },
        }
    }

    /// Takes over what a log that has just been opened says, if it is possible. Where the disk failed meanwhile
    /// entries may be unreadable, but none may be missing.
    fn found(&mut self, log: &Log, unread: bool) -> Vec<GroupLog> {
        let groups: Vec<_> = (0..GROUPS)
            .map(|n| log.group(GroupId(u32::try_from(n).unwrap())))
            .collect();
        let states = groups.iter().enumerate();
        let found: Vec<_> = states
            .map(|(n, group)| {
                let holes = group.holes();
                assert!(unread || holes.is_empty(), "group {n}: holes {holes:?}");
                State::of(group, n, |id| self.history.size(n, id))
            })
            .collect();
        let committed: Vec<_> = groups.iter().map(GroupLog::committed).collect();
        self.history.check(&found, &committed);
        self.history = History::new(found, committed);
        let directory_id = log.directory_id().to_owned();
        let before = self
            .directory_id
            .get_or_insert_with(|| directory_id.clone());
        assert_eq!(*before, directory_id, "another directory");
        groups
    }

    /// Changes of all kinds until the log fails or enough was done.
    pub(super) fn work(&mut self, groups: &[GroupLog]) {
        let faults = self.work_faults();
        self.disk.set_faults(faults, self.random.below(1 << 31));
        self.term += 1;
        for _ in 0..self.pick([0, 5, 30, 80, 120]) {
            let group = usize::try_from(self.random.below(GROUPS as u64)).unwrap();
            let before = self.history.len();
            let handed_in = self.change(group, &groups[group]);
            if handed_in.is_err() {
                self.history.refused(before);
            }
            if handed_in.is_err() || self.history.has_failed() {
                assert!(
                    self.disk.has_failed(),
                    "refused without a reason: {handed_in:?}"
                );
                break;
            }
            if self.one_in(3) {
                self.read(group, &groups[group]);
            }
            if self.one_in(self.patience) {
                let (told_tx, told) = channel();
                let done = self.history.done();
                let done = Box::new(move |result: io::Result<()>| {
                    done(result);
                    told_tx.send(()).unwrap();
                });
                drop(groups[group].append(Vec::new(), done));
                told.recv().unwrap();
            }
        }
        if self.history.has_failed() {
            self.refuses(groups);
        }
    }

    fn work_faults(&mut self) -> Faults {
        let stalls = u32::try_from(self.pick([0, 0, 0, 60])).unwrap();
        let power_off_at = self.pick([0, 1, 1]) * (1 + self.random.below(160));
        let faults = Faults {
            stalls,
            power_off_at,
            ..Faults::default()
        };
        match self.random.below(8) {
            0 => Faults {
                write_errors: 60,
                ..faults
            },
            1 => Faults {
                sync_errors: 60,
                ..faults
            },
            2 => Faults {
                name_errors: 20,
                ..faults
            },
            3 => Faults { full: 60, ..faults },
            4 => Faults {
                read_errors: 5,
                ..faults
            },
            _ => faults,
        }
    }

    /// Hands in one change as Raft might. Fails when the log has failed.
    fn change(&mut self, n: usize, group: &GroupLog) -> io::Result<()> {
        let last = self.history.now[n].last().map_or(0, |id| id.index);
        let purged = self.history.now[n].purged.map_or(0, |id| id.index);
        let committed = self
            .history
            .committed(n)
            .map_or(0, |id| id.index)
            .clamp(purged, last.max(purged));
        match self.random.below(14) {
            0 | 1 => {
                let vote = Bytes::from(format!("{} for {}", self.term, self.random.below(1 << 31)));
                self.history.push(n, Change::Vote(vote.clone()));
                group.save_vote(vote, self.history.done());
            }
            2 | 3 if committed > purged => {
                let upto = purged + 1 + self.random.below(committed - purged);
                let (upto, _) = self.history.now[n].entries[&upto];
                self.history.push(n, Change::Purge(upto));
                group.purge(upto, self.history.done());
            }
            4 if self.one_in(8) => {
                // A snapshot from elsewhere that is ahead of this log.
                let ahead = 1 + self.random.below(10);
                let upto = self.id(last + ahead);
                self.history.push(n, Change::Purge(upto));
                group.purge(upto, self.history.done());
            }
            5 | 6 if last > committed => {
                let keep = committed + self.random.below(last - committed);
                self.term += 1;
                self.history.push(n, Change::Truncate(Some(keep)));
                return group.truncate_after(Some(keep));
            }
            7 | 8 if last > committed => {
                let upto = committed + 1 + self.random.below(last - committed);
                let mark = self.history.now[n].entries.get(&upto).map(|(id, _)| *id);
                self.history.commit(n, mark);
                return group.save_committed(mark);
            }
            _ => {
                let count = self.pick([1, 1, 1, 3, 8]);
                let entries = (last + 1..=last + count).map(|index| {
                    let size = self.size();
                    let id = self.id(index);
                    self.history.push(n, Change::Entry(id, size));
                    entry(n, id, size)
                });
                let entries = entries.collect();
                return group.append(entries, self.history.done());
            }
        }
        Ok(())
    }

    fn id(&self, index: u64) -> LogId {
        LogId {
            term: self.term,
            node: self.term % 3 + 1,
            index,
        }
    }

    fn size(&mut self) -> usize {
        if let Some(size) = self.alike {
            return size;
        }
        let most = self.pick([1, 50, 300, 300, 300, 1200, 1200, 5000]);
        usize::try_from(self.random.below(most)).unwrap() * if self.one_in(100) { 5 } else { 1 }
    }

    /// Readers see what was handed in, or an error when the disk gives one.
    fn read(&mut self, n: usize, group: &GroupLog) {
        let state = &self.history.now[n];
        let first = state
            .entries
            .first_key_value()
            .map_or(0, |(index, _)| *index);
        let start = first + self.random.below(40);
        let end = start + self.random.below(6);
        match group.read(start..end, usize::MAX) {
            Ok(found) => {
                found.iter().for_each(|entry| check(entry, n));
                let found: Vec<_> = found
                    .iter()
                    .map(|entry| (entry.id, entry.payload.len()))
                    .collect();
                let expected: Vec<_> = state
                    .entries
                    .range(start..end.max(start))
                    .map(|(_, entry)| *entry)
                    .collect();
                assert_eq!(found, expected, "group {n}: entries {start} to {end}");
            }
            Err(error) => assert!(
                self.disk.has_failed() || !group.holes().is_empty(),
                "group {n}: entries {start} to {end}: {error}"
            ),
        }
    }

    /// A log that has failed takes nothing more, even if the disk is well again.
    fn refuses(&mut self, groups: &[GroupLog]) {
        if self.disk.is_off() {
            return;
        }
        self.disk.heal();
        for group in groups {
            let next = group.last().map_or(1, |last| last.index + 1);
            let late = entry(0, self.id(next), 10);
            assert!(group.append(vec![late], self.history.done()).is_err());
            group.save_vote(Bytes::from_static(b"late"), self.history.done());
            group.purge(self.id(next), self.history.done());
            assert!(group.save_committed(None).is_err());
        }
    }

    /// The node stops, is killed, or loses its power, and a disk is left for the next life.
    pub(super) fn end(&mut self, log: Log) {
        let closes = self.one_in(4);
        if !closes && self.one_in(2) {
            self.disk.power_off();
        }
        // Without a reason it does not fail; what is closed so is durable, whatever follows.
        match log.close() {
            Ok(()) => self.history.close(),
            Err(error) => assert!(self.disk.has_failed(), "closing: {error}"),
        }
        self.history.check_callbacks();
        self.fall();
    }

    /// What the next start finds.
    fn fall(&mut self) {
        let random = &mut self.random;
        let how = PowerCut {
            tears_sectors: random.below(2) == 0,
            reorders_names: random.below(2) == 0,
        };
        self.disk = match random.below(3) {
            0 => self.disk.after_kill(),
            _ => self.disk.after_power_cut(how, |end| random.below(end)),
        };
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }
}
