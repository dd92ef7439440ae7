//! The one sled database of a node, behind a wall: no error of sled's is forgotten and no panic of it gets out.

use std::any::Any;
use std::fs::{self, File};
use std::future::Future;
use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use sled::{Db, Mode, Tree};
use tracing::{error, warn};

use super::rows::{TALLY, Tally};
use super::{Options, folder, locked};

const FORMAT_KEY: &[u8] = b"format";
const FORMAT: &[u8] = b"firth archive 1";
const SHARD_PREFIX: &[u8] = b"shard ";
/// A flush that takes longer has lost the thread that should end it.
const FLUSH_STALL: Duration = Duration::from_secs(120);

/// A database that is either whole or broken for good.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    /// Gone only while it is being dropped.
    db: RwLock<Option<Db>>,
    /// See [`folder::data_file`]. One seal at a time.
    data: Mutex<File>,
    broken: AtomicBool,
}

/// Why a folder could not be opened.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("sled: {0}")]
    Sled(sled::Error),
    #[error("sled panicked: {0}")]
    Panic(String),
    #[error("it was given up while open: {0}")]
    Marked(String),
    #[error("its format is not `{}`", String::from_utf8_lossy(FORMAT))]
    Format,
    #[error("the rows of `{0}` do not tally")]
    Tally(String),
}

impl From<sled::Error> for Refused {
    fn from(error: sled::Error) -> Self {
        match error {
            sled::Error::Io(error) => Self::Io(error),
            other => Self::Sled(other),
        }
    }
}

impl Refused {
    /// The error of a file system that would refuse an empty folder as well.
    fn by_file_system(self) -> Result<io::Error, Self> {
        const TOO_MANY_FILES: [i32; 2] = [23, 24];
        match self {
            Self::Io(error)
                if matches!(
                    error.kind(),
                    ErrorKind::PermissionDenied
                        | ErrorKind::StorageFull
                        | ErrorKind::QuotaExceeded
                        | ErrorKind::ReadOnlyFilesystem
                        | ErrorKind::WouldBlock
                        | ErrorKind::OutOfMemory
                ) || error
                    .raw_os_error()
                    .is_some_and(|e| TOO_MANY_FILES.contains(&e)) =>
            {
                Ok(error)
            }
            other => Err(other),
        }
    }
}

impl Store {
    /// See [`super::Archives::open`].
    pub(super) fn open(dir: PathBuf, options: &Options) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let why = match Self::attempt(&dir, options) {
            Ok(store) => return Ok(store),
            Err(refused) => match refused.by_file_system() {
                Ok(error) => return Err(error),
                Err(why) => why,
            },
        };
        let aside = folder::set_aside(&dir)?;
        warn!(dir = %dir.display(), aside = %aside.display(), %why, "set an index aside; it will be built anew");
        Self::attempt(&dir, options).map_err(|refused| match refused {
            Refused::Io(error) => error,
            other => io::Error::other(other),
        })
    }

    fn attempt(dir: &Path, options: &Options) -> Result<Self, Refused> {
        if let Some(why) = folder::broken(dir) {
            return Err(Refused::Marked(why));
        }
        folder::remove_unfinished(dir)?;
        let data = folder::data_file(dir)?;
        let clean = folder::take_clean(dir)?;
        let config = sled::Config::new()
            .path(dir)
            .cache_capacity(options.cache_bytes)
            .mode(Mode::HighThroughput)
            // The periodic thread would only flush and clean, which writes do as well; dropping it can hang.
            .flush_every_ms(None);
        let db = walled(|| config.open())?;
        let checked = walled(|| Ok(check(&db, clean))).and_then(|checked| checked);
        if let Err(refused) = checked {
            drop_walled(db);
            return Err(refused);
        }
        folder::sync_all(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            db: RwLock::new(Some(db)),
            data: Mutex::new(data),
            broken: AtomicBool::new(false),
        })
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Runs something on the database. A failure or a panic breaks the store.
    pub(super) fn run<T>(&self, f: impl FnOnce(&Db) -> sled::Result<T>) -> io::Result<T> {
        if self.is_broken() {
            return Err(io::Error::other("the index is broken"));
        }
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let Some(db) = db.as_ref() else {
            return Err(io::Error::other("the index is closed"));
        };
        walled(|| f(db)).map_err(|refused| {
            let error = match refused {
                Refused::Io(error) => error,
                other => io::Error::other(other),
            };
            self.give_up(error)
        })
    }

    /// Ends the store for good, and makes the next open set it aside.
    pub(super) fn give_up(&self, why: io::Error) -> io::Error {
        if !self.broken.swap(true, Ordering::AcqRel) {
            error!(dir = %self.dir.display(), %why, "the index broke; it will be built anew at the next start");
            if let Err(error) = folder::mark_broken(&self.dir, &why.to_string()) {
                warn!(dir = %self.dir.display(), %error, "could not leave word that the index broke");
            }
        }
        why
    }

    /// Makes everything durable that was written before the call.
    pub(super) fn seal(&self) -> io::Result<()> {
        let data = locked(&self.data);
        self.run(|db| {
            finish_within(db.flush_async(), FLUSH_STALL).unwrap_or_else(|| {
                let what = "a flush did not end";
                Err(sled::Error::Io(io::Error::new(ErrorKind::TimedOut, what)))
            })
        })?;
        let synced = data.sync_all().and_then(|()| folder::sync_all(&self.dir));
        synced.map_err(|error| self.give_up(error))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let sealed = self.seal();
        let db = self.db.get_mut().unwrap_or_else(PoisonError::into_inner);
        let Some(db) = db.take() else { return };
        if sealed.is_err() {
            // What is broken may panic or wait for ever while it is dropped. It is little, and the process ends.
            std::mem::forget(db);
            return;
        }
        if !drop_walled(db) {
            self.give_up(io::Error::other("sled panicked while closing"));
            return;
        }
        let closed = folder::sync_all(&self.dir).and_then(|()| folder::mark_clean(&self.dir));
        if let Err(error) = closed {
            warn!(dir = %self.dir.display(), %error, "an index did not close cleanly; it will be checked when opened");
        }
    }
}

