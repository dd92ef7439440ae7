//! Measures the log beside the limit of the disk it lies on: `cargo bench` and `firth bench log`.
//!
//! Rounds of all cases follow each other, so that a disk or a machine that changes meanwhile changes all of them; each
//! figure is a median over the rounds. The raw limit of a case is a loop of write + fdatasync to a file that was preallocated and written before,
//! with as many bytes each time as the log wrote per flush in that round.

mod machine;
mod reopen;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;

use self::machine::Usage;
use crate::storage::{
    Disk, DiskFile, Entry, Error, GroupLog, Log, LogId, Options, Owner, RealDisk,
};
use crate::types::GroupId;

/// `firth bench log`
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Directory on the disk to be measured; a folder is made in it and removed at the end
    #[arg(long, default_value = ".")]
    pub dir: PathBuf,
    /// Rounds, of which medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Milliseconds for each case in each round
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(10..))]
    pub case_ms: u64,
    /// Measure instead how long it takes to open a log of this many GB, after a clean stop and after a kill
    #[arg(long, value_name = "GB")]
    pub reopen: Option<f64>,
    /// With --reopen: empty the system's page cache before each opening, which needs root
    #[arg(long, requires = "reopen")]
    pub cold: bool,
}

/// Why a measurement could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Log(#[from] Error),
    #[error("the disk failed: {0}")]
    Io(#[from] io::Error),
    #[error(
        "after the kill, group {group} ends at entry {found}, {acknowledged} were acknowledged"
    )]
    Lost {
        group: u32,
        found: u64,
        acknowledged: u64,
    },
}

/// What was measured; shows itself as a table.
#[derive(Debug)]
pub struct Report {
    machine: String,
    what: What,
}

#[derive(Debug)]
enum What {
    Appends {
        rows: Vec<Row>,
        single: Vec<(usize, Spread)>,
        device: bool,
    },
    Reopen(reopen::Measured),
}

/// One case: so many groups, each with so many appends of one entry waiting at a time.
#[derive(Clone, Copy, Debug)]
struct Case {
    shards: usize,
    size: usize,
    in_flight: usize,
}

/// A case in one round.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    entries_per_s: f64,
    entries_per_sync: f64,
    bytes_per_sync: f64,
    raw_entries_per_s: f64,
    ratio: f64,
    process_writes: f64,
    device_writes: f64,
    cpu_us: f64,
}

#[derive(Debug)]
struct Row {
    case: Case,
    samples: Vec<Sample>,
}

/// Smallest, median and largest.
#[derive(Clone, Copy, Debug)]
struct Spread(f64, f64, f64);

const SIZES: [usize; 2] = [300, 20_000];
const SHARDS: [usize; 3] = [1, 16, 64];
const IN_FLIGHT: [usize; 2] = [1, 8];
const GROUPS: u32 = 64;
/// Appended before anything is measured, so that files are recycled from then on as they are in a node that has run a while.
const WARM_UP_BYTES: usize = 400 << 20;
/// Payload that stays in the log.
const KEPT_BYTES: usize = 96 << 20;
const RAW_BYTES: u64 = 256 << 20;

/// Measures as `args` ask. Takes as long as rounds, cases and their time multiply to, with half as much again for the raw
/// limit. Blocks.
///
/// # Errors
/// When the disk or the log fails.
pub fn run(args: &Args) -> Result<Report, Failure> {
    if let Some(gigabytes) = args.reopen {
        let what = What::Reopen(reopen::measure(&args.dir, gigabytes, args.cold)?);
        return Ok(Report {
            machine: machine::describe(&args.dir),
            what,
        });
    }
    let folder = tempfile::Builder::new()
        .prefix("firth-bench-")
        .tempdir_in(&args.dir)?;
    let mut raw = Raw::new(&RealDisk::new(&folder.path().join("raw"))?)?;
    let log = Log::open(Options::new(folder.path().join("log")), &owner())?;
    let load = Load::new(&log);
    let warm_up = Case {
        shards: 16,
        size: 20_000,
        in_flight: 8,
    };
    load.run(warm_up, |_, bytes| bytes < WARM_UP_BYTES)?;

    let mut rows: Vec<_> = cases()
        .map(|case| Row {
            case,
            samples: Vec::new(),
        })
        .collect();
    let mut single = SIZES.map(|size| (size, Vec::new()));
    let time = Duration::from_millis(args.case_ms);
    for _ in 0..args.rounds {
        for row in &mut rows {
            let mut sample = measure(&load, &log, row.case, time, &args.dir)?;
            let raw_syncs_per_s = raw.run(sample.bytes_per_sync, time / 2)?;
            sample.raw_entries_per_s = raw_syncs_per_s * sample.entries_per_sync;
            sample.ratio = sample.entries_per_s / sample.raw_entries_per_s;
            row.samples.push(sample);
        }
        for (size, rates) in &mut single {
            rates.push(raw.run(*size as f64, time / 2)?);
        }
    }
    log.close()?;
    let single = single
        .into_iter()
        .map(|(size, rates)| (size, Spread::of(rates)))
        .collect();
    let device = machine::device_written(&args.dir).is_some();
    let what = What::Appends {
        rows,
        single,
        device,
    };
    Ok(Report {
        machine: machine::describe(&args.dir),
        what,
    })
}

