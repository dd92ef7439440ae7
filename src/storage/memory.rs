//! A disk in memory for tests: it forgets what was not synced when power is cut, and fails where it is told to, by
//! hand ([`MemoryDisk::on_op`]) or by a seed ([`MemoryDisk::set_faults`]).
//!
//! What it models: writes reach the medium when they are synced, or at a power cut in any combination of sectors, each
//! whole unless tearing is asked for. Names reach it when the directory is synced, or at a power cut as far as a
//! journal had come, or in any combination. A failed write may have written a part; a failed sync may have written a
//! part and forgets the rest, as Linux does: what was not written stays readable and no later sync writes it. What it does not
//! model: a sector that a power cut leaves unreadable or filled with something else, and a device that lies about a sync.

mod faults;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

pub use self::faults::{Faults, PowerCut};
use self::faults::{Injector, Trouble};
use crate::storage::disk::{DirLock, Disk, DiskFile};
use crate::storage::locked;

/// What is about to be done to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    Create,
    Read,
    Write,
    Sync,
    Rename,
    Remove,
    SyncDir,
}

type Hook = Arc<dyn Fn(Op, &str) -> io::Result<()> + Send + Sync>;

/// Writes survive a power cut whole sectors at a time, in any combination, unless synced.
const SECTOR: usize = 512;

/// Clones are the same disk.
#[derive(Clone, Default)]
pub struct MemoryDisk(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// One lock for everything, so that a power cut is one moment.
    contents: Mutex<Contents>,
    hook: Mutex<Option<Hook>>,
    injector: Mutex<Injector>,
    locked: Arc<AtomicBool>,
}

#[derive(Clone, Default)]
struct Contents {
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// What leads from the durable names to the present ones, oldest first.
    unsynced_names: Vec<NameChange>,
    files: Vec<Bits>,
}

#[derive(Clone)]
enum NameChange {
    Create(String, usize),
    Rename(String, String),
    Remove(String),
}

#[derive(Clone, Default)]
struct Bits {
    now: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<usize>,
    /// The file was emptied since the last sync, which the medium may not know.
    emptied: bool,
}

struct MemoryFile {
    disk: MemoryDisk,
    name: String,
    number: usize,
}

#[derive(Debug)]
struct Held(Arc<AtomicBool>);

impl MemoryDisk {
    /// Calls `hook` before each operation, with the name under which the file was opened. It may block, or refuse.
    pub fn on_op(&self, hook: impl Fn(Op, &str) -> io::Result<()> + Send + Sync + 'static) {
        *locked(&self.0.hook) = Some(Arc::new(hook));
    }

    /// From now on operations fail as `faults` and `seed` have it, counted anew. The n-th operation of a kind on a kind of
    /// name always meets the same fate; which operation is the n-th is up to the threads that use the disk.
    pub fn set_faults(&self, faults: Faults, seed: u64) {
        *locked(&self.0.injector) = Injector::new(faults, seed);
    }

    /// Nothing fails by itself any more; what has failed is not forgotten.
    pub fn heal(&self) {
        locked(&self.0.injector).heal();
    }

    /// Every operation fails from now on.
    pub fn power_off(&self) {
        locked(&self.0.injector).power_off();
    }

    /// Whether the power went off, by [`Faults::power_off_at`] or [`MemoryDisk::power_off`].
    #[must_use]
    pub fn is_off(&self) -> bool {
        locked(&self.0.injector).is_off()
    }

