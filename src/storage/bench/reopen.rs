//! How long a log takes to open: filled by a process of its own that is killed, opened, closed, and opened again.

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::{Case, Failure, Load, machine, owner};
use crate::storage::{Log, Options};
use crate::types::GroupId;

/// Tells a process that it is the one to fill this directory.
const FILL: &str = "FIRTH_BENCH_FILL";
const SHARDS: usize = 16;
const SIZE: usize = 20_000;

#[derive(Debug)]
pub(super) struct Measured {
    gigabytes: f64,
    cold: bool,
    fill: Duration,
    after_kill: Opening,
    after_close: Opening,
}

#[derive(Debug)]
struct Opening {
    time: Duration,
    /// Bytes that the process asked for, from memory or from the device.
    asked_bytes: u64,
    device_bytes: u64,
}

pub(super) fn measure(dir: &Path, gigabytes: f64, cold: bool) -> Result<Measured, Failure> {
    if let Some(folder) = std::env::var_os(FILL) {
        fill(Path::new(&folder), gigabytes)?;
    }
    let folder = tempfile::Builder::new()
        .prefix("firth-bench-")
        .tempdir_in(dir)?;
    let began = Instant::now();
    let acknowledged = fill_and_kill(folder.path())?;
    let fill = began.elapsed();
    let after_kill = open(folder.path(), cold, &acknowledged)?;
    let after_close = open(folder.path(), cold, &acknowledged)?;
    Ok(Measured {
        gigabytes,
        cold,
        fill,
        after_kill,
        after_close,
    })
}

/// Has this very command fill the directory in another process, and kills that while it is writing. Returns the last index
/// that was acknowledged in each group.
fn fill_and_kill(folder: &Path) -> io::Result<Vec<u64>> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(FILL, folder)
        .stdout(Stdio::piped())
        .spawn()?;
    let stdout = child
        .stdout
        .take()
        .ok_or_else(|| io::Error::other("no standard output"))?;
    let mut line = String::new();
    let read = BufReader::new(stdout).read_line(&mut line);
    // `kill` is SIGKILL.
    child.kill()?;
    child.wait()?;
    read?;
    let acknowledged: Result<Vec<u64>, _> = line.split_whitespace().map(str::parse).collect();
    acknowledged.map_err(|_| io::Error::other(format!("the filling process said `{line}`")))
}

/// Fills the directory, says what is durable, and goes on writing a little until it is killed. Never returns well.
fn fill(folder: &Path, gigabytes: f64) -> Result<(), Failure> {
    let log = Log::open(Options::new(folder.join("log")), &owner())?;
    let load = Load::new(&log);
    let case = Case {
        shards: SHARDS,
        size: SIZE,
        in_flight: 8,
    };
    load.fill(case, |bytes| (bytes as f64) < gigabytes * 1e9)?;
    let last = (0..SHARDS).map(|shard| {
        load.groups[shard]
            .last()
            .map_or(0, |last| last.index)
            .to_string()
    });
    let line = last.collect::<Vec<_>>().join(" ");
    writeln!(io::stdout(), "{line}")?;
    io::stdout().flush()?;
    load.fill(case, |bytes| bytes < 1 << 30)?;
    Err(io::Error::other("nobody killed the process that filled the log").into())
}

fn open(folder: &Path, cold: bool, acknowledged: &[u64]) -> Result<Opening, Failure> {
    if cold {
        std::fs::write("/proc/sys/vm/drop_caches", "1")?;
    }
    let before = (
        machine::io_counter("rchar"),
        machine::io_counter("read_bytes"),
    );
    let began = Instant::now();
    let log = Log::open(Options::new(folder.join("log")), &owner())?;
    let time = began.elapsed();
    let opening = Opening {
        time,
        asked_bytes: machine::io_counter("rchar") - before.0,
        device_bytes: machine::io_counter("read_bytes") - before.1,
    };
    for (group, acknowledged) in (0..).zip(acknowledged.iter().copied()) {
        let found = log
            .group(GroupId(group))
            .last()
            .map_or(0, |last| last.index);
        if found < acknowledged {
            return Err(Failure::Lost {
                group,
                found,
                acknowledged,
            });
        }
    }
    let (told_tx, told) = channel();
    log.group(GroupId(0)).append(
        Vec::new(),
        Box::new(move |result| drop(told_tx.send(result))),
    )?;
    told.recv().map_err(io::Error::other)??;
    log.close()?;
    Ok(opening)
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cache = if self.cold {
            "emptied before each opening"
        } else {
            "as the writing left it"
        };
        let seconds = self.fill.as_secs_f64();
        writeln!(
            f,
            "{} GB of {SIZE}-byte entries in {SHARDS} groups, filled in {seconds:.1} s; page cache {cache}",
            self.gigabytes
        )?;
        for (what, opening) in [
            ("after a kill", &self.after_kill),
            ("after a clean stop", &self.after_close),
        ] {
            let Opening {
                time,
                asked_bytes,
                device_bytes,
            } = opening;
            let [asked, device] = [asked_bytes, device_bytes].map(|bytes| *bytes as f64 / 1e6);
            writeln!(
                f,
                "opened {what:<18} {:>8.3} s, {asked:>9.1} MB read, {device:>9.1} MB of it from the device",
                time.as_secs_f64()
            )?;
        }
        write!(f, "every acknowledged entry was there each time")
    }
}