fn cases() -> impl Iterator<Item = Case> {
    SIZES.into_iter().flat_map(|size| {
        SHARDS.into_iter().flat_map(move |shards| {
            IN_FLIGHT.map(move |in_flight| Case {
                shards,
                size,
                in_flight,
            })
        })
    })
}

fn owner() -> Owner {
    Owner {
        cluster_id: "bench".to_owned(),
        node: 1,
    }
}

fn measure(
    load: &Load,
    log: &Log,
    case: Case,
    time: Duration,
    dir: &std::path::Path,
) -> Result<Sample, Failure> {
    let (stats, usage, began) = (log.stats(), Usage::now(dir), Instant::now());
    let (entries, payload) = load.run(case, |elapsed, _| elapsed < time)?;
    let (seconds, usage) = (began.elapsed().as_secs_f64(), Usage::now(dir).since(usage));
    let after = log.stats();
    let batches = (after.batches - stats.batches) as f64;
    let (entries, payload) = (entries as f64, payload as f64);
    let sample = Sample {
        entries_per_s: entries / seconds,
        entries_per_sync: entries / batches,
        bytes_per_sync: (after.bytes - stats.bytes) as f64 / batches,
        process_writes: usage.process_written as f64 / payload,
        device_writes: usage.device_written as f64 / payload,
        cpu_us: usage.cpu.as_secs_f64() * 1e6 / entries,
        ..Sample::default()
    };
    load.forget()?;
    Ok(sample)
}

/// Appends to the log's groups and keeps a number of appends waiting in each.
struct Load {
    groups: Vec<GroupLog>,
    told_tx: Sender<(usize, io::Result<()>)>,
    told: Receiver<(usize, io::Result<()>)>,
    payloads: Vec<Bytes>,
}

impl Load {
    fn new(log: &Log) -> Self {
        let (told_tx, told) = channel();
        Self {
            groups: (0..GROUPS).map(|group| log.group(GroupId(group))).collect(),
            told_tx,
            told,
            payloads: SIZES.map(noise).into(),
        }
    }

    /// Goes on while `more(time, payload bytes acknowledged)`, and lets old entries go. Returns entries and payload bytes
    /// acknowledged.
    fn run(
        &self,
        case: Case,
        more: impl Fn(Duration, usize) -> bool,
    ) -> io::Result<(usize, usize)> {
        self.append_while(case, KEPT_BYTES, more)
    }

    /// Goes on while `more(payload bytes acknowledged)`, and lets nothing go.
    fn fill(&self, case: Case, more: impl Fn(usize) -> bool) -> io::Result<()> {
        self.append_while(case, usize::MAX, |_, bytes| more(bytes))
            .map(drop)
    }

    fn append_while(
        &self,
        case: Case,
        kept_bytes: usize,
        more: impl Fn(Duration, usize) -> bool,
    ) -> io::Result<(usize, usize)> {
        let at = SIZES
            .iter()
            .position(|size| *size == case.size)
            .unwrap_or(0);
        let payload = &self.payloads[at];
        let kept = (kept_bytes / case.size / case.shards).max(case.in_flight) as u64;
        let purge_every = (kept / 4).max(1);
        let began = Instant::now();
        let (mut waiting, mut entries) = (0, 0);
        for shard in 0..case.shards {
            for _ in 0..case.in_flight {
                self.append(shard, payload)?;
                waiting += 1;
            }
        }
        while waiting > 0 {
            let (shard, told) = self.told.recv().map_err(io::Error::other)?;
            told?;
            waiting -= 1;
            entries += 1;
            if !more(began.elapsed(), entries * case.size) {
                continue;
            }
            let last = self.append(shard, payload)?;
            waiting += 1;
            if last.index.is_multiple_of(purge_every) && last.index > kept {
                let upto = LogId {
                    index: last.index - kept,
                    ..last
                };
                self.groups[shard].purge(upto, Box::new(drop));
            }
        }
        Ok((entries, entries * case.size))
    }

    fn append(&self, shard: usize, payload: &Bytes) -> io::Result<LogId> {
        let group = &self.groups[shard];
        let index = group.last().map_or(1, |last| last.index + 1);
        let id = LogId {
            term: 1,
            node: 1,
            index,
        };
        let told = self.told_tx.clone();
        let done = Box::new(move |result| drop(told.send((shard, result))));
        group.append(
            vec![Entry {
                id,
                kind: 0,
                payload: payload.clone(),
            }],
            done,
        )?;
        Ok(id)
    }