    /// Whether any operation failed since the faults were set.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        locked(&self.0.injector).has_failed()
    }

    /// The disk as a power cut at this moment leaves it: `keep` decides for each unsynced sector, and for the
    /// unsynced names together, whether it made it. This disk itself goes on.
    #[must_use]
    pub fn power_cut(&self, mut keep: impl FnMut() -> bool) -> Self {
        let mut contents = locked(&self.0.contents).clone();
        for file in &mut contents.files {
            file.lose(|_| if keep() { SECTOR } else { 0 });
        }
        if keep() {
            contents.durable_names.clone_from(&contents.names);
        }
        Self::after(contents)
    }

    /// The disk as a power cut at this moment leaves it, where `below(n)` draws a number from 0 to n - 1 for each thing
    /// that may or may not have made it. This disk itself goes on.
    #[must_use]
    pub fn after_power_cut(&self, how: PowerCut, mut below: impl FnMut(u64) -> u64) -> Self {
        let mut contents = locked(&self.0.contents).clone();
        // Also cuts where nothing, and where everything made it.
        let kept_of_8 = below(9);
        for file in &mut contents.files {
            file.lose(|sector_bytes| {
                if below(8) >= kept_of_8 {
                    return 0;
                }
                match how.tears_sectors && below(4) == 0 {
                    true => usize::try_from(below(sector_bytes as u64)).unwrap_or(0),
                    false => sector_bytes,
                }
            });
        }
        let changes = std::mem::take(&mut contents.unsynced_names);
        let journal = below(changes.len() as u64 + 1);
        for (n, change) in (0..).zip(changes) {
            let survives = match how.reorders_names {
                true => below(2) == 0,
                false => n < journal,
            };
            if survives {
                change.apply(&mut contents.durable_names);
            }
        }
        Self::after(contents)
    }

    /// The disk as a new process finds it after the old one was killed: nothing is lost, and nothing is synced that was
    /// not. This disk itself goes on, to nowhere.
    #[must_use]
    pub fn after_kill(&self) -> Self {
        let disk = Self::default();
        *locked(&disk.0.contents) = locked(&self.0.contents).clone();
        disk
    }

    /// A disk that comes back with only what is durable in `contents`.
    fn after(mut contents: Contents) -> Self {
        contents.unsynced_names.clear();
        contents.names.clone_from(&contents.durable_names);
        let disk = Self::default();
        *locked(&disk.0.contents) = contents;
        disk
    }

    /// A file's bytes; empty when there is none of this name.
    #[must_use]
    pub fn bytes(&self, name: &str) -> Vec<u8> {
        let contents = locked(&self.0.contents);
        let number = contents.names.get(name);
        number.map_or_else(Vec::new, |number| contents.files[*number].now.clone())
    }

    /// Replaces a file's bytes durably, creating it where needed: what a failing medium or an operator does.
    pub fn put_bytes(&self, name: &str, bytes: Vec<u8>) {
        let mut contents = locked(&self.0.contents);
        let number = contents.fresh(name);
        contents.durable_names.insert(name.to_owned(), number);
        contents.files[number] = Bits {
            durable: bytes.clone(),
            now: bytes,
            dirty: BTreeSet::new(),
            emptied: false,
        };
    }

    /// Turns one bit of a file over, on the medium and for whoever has the file open: what a failing medium does. Nothing
    /// happens when there is no such byte.
    pub fn flip_bit(&self, name: &str, bit: u64) {
        let mut contents = locked(&self.0.contents);
        let (at, mask) = (
            usize::try_from(bit / 8).unwrap_or(usize::MAX),
            1 << (bit % 8),
        );
        let Some(number) = contents.names.get(name).copied() else {
            return;
        };
        let file = &mut contents.files[number];
        for bytes in [&mut file.now, &mut file.durable] {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= mask;
            }
        }
    }

    fn check(&self, op: Op, name: &str) -> Result<(), Trouble> {
        let hook = locked(&self.0.hook).clone();
        hook.map_or(Ok(()), |hook| hook(op, name))?;
        // The stall is slept without the lock.
        let (stall, fate) = locked(&self.0.injector).next(op, name);
        if !stall.is_zero() {
            std::thread::sleep(stall);
        }
        fate
    }

    fn file(&self, name: &str, number: usize) -> Arc<dyn DiskFile> {
        Arc::new(MemoryFile {
            disk: self.clone(),
            name: name.to_owned(),
            number,
        })
    }
}

impl Contents {
    fn fresh(&mut self, name: &str) -> usize {
        self.files.push(Bits::default());
        let number = self.files.len() - 1;
        self.change(NameChange::Create(name.to_owned(), number));
        number
    }

    fn change(&mut self, change: NameChange) {
        change.clone().apply(&mut self.names);
        self.unsynced_names.push(change);
    }
}

impl NameChange {
    /// A change of a name that is not there, because what made it was lost, does nothing.
    fn apply(self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Create(name, number) => {
                names.insert(name, number);
            }
            Self::Rename(from, to) => {
                if let Some(number) = names.remove(&from) {
                    names.insert(to, number);
                }
            }
            Self::Remove(name) => {
                names.remove(&name);
            }
        }
    }
}

impl Bits {
    fn write(&mut self, bytes: &[u8], start: usize) {
        let end = start + bytes.len();
        let size = self.now.len().max(end);
        self.now.resize(size, 0);
        self.now[start..end].copy_from_slice(bytes);
        self.dirty.extend(start / SECTOR..end.div_ceil(SECTOR));
    }

