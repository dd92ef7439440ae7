//! A disk in memory for tests: it forgets what was not synced when power is cut, and fails where it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::storage::disk::{DirLock, Disk, DiskFile};
use crate::storage::locked;

/// What is about to be done to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    locked: Arc<AtomicBool>,
}

#[derive(Clone, Default)]
struct Contents {
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    files: Vec<Bits>,
}

#[derive(Clone, Default)]
struct Bits {
    now: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<usize>,
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

    /// The disk as a power cut at this moment leaves it: `keep` decides for each unsynced sector, and for the
    /// unsynced names together, whether it made it. This disk itself goes on.
    #[must_use]
    pub fn power_cut(&self, mut keep: impl FnMut() -> bool) -> Self {
        let mut contents = locked(&self.0.contents).clone();
        for file in &mut contents.files {
            for sector in std::mem::take(&mut file.dirty) {
                let start = sector * SECTOR;
                let end = (start + SECTOR).min(file.now.len());
                if start < end && keep() {
                    let size = file.durable.len().max(end);
                    file.durable.resize(size, 0);
                    file.durable[start..end].copy_from_slice(&file.now[start..end]);
                }
            }
            file.now = file.durable.clone();
        }
        match keep() {
            true => contents.durable_names = contents.names.clone(),
            false => contents.names = contents.durable_names.clone(),
        }
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
        };
    }

    fn check(&self, op: Op, name: &str) -> io::Result<()> {
        let hook = locked(&self.0.hook).clone();
        hook.map_or(Ok(()), |hook| hook(op, name))
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
        self.names.insert(name.to_owned(), self.files.len() - 1);
        self.files.len() - 1
    }
}

impl Disk for MemoryDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.check(Op::Create, name)?;
        let number = locked(&self.0.contents).fresh(name);
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
        let names = &mut locked(&self.0.contents).names;
        let number = names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        names.insert(to.to_owned(), number);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.check(Op::Remove, name)?;
        let removed = locked(&self.0.contents).names.remove(name);
        removed.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.check(Op::SyncDir, "")?;
        let contents = &mut *locked(&self.0.contents);
        contents.durable_names.clone_from(&contents.names);
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
        self.disk.check(Op::Write, &self.name)?;
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start + bytes.len();
        let file = &mut locked(&self.disk.0.contents).files[self.number];
        let size = file.now.len().max(end);
        file.now.resize(size, 0);
        file.now[start..end].copy_from_slice(bytes);
        file.dirty.extend(start / SECTOR..end.div_ceil(SECTOR));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.check(Op::Sync, &self.name)?;
        let file = &mut locked(&self.disk.0.contents).files[self.number];
        file.durable.resize(file.now.len(), 0);
        for sector in std::mem::take(&mut file.dirty) {
            let start = sector * SECTOR;
            let end = (start + SECTOR).min(file.now.len());
            file.durable[start..end].copy_from_slice(&file.now[start..end]);
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
