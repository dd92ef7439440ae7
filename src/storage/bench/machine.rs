//! What the machine says of itself, of this process and of the disk below a directory. Zeros where it does not say.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Counters at one moment, or between two.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    /// Of all threads, user and system.
    pub(super) cpu: Duration,
    /// Bytes of pages this process made dirty.
    pub(super) process_written: u64,
    /// Bytes the device wrote, for whomever.
    pub(super) device_written: u64,
}

impl Usage {
    pub(super) fn now(dir: &Path) -> Self {
        Self {
            cpu: cpu(),
            process_written: io_counter("write_bytes"),
            device_written: device_written(dir).unwrap_or(0),
        }
    }

    pub(super) fn since(self, before: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(before.cpu),
            process_written: self.process_written - before.process_written,
            device_written: self.device_written - before.device_written,
        }
    }
}

/// A line of `/proc/self/io`.
pub(super) fn io_counter(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/io").unwrap_or_default();
    let mut lines = text.lines().filter_map(|line| line.split_once(": "));
    let found = lines.find(|(key, _)| *key == name);
    found
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

/// In ticks of 10 ms, which Linux has on all its platforms.
fn cpu() -> Duration {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields are counted behind the name, which may hold anything.
    let fields: Vec<&str> = text
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks = |at: usize| {
        fields
            .get(at)
            .and_then(|field| field.parse().ok())
            .unwrap_or(0_u64)
    };
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}

/// Bytes that the device below `dir` has written since it was there; `None` where the system does not tell.
pub(super) fn device_written(dir: &Path) -> Option<u64> {
    let device = fs::metadata(dir).ok()?.dev();
    let major = (device >> 8 & 0xfff) | (device >> 32 & !0xfff);
    let minor = (device & 0xff) | (device >> 12 & !0xff);
    let text = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    let sectors: u64 = text.split_whitespace().nth(6)?.parse().ok()?;
    Some(sectors * 512)
}

/// Processor, kernel and file system.
pub(super) fn describe(dir: &Path) -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu_info = read("/proc/cpuinfo");
    let model = cpu_info.lines().find(|line| line.starts_with("model name"));
    let model = model
        .and_then(|line| line.split(':').nth(1))
        .unwrap_or(" unknown processor")
        .trim();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    let mounts = read("/proc/mounts");
    let mount = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .filter(|fields| fields.len() > 3 && dir.starts_with(fields[1]))
        .max_by_key(|fields| fields[1].len());
    let disk = mount.map_or_else(String::new, |fields| {
        format!(", {} on {} ({})", fields[2], fields[0], fields[3])
    });
    format!("{cores} cores of {model}, Linux {}{disk}", kernel.trim())
}
