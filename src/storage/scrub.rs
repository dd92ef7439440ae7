//! Finding damage before somebody needs what was damaged: sealed segments are read from end to end, over and over.
//!
//! A frame that fails its checksum is of interest for the entries that it held and that still exist: those are read
//! as a reader would read them, and become holes in the same way. Damage elsewhere (a head, an index, the record of
//! an old vote) costs nothing but time, and is only told.

use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::storage::frame::{self, Bad, Kind};
use crate::storage::log::Shared;
use crate::storage::segment::{self, Header, Segment};
use crate::storage::{locked, scan};

/// What is read at once, unless a frame is larger.
const PIECE: u64 = 256 << 10;
/// Before a round: a small log need not be read all the time, and a start has better things to do.
const PAUSE: Duration = Duration::from_mins(1);

/// What one round of scrubbing did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Sealed segments read.
    pub segments: usize,
    pub bytes: u64,
    /// Places where no frame could be read, whatever had stood there.
    pub unreadable: usize,
    /// Entries that became holes by it.
    pub holes: u64,
}

/// Set once, when the log is closed. Waits end then.
#[derive(Debug, Default)]
pub(super) struct Stop {
    set: Mutex<bool>,
    wake: Condvar,
}

impl Stop {
    pub(super) fn set(&self) {
        *locked(&self.set) = true;
        self.wake.notify_all();
    }

    pub(super) fn is_set(&self) -> bool {
        *locked(&self.set)
    }

    /// Waits so long; `false` when set.
    fn wait(&self, time: Duration) -> bool {
        let set = locked(&self.set);
        let waited = self.wake.wait_timeout_while(set, time, |set| !*set);
        !*waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Starts the thread that scrubs at this rate, unless it is 0.
pub(super) fn start(
    shared: &Arc<Shared>,
    bytes_per_second: u64,
) -> io::Result<Option<JoinHandle<()>>> {
    if bytes_per_second == 0 {
        return Ok(None);
    }
    let shared = shared.clone();
    let run = move || {
        while shared.scrub.wait(PAUSE) {
            let (start, mut read) = (Instant::now(), 0_u64);
            let pace = |bytes: u64| {
                read += bytes;
                let micros = u128::from(read) * 1_000_000 / u128::from(bytes_per_second);
                let due = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
                shared.scrub.wait(due.saturating_sub(start.elapsed()))
            };
            if round(&shared, pace).is_none() {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("log-scrub".to_owned());
    thread.spawn(run).map(Some)
}

/// Reads all sealed segments once. After each read, `go_on` is told how much it was, and may end the round.
pub(super) fn round(shared: &Arc<Shared>, mut go_on: impl FnMut(u64) -> bool) -> Option<Scrubbed> {
    let mut numbers: Vec<u32> = shared.segments().keys().copied().collect();
    // The newest is being written.
    numbers.pop();
    let mut done = Scrubbed::default();
    for number in numbers {
        Round {
            shared,
            number,
            done: &mut done,
            go_on: &mut go_on,
        }
        .segment()?;
    }
    shared.counters.scrub_rounds.fetch_add(1, Relaxed);
    Some(done)
}

struct Round<'a, F> {
    shared: &'a Shared,
    number: u32,
    done: &'a mut Scrubbed,
    go_on: &'a mut F,
}

impl<F: FnMut(u64) -> bool> Round<'_, F> {
    /// Held only while it is read, since a file that is held cannot be used again.
    fn held(&self) -> Option<Arc<Segment>> {
        self.shared.segments().get(&self.number).cloned()
    }

    /// `None` when the round ends.
    fn segment(&mut self) -> Option<()> {
        let mut at = segment::HEADER as u64;
        let mut checked_header = false;
        self.done.segments += 1;
        loop {
            // Freed in the meantime.
            let Some(segment) = self.held() else {
                return Some(());
            };
            if !std::mem::replace(&mut checked_header, true) {
                self.header(&segment);
            }
            let size = segment.size.load(Relaxed);
            if segment.incarnation == 0 || at >= size {
                return Some(());
            }
            let (next, read) = self.piece(&segment, at, size);
            drop(segment);
            self.done.bytes += read;
            self.shared.counters.scrubbed_bytes.fetch_add(read, Relaxed);
            if !(self.go_on)(read) {
                return None;
            }
            match next {
                Some(next) => at = next,
                None => return Some(()),
            }
        }
    }

    fn header(&mut self, segment: &Arc<Segment>) {
        let mut header = [0; segment::HEADER];
        let read = segment.file.read_at(&mut header, 0);
        if read.is_err() || Header::decode(&header).is_err() {
            self.unreadable(segment, 0, segment::HEADER as u64);
        }
    }

    /// Verifies frames from `at` on, as many as one read gives. Returns where to go on, if the segment does not end
    /// here, and how much was read.
    fn piece(&mut self, segment: &Arc<Segment>, at: u64, size: u64) -> (Option<u64>, u64) {
        let mut length = PIECE.min(size - at);
        let bytes = loop {
            let bytes = read(segment, at, length);
            match frame::decode(&bytes, segment.incarnation) {
                // Either larger than a piece, or not what it seems to be: the checksum will tell.
                Err(Bad::Short) if at + length < size => {
                    let claimed = u64::from(frame::u32_at(&bytes, 0)) + frame::HEADER as u64;
                    length = claimed.clamp(length + 1, size - at);
                }
                _ => break bytes,
            }
        };
        let mut done = 0;
        loop {
            match frame::decode(&bytes[done..], segment.incarnation) {
                Ok((frame, _)) if frame.kind == Kind::Seal => return (None, length),
                Ok((frame, _)) => done += frame.size(),
                Err(Bad::Short) if done > 0 && at + length < size => {
                    return (Some(at + done as u64), length);
                }
                Err(_) => break,
            }
        }
        let bad = at + done as u64;
        // Rare enough to read all the rest for it.
        let rest = read(segment, bad, size - bad);
        let next = scan::resume(&rest, segment.incarnation, 1).map(|next| bad + next as u64);
        self.unreadable(segment, bad, next.unwrap_or(size));
        (next, length)
    }

    fn unreadable(&mut self, segment: &Arc<Segment>, from: u64, to: u64) {
        let file = segment::name(segment.number);
        tracing::error!(file, from, to, "a sealed segment of the log is damaged");
        self.done.unreadable += 1;
        segment.damaged.store(true, Relaxed);
        self.done.holes += self.shared.check(segment, &(from..to));
    }
}

/// Bytes of a file, with zeros where the disk refuses to give them.
fn read(segment: &Segment, at: u64, length: u64) -> Vec<u8> {
    let length = usize::try_from(length).unwrap_or(0);
    segment.file.read_new(length, at).unwrap_or_else(|_| {
        let mut bytes = vec![0; length];
        for (piece, bytes) in bytes.chunks_mut(4096).enumerate() {
            if segment
                .file
                .read_at(bytes, at + (piece * 4096) as u64)
                .is_err()
            {
                bytes.fill(0);
            }
        }
        bytes
    })
}
