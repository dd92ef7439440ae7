//! The files below the log, behind a trait so that tests can put a disk there that forgets and fails.

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::buffer::spare_capacity;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

/// More in one call are refused by the system.
const SLICES_MAX: usize = 1024;

/// Held for as long as nobody else may open the directory; released when dropped.
pub type DirLock = Box<dyn fmt::Debug + Send + Sync>;

/// One flat directory. What changes names (`create`, `rename`, `remove`) survives a crash only after `sync_dir`.
pub trait Disk: fmt::Debug + Send + Sync + 'static {
    /// Opens a file for reading and writing, empty: what had this name loses its contents.
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Opens an existing file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Names of all regular files, in no order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Replaces what had the new name, at once or not at all.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&self, name: &str) -> io::Result<()>;
    fn sync_dir(&self) -> io::Result<()>;
    /// Takes the named lock for this process, or `None` when somebody has it. Does not wait.
    fn try_lock(&self, name: &str) -> io::Result<Option<DirLock>>;
}

/// An open file. Stays readable after its name was removed.
pub trait DiskFile: fmt::Debug + Send + Sync {
    /// Bytes from its start to its end.
    fn size(&self) -> io::Result<u64>;
    /// Fills all of `buf`, or fails.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// So many bytes, or fails. Cheaper than [`DiskFile::read_at`] where nothing has to be zeroed before it is read.
    fn read_new(&self, length: usize, offset: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.read_at(&mut bytes, offset)?;
        Ok(bytes)
    }
    /// Writes all of `bytes`, growing the file where needed. Durable only after `sync`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Like [`DiskFile::write_at`], of slices that follow each other. They are left in any state.
    fn write_slices_at(&self, slices: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        let bytes: Vec<u8> = slices
            .iter()
            .flat_map(|slice| slice.iter().copied())
            .collect();
        self.write_at(&bytes, offset)
    }
    /// Makes contents and size durable. After a failure nothing may be assumed of any write since the last success.
    fn sync(&self) -> io::Result<()>;
    /// Makes the file this large and sees to it that there is room for all of it, without writing it where that can be
    /// helped. Later writes there still change what the file system knows of the file.
    fn reserve(&self, size: u64) -> io::Result<()> {
        self.preallocate(size)
    }
    /// Writes zeros from the present end up to `size`, so that later writes there allocate nothing.
    fn preallocate(&self, size: u64) -> io::Result<()> {
        let zeros = vec![0; 1 << 20];
        let mut at = self.size()?;
        while at < size {
            let step = usize::try_from(size - at)
                .unwrap_or(usize::MAX)
                .min(zeros.len());
            self.write_at(&zeros[..step], at)?;
            at += step as u64;
        }
        Ok(())
    }
}

/// A directory of the operating system.
#[derive(Debug)]
pub struct RealDisk {
    dir: PathBuf,
}

impl RealDisk {
    /// Creates the directory and those above it, durably, when they are not there.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let missing: Vec<&Path> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
        fs::create_dir_all(dir)?;
        for created in missing {
            let parent = created
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
        }
        Ok(Self {
            dir: dir.to_owned(),
        })
    }
}

impl Disk for RealDisk {
    fn create(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut how = OpenOptions::new();
        how.read(true).write(true).create(true).truncate(true);
        Ok(Arc::new(how.open(self.dir.join(name))?))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let mut how = OpenOptions::new();
        how.read(true).write(true);
        Ok(Arc::new(how.open(self.dir.join(name))?))
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        Ok(names)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.dir.join(from), self.dir.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.dir.join(name))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn try_lock(&self, name: &str) -> io::Result<Option<DirLock>> {
        let mut how = OpenOptions::new();
        how.write(true).create(true).truncate(false);
        let file = how.open(self.dir.join(name))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

impl DiskFile for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn read_new(&self, length: usize, offset: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let at = offset + bytes.len() as u64;
            match rustix::io::pread(self, spare_capacity(&mut bytes), at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(err) => return Err(err.into()),
            }
        }
        // There may be more room than was asked for.
        bytes.truncate(length);
        Ok(bytes)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn write_slices_at(&self, mut slices: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        // Nothing at all would look like a file that takes nothing more.
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let some = slices.len().min(SLICES_MAX);
            let written = match rustix::io::pwritev(self, &slices[..some], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(Errno::INTR) => continue,
                Err(err) => return Err(err.into()),
            };
            offset += written as u64;
            IoSlice::advance_slices(&mut slices, written);
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn reserve(&self, size: u64) -> io::Result<()> {
        match rustix::fs::fallocate(self, FallocateFlags::empty(), 0, size) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.preallocate(size),
            reserved => Ok(reserved?),
        }
    }
}
