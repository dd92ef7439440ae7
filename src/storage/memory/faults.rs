//! What goes wrong on a [`MemoryDisk`](crate::storage::MemoryDisk), drawn from a seed.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use crate::storage::memory::Op;

/// How often operations fail: "one in so many", where 0 is never.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// `EIO` of writes, which may have written their first sectors.
    pub write_errors: u32,
    /// `EIO` of syncs, which may have written some sectors and forget the others.
    pub sync_errors: u32,
    /// `EIO` of reads.
    pub read_errors: u32,
    /// `EIO` of renames, removals and syncs of the directory. Nothing happened then.
    pub name_errors: u32,
    /// `ENOSPC` of creates and of writes that grow a file; from the first on, all of these fail.
    pub full: u32,
    /// Operations that take up to a fifth of a millisecond longer.
    pub stalls: u32,
    /// The power goes off at this operation, the first being 1: it and all later ones fail. They do nothing, except
    /// that if this one is a write its first sectors may be written.
    pub power_off_at: u64,
}

/// What a power cut does beyond losing unsynced sectors in any combination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PowerCut {
    /// Of some sectors only the first bytes are new. Devices promise that this does not happen.
    pub tears_sectors: bool,
    /// Unsynced names survive in any combination, which POSIX allows; otherwise as far as a journal had come.
    pub reorders_names: bool,
}

/// Decides the fate of one operation after the other.
#[derive(Debug, Default)]
pub(super) struct Injector {
    faults: Faults,
    seed: u64,
    /// Operations so far, by kind and by what remains of the name without its number: so the log's threads, which use
    /// different kinds of names, do not shift each other's fates.
    counts: BTreeMap<(Op, String), u64>,
    operations: u64,
    off: bool,
    full: bool,
    failed: bool,
}

/// Why an operation fails.
#[derive(Debug)]
pub(super) struct Trouble {
    error: io::Error,
    /// Bits to draw from; 0 when the operation does nothing at all.
    random: u64,
}

impl Injector {
    pub(super) fn new(faults: Faults, seed: u64) -> Self {
        Self {
            faults,
            seed,
            ..Self::default()
        }
    }

    pub(super) fn heal(&mut self) {
        self.faults = Faults::default();
        self.full = false;
    }

    pub(super) fn power_off(&mut self) {
        self.off = true;
    }

    pub(super) fn is_off(&self) -> bool {
        self.off
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// How long the next operation takes, and whether it may go on.
    pub(super) fn next(&mut self, op: Op, name: &str) -> (Duration, Result<(), Trouble>) {
        self.operations += 1;
        if self.off || self.operations == self.faults.power_off_at {
            // What is being written at that moment may be there in part.
            let interrupted = !self.off && op == Op::Write;
            self.off = true;
            let random = if interrupted {
                self.draw(op, name) | 1
            } else {
                0
            };
            let error = io::Error::other("the power is off");
            return (Duration::ZERO, Err(self.fail(error, random)));
        }
        if self.faults == Faults::default() {
            return (Duration::ZERO, Ok(()));
        }
        let random = self.draw(op, name);
        let hit = |one_in: u32, salt: u64| {
            one_in > 0 && mix(random ^ salt).is_multiple_of(u64::from(one_in))
        };
        let stall = match hit(self.faults.stalls, 1) {
            true => Duration::from_micros(mix(random) % 200),
            false => Duration::ZERO,
        };
        let one_in = match op {
            Op::Create => 0,
            Op::Read => self.faults.read_errors,
            Op::Write => self.faults.write_errors,
            Op::Sync => self.faults.sync_errors,
            Op::Rename | Op::Remove | Op::SyncDir => self.faults.name_errors,
        };
        if hit(one_in, 2) {
            let error = io::Error::from_raw_os_error(5);
            return (stall, Err(self.fail(error, random | 1)));
        }
        let grows = matches!(op, Op::Create | Op::Write);
        self.full |= grows && hit(self.faults.full, 3);
        if self.full && grows {
            // Whether this write grows its file is not known here.
            let error = io::ErrorKind::StorageFull.into();
            return (stall, Err(self.fail(error, random | 1)));
        }
        (stall, Ok(()))
    }

    fn fail(&mut self, error: io::Error, random: u64) -> Trouble {
        self.failed = true;
        Trouble { error, random }
    }

    /// A number that only depends on the seed, the kind of operation and how many there were of it.
    fn draw(&mut self, op: Op, name: &str) -> u64 {
        let kind: String = name.chars().filter(|c| !c.is_ascii_hexdigit()).collect();
        let of_name = kind
            .bytes()
            .fold(7, |hash, byte| mix(hash ^ u64::from(byte)));
        let count = self.counts.entry((op, kind)).or_default();
        *count += 1;
        mix(self.seed ^ mix(of_name ^ mix(*count ^ mix(op as u64))))
    }
}

impl Trouble {
    pub(super) fn is_full(&self) -> bool {
        self.error.kind() == io::ErrorKind::StorageFull
    }

    /// Whether the operation may have had a part of its effect.
    pub(super) fn is_partial(&self) -> bool {
        self.random != 0
    }

    /// From 0 to `end` - 1.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.random = mix(self.random) | 1;
        (self.random >> 1) % end
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self { error, random: 0 }
    }
}

impl From<Trouble> for io::Error {
    fn from(trouble: Trouble) -> Self {
        trouble.error
    }
}

/// splitmix64's output function.
fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}
