//! Segment files ready for use. A thread of its own zeroes new ones and takes back freed ones, so that the writer
//! neither waits for the zeros nor for a directory to be synced.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use crate::storage::disk::{Disk, DiskFile};
use crate::storage::segment::{self, Segment};
use crate::storage::{Error, Options, locked};

const PREFIX: &str = "spare-";
/// A segment created by the writer because no spare was ready.
const NEXT: &str = "next.tmp";

/// The writer's end. Dropping it ends the thread.
#[derive(Debug)]
pub(super) struct Spares {
    disk: Arc<dyn Disk>,
    pool: Pool,
    asks_tx: Sender<Ask>,
}

/// A file that is no segment yet, under a name of its own.
#[derive(Debug)]
pub(super) struct Spare {
    pub(super) name: String,
    pub(super) file: Arc<dyn DiskFile>,
}

type Pool = Arc<Mutex<Vec<Spare>>>;

/// What a spare is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Small writes, each of them synced: what was written before costs one flush of the device instead of two.
    Appends,
    /// Much at a time: writing everything twice would take half of the disk.
    Bulk,
}

enum Ask {
    Prepare(Need),
    Recycle(Arc<Segment>),
}

struct Keeper {
    disk: Arc<dyn Disk>,
    pool: Pool,
    size: u64,
    keep: usize,
    named: u64,
}

impl Spares {
    /// Takes over spares of an earlier run and starts the thread. A log without segments gets its first spare at once.
    pub(super) fn start(
        disk: &Arc<dyn Disk>,
        options: &Options,
        new: bool,
    ) -> Result<(Self, JoinHandle<()>), Error> {
        let dir: &Path = &options.dir;
        let mut keeper = Keeper {
            disk: disk.clone(),
            pool: Pool::default(),
            size: options.segment_bytes,
            keep: options.spare_segments,
            named: 0,
        };
        for name in disk.list().map_err(Error::io("list", dir))? {
            let Some(number) = name.strip_prefix(PREFIX) else {
                continue;
            };
            keeper.named = keeper.named.max(number.parse().unwrap_or(0));
            if locked(&keeper.pool).len() < keeper.keep {
                let file = disk
                    .open(&name)
                    .map_err(Error::io("open", &dir.join(&name)))?;
                locked(&keeper.pool).push(Spare { name, file });
            } else {
                disk.remove(&name)
                    .map_err(Error::io("remove", &dir.join(&name)))?;
            }
        }
        if new {
            keeper
                .prepare(Need::Appends)
                .map_err(Error::io("preallocate a segment in", dir))?;
        }
        let (asks_tx, asks_rx) = mpsc::channel();
        let spares = Self {
            disk: disk.clone(),
            pool: keeper.pool.clone(),
            asks_tx,
        };
        let thread = thread::Builder::new()
            .name("log-spares".to_owned())
            .spawn(move || keeper.run(&asks_rx))
            .map_err(Error::io("start a thread for", dir))?;
        Ok((spares, thread))
    }

    /// Has a spare made ready unless there is one.
    pub(super) fn prepare(&self, need: Need) {
        // The thread ends early only by a panic; then files are made when they are needed.
        let _ = self.asks_tx.send(Ask::Prepare(need));
    }

    /// Takes back a segment of which nothing lives, and nothing is found by readers who start from now on.
    pub(super) fn recycle(&self, segment: Arc<Segment>) {
        let _ = self.asks_tx.send(Ask::Recycle(segment));
    }

    /// A file to become a segment: a spare, or else a new, empty one.
    pub(super) fn take(&self) -> io::Result<Spare> {
        if let Some(spare) = locked(&self.pool).pop() {
            return Ok(spare);
        }
        Ok(Spare {
            name: NEXT.to_owned(),
            file: self.disk.create(NEXT)?,
        })
    }
}

impl Keeper {
    fn run(mut self, asks: &Receiver<Ask>) {
        while let Ok(ask) = asks.recv() {
            let done = match ask {
                Ask::Prepare(need) => self.prepare(need),
                Ask::Recycle(segment) => self.recycle(&segment),
            };
            if let Err(error) = done {
                tracing::warn!(%error, "a spare log segment could not be made; the log goes on without");
            }
        }
    }

    fn prepare(&mut self, need: Need) -> io::Result<()> {
        if !locked(&self.pool).is_empty() {
            return Ok(());
        }
        let name = self.new_name();
        let file = self.disk.create(&name)?;
        let sized = match need {
            Need::Appends => file.preallocate(self.size),
            Need::Bulk => file.reserve(self.size),
        };
        let filled = sized.and_then(|()| file.sync());
        if let Err(error) = filled {
            self.disk.remove(&name)?;
            return Err(error);
        }
        locked(&self.pool).push(Spare { name, file });
        Ok(())
    }

    /// A file that somebody still reads is left to them and unlinked; one that was damaged is not trusted again. A reused one gets its new name durably before
    /// it may be overwritten: a crash must not show new contents under the old name.
    fn recycle(&mut self, segment: &Arc<Segment>) -> io::Result<()> {
        let name = segment::name(segment.number);
        let read = Arc::strong_count(segment) > 1;
        let damaged = segment.damaged.load(Relaxed);
        if read || damaged || locked(&self.pool).len() >= self.keep {
            return self.disk.remove(&name);
        }
        let spare = Spare {
            name: self.new_name(),
            file: segment.file.clone(),
        };
        self.disk.rename(&name, &spare.name)?;
        self.disk.sync_dir()?;
        locked(&self.pool).push(spare);
        Ok(())
    }

    fn new_name(&mut self) -> String {
        self.named += 1;
        format!("{PREFIX}{}", self.named)
    }
}