    /// The medium gets the first `bytes` of a sector as it is now.
    fn settle(&mut self, sector: usize, bytes: usize) {
        let start = sector * SECTOR;
        let end = (start + bytes).min(self.now.len());
        if start < end {
            let size = self.durable.len().max(end);
            self.durable.resize(size, 0);
            self.durable[start..end].copy_from_slice(&self.now[start..end]);
        }
    }

    fn empty(&mut self) {
        self.now.clear();
        self.dirty.clear();
        self.emptied = true;
    }

    fn sync(&mut self) {
        if std::mem::take(&mut self.emptied) {
            self.durable.clear();
        }
        self.durable.resize(self.now.len(), 0);
        for sector in std::mem::take(&mut self.dirty) {
            self.settle(sector, SECTOR);
        }
    }

    /// Only what is durable remains; of each unsynced sector the first so many bytes as `kept(its size)` says.
    fn lose(&mut self, mut kept: impl FnMut(usize) -> usize) {
        if std::mem::take(&mut self.emptied) && kept(SECTOR) > 0 {
            self.durable.clear();
        }
        for sector in std::mem::take(&mut self.dirty) {
            self.settle(sector, kept(SECTOR));
        }
        self.now = self.durable.clone();
    }

    /// A sync that fails: each sector was written or is forgotten, so that no later sync writes it.
    fn half_sync(&mut self, mut written: impl FnMut() -> bool) {
        for sector in std::mem::take(&mut self.dirty) {
            if written() {
                self.settle(sector, SECTOR);
            }
        }
    }
}

impl Disk for MemoryDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.check(Op::Create, name)?;
        let contents = &mut *locked(&self.0.contents);
        let number = match contents.names.get(name).copied() {
            Some(number) => {
                contents.files[number].empty();
                number
            }
            None => contents.fresh(name),
        };
        Ok(self.file(name, number))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let number = locked(&self.0.contents).names.get(name).copied();
        Ok(self.file(name, number.ok_or(io::ErrorKind::NotFound)?))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(locked(&self.0.contents).names.keys().cloned().collect())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.check(Op::Rename, from)?;
        let contents = &mut *locked(&self.0.contents);
        if !contents.names.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        contents.change(NameChange::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.check(Op::Remove, name)?;
        let contents = &mut *locked(&self.0.contents);
        if !contents.names.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        contents.change(NameChange::Remove(name.to_owned()));
        Ok(())
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.check(Op::SyncDir, "")?;
        let contents = &mut *locked(&self.0.contents);
        contents.durable_names.clone_from(&contents.names);
        contents.unsynced_names.clear();
        Ok(())
    }

    fn try_lock(&self, _name: &str) -> io::Result<Option<DirLock>> {
        let taken = self.0.locked.swap(true, Ordering::AcqRel);
        Ok((!taken).then(|| Box::new(Held(self.0.locked.clone())) as DirLock))
    }
}

impl DiskFile for MemoryFile {
    fn size(&self) -> io::Result<u64> {
        Ok(locked(&self.disk.0.contents).files[self.number].now.len() as u64)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.check(Op::Read, &self.name)?;
        let offset = usize::try_from(offset).map_err(io::Error::other)?;
        let contents = locked(&self.disk.0.contents);
        let bytes = contents.files[self.number]
            .now
            .get(offset..offset + buf.len());
        buf.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let fate = self.disk.check(Op::Write, &self.name);
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let file = &mut locked(&self.disk.0.contents).files[self.number];
        let grows = start + bytes.len() > file.now.len();
        match fate {
            Ok(()) => file.write(bytes, start),
            // A full disk still takes what needs no new block.
            Err(trouble) if trouble.is_full() && !grows => file.write(bytes, start),
            Err(mut trouble) => {
                let share = trouble.below(bytes.len() as u64 + 1);
                let part = usize::try_from(share).unwrap_or(0) / SECTOR * SECTOR;
                if trouble.is_partial() && part > 0 {
                    file.write(&bytes[..part], start);
                }
                return Err(trouble.into());
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let fate = self.disk.check(Op::Sync, &self.name);
        let file = &mut locked(&self.disk.0.contents).files[self.number];
        match fate {
            Ok(()) => file.sync(),
            Err(mut trouble) => {
                if trouble.is_partial() {
                    file.half_sync(|| trouble.below(2) == 0);
                }
                return Err(trouble.into());
            }
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl fmt::Debug for MemoryDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemoryDisk")
    }
}

impl fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryFile({})", self.name)
    }
}