pub(super) fn shard_tree(group: u32) -> Vec<u8> {
    [SHARD_PREFIX, group.to_string().as_bytes()].concat()
}

/// The tally in the tree, or that of an empty one. `None` when it is none of ours.
pub(super) fn tally(tree: &Tree) -> sled::Result<Option<Tally>> {
    Ok(tree
        .get(TALLY)?
        .map_or(Some(Tally::default()), |bytes| Tally::parse(&bytes)))
}

/// Checks the format, and unless the last close was clean also every row.
fn check(db: &Db, clean: bool) -> Result<(), Refused> {
    let shards: Vec<_> = db.tree_names();
    let shards = shards.iter().filter(|name| name.starts_with(SHARD_PREFIX));
    match db.get(FORMAT_KEY)? {
        Some(format) if format == FORMAT => {}
        // New, or killed before anything was written.
        None if db.is_empty() && shards.clone().count() == 0 => {
            db.insert(FORMAT_KEY, FORMAT)?;
        }
        _ => return Err(Refused::Format),
    }
    for name in shards {
        let tree = db.open_tree(name)?;
        let wrong = || Refused::Tally(String::from_utf8_lossy(name).into_owned());
        let said = tally(&tree)?.ok_or_else(wrong)?;
        if clean {
            continue;
        }
        let mut counted = Tally::of_none(said.mark);
        for row in &tree {
            let (key, value) = row?;
            if key != TALLY {
                counted.add(&key, &value);
            }
        }
        if counted != said {
            return Err(wrong());
        }
    }
    Ok(())
}

/// Turns a panic into an error.
fn walled<T>(f: impl FnOnce() -> sled::Result<T>) -> Result<T, Refused> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(done) => done.map_err(Refused::from),
        Err(panic) => Err(Refused::Panic(said(panic.as_ref()))),
    }
}

/// Whether it was dropped without a panic.
fn drop_walled(db: Db) -> bool {
    catch_unwind(AssertUnwindSafe(|| drop(db))).is_ok()
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

/// Waits for a future on this thread, at most for `limit`.
fn finish_within<T>(future: impl Future<Output = T>, limit: Duration) -> Option<T> {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let since = Instant::now();
    loop {
        if let Poll::Ready(done) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(done);
        }
        thread::park_timeout(limit.checked_sub(since.elapsed())?);
    }
}