    /// Lets go of all entries, so that the next case starts with as many free segments as this one.
    fn forget(&self) -> io::Result<()> {
        let mut waiting = 0;
        for (shard, group) in self.groups.iter().enumerate() {
            let Some(last) = group.last() else { continue };
            let told = self.told_tx.clone();
            group.purge(
                last,
                Box::new(move |result| drop(told.send((shard, result)))),
            );
            waiting += 1;
        }
        for _ in 0..waiting {
            self.told.recv().map_err(io::Error::other)?.1?;
        }
        Ok(())
    }
}

/// A file that is as large as it will be, and written.
struct Raw {
    file: Arc<dyn DiskFile>,
    at: u64,
}

impl Raw {
    fn new(disk: &RealDisk) -> io::Result<Self> {
        let file = disk.create("raw")?;
        file.preallocate(RAW_BYTES)?;
        file.sync()?;
        disk.sync_dir()?;
        Ok(Self { file, at: 0 })
    }

    /// Writes and syncs this many bytes over and over, one behind the other. Returns syncs per second.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a mean of sizes that fit"
    )]
    fn run(&mut self, bytes: f64, time: Duration) -> io::Result<f64> {
        let data = noise((bytes.round() as usize).max(1));
        let (began, mut syncs) = (Instant::now(), 0_u32);
        while began.elapsed() < time || syncs < 3 {
            if self.at + data.len() as u64 > RAW_BYTES {
                self.at = 0;
            }
            self.file.write_at(&data, self.at)?;
            self.file.sync()?;
            self.at += data.len() as u64;
            syncs += 1;
        }
        Ok(f64::from(syncs) / began.elapsed().as_secs_f64())
    }
}

/// Bytes that no disk makes smaller.
fn noise(size: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    bytes.flatten().take(size).collect::<Vec<u8>>().into()
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        match values[..] {
            [] => Self(0.0, 0.0, 0.0),
            _ => Self(
                values[0],
                values[values.len() / 2],
                values[values.len() - 1],
            ),
        }
    }
}

impl Row {
    fn spread(&self, of: fn(&Sample) -> f64) -> Spread {
        Spread::of(self.samples.iter().map(of).collect())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.machine)?;
        match &self.what {
            What::Reopen(measured) => measured.fmt(f),
            What::Appends {
                rows,
                single,
                device,
            } => appends(f, rows, single, *device),
        }
    }
}

fn appends(
    f: &mut fmt::Formatter<'_>,
    rows: &[Row],
    single: &[(usize, Spread)],
    device: bool,
) -> fmt::Result {
    writeln!(
        f,
        "medians of {} interleaved rounds, smallest and largest in brackets",
        rows[0].samples.len()
    )?;
    writeln!(f)?;
    let groups = [
        format!(
            "{:>21} | {:^51} | {:^30}",
            "", "the log", "as many bytes raw"
        ),
        format!("{:^16} |", "bytes written"),
    ];
    writeln!(f, "{}", groups.join(" | "))?;
    writeln!(
        f,
        "  size shards waiting | entries/s {:>17} {:>7} {:>14} | entries/s ratio {:>14} | {:>8} {:>7} | {:>12}",
        "(spread)", "MB/s", "entries/flush", "(spread)", "process", "device", "CPU us/entry"
    )?;
    for row in rows {
        let Case {
            shards,
            size,
            in_flight,
        } = row.case;
        let rate = row.spread(|sample| sample.entries_per_s);
        let ratio = row.spread(|sample| sample.ratio);
        let median = |of: fn(&Sample) -> f64| row.spread(of).1;
        let on_device = match device {
            true => format!("{:.2}", median(|sample| sample.device_writes)),
            false => "-".to_owned(),
        };
        writeln!(
            f,
            "{size:>6} {shards:>6} {in_flight:>7} | {:>9.0} {:>17} {:>7.1} {:>14.1} | {:>9.0} {:>5.2} {:>14} | {:>8.2} {on_device:>7} | {:>12.1}",
            rate.1,
            format!("({:.0}..{:.0})", rate.0, rate.2),
            rate.1 * size as f64 / 1e6,
            median(|sample| sample.entries_per_sync),
            median(|sample| sample.raw_entries_per_s),
            ratio.1,
            format!("({:.2}..{:.2})", ratio.0, ratio.2),
            median(|sample| sample.process_writes),
            median(|sample| sample.cpu_us),
        )?;
    }
    writeln!(f)?;
    for (size, Spread(least, median, most)) in single {
        writeln!(
            f,
            "raw, one entry of {size} bytes per write + fdatasync: {median:.0}/s ({least:.0}..{most:.0})"
        )?;
    }
    let notes = [
        "waiting: appends of one entry under way per shard. raw: write + fdatasync of as many bytes as the log wrote per flush,",
        "to a file that was written before. bytes written are per byte of payload. device: sectors of /sys/dev/block/../stat, with",
        "the journal and whatever other processes write meanwhile. process: write_bytes of /proc/self/io; a kernel with large folios",
        "counts all of a folio of which a part is written, so that small batches look much larger than what the device gets.",
    ];
    write!(f, "\n{}", notes.join("\n"))
}
