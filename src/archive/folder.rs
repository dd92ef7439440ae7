//! The folder around sled: what must be removed before it opens, syncing all of it, setting it aside.

use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

const BROKEN: &str = "BROKEN";
const CLEAN: &str = "CLEAN";
/// How long a close under way may keep the lock.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_POLL: Duration = Duration::from_millis(10);

/// Why the folder was given up while it was open, if it was.
pub(super) fn broken(dir: &Path) -> Option<String> {
    let path = dir.join(BROKEN);
    path.exists().then(|| {
        fs::read_to_string(&path).unwrap_or_else(|error| format!("unreadable {BROKEN}: {error}"))
    })
}

/// Leaves the word that makes the next open set the folder aside.
pub(super) fn mark_broken(dir: &Path, why: &str) -> io::Result<()> {
    write_durably(dir, BROKEN, why)
}

/// Leaves the word that sled closed as it should, with what its files hold.
pub(super) fn mark_clean(dir: &Path) -> io::Result<()> {
    let contents = contents(dir)?;
    write_durably(dir, CLEAN, &contents)
}

/// Whether the last close was clean and the files are as it left them. The word is good once.
pub(super) fn take_clean(dir: &Path) -> io::Result<bool> {
    let path = dir.join(CLEAN);
    let said = match fs::read(&path) {
        Ok(said) => said,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    fs::remove_file(&path)?;
    sync(dir)?;
    Ok(said == contents(dir)?.as_bytes())
}

fn write_durably(dir: &Path, name: &str, text: &str) -> io::Result<()> {
    let mut file = File::create(dir.join(name))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    sync(dir)
}

/// Length and CRC32C of each file. A length alone would not do: sled passes over damaged pages without a word.
fn contents(dir: &Path) -> io::Result<String> {
    let mut text = String::new();
    for path in sled_files(dir)? {
        let name = path.strip_prefix(dir).unwrap_or(&path);
        let (length, crc) = checksum(&path)?;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{length} {crc:08x} {}", name.display());
    }
    Ok(text)
}

fn checksum(path: &Path) -> io::Result<(u64, u32)> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 256 << 10];
    let (mut length, mut crc) = (0, 0);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok((length, crc));
        }
        length += read as u64;
        crc = crc32c::crc32c_append(crc, &buffer[..read]);
    }
}

/// Regular files of sled's, sorted.
pub(super) fn sled_files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for within in [dir.to_owned(), dir.join("blobs")] {
        let entries = match fs::read_dir(&within) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let ours = [BROKEN, CLEAN]
                .iter()
                .any(|name| entry.file_name() == *name);
            if entry.file_type()?.is_file() && !ours {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Removes snapshots that a killed process was still writing: sled takes them for whole ones and fails.
pub(super) fn remove_unfinished(dir: &Path) -> io::Result<()> {
    for path in sled_files(dir)? {
        if path.extension().is_some_and(|e| e == "generating") {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Opens sled's data file, for syncing. It is held for as long as sled runs: a handle reports every write error since
/// it was opened, one opened after the error may not.
///
/// # Errors
/// `WouldBlock` when somebody still holds sled's lock on it after some seconds.
pub(super) fn data_file(dir: &Path) -> io::Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(dir.join("db"))?;
    let since = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => {
                // Only to know: sled takes the lock itself.
                file.unlock()?;
                return Ok(file);
            }
            Err(TryLockError::WouldBlock) if since.elapsed() < LOCK_WAIT => {
                thread::sleep(LOCK_POLL);
            }
            Err(TryLockError::WouldBlock) => {
                let what = format!("another process has {} open", dir.display());
                return Err(io::Error::new(ErrorKind::WouldBlock, what));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Syncs all files and directories to the device.
pub(super) fn sync_all(dir: &Path) -> io::Result<()> {
    for path in sled_files(dir)? {
        match sync(&path) {
            // sled removes blobs and old snapshots while it runs.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            done => done?,
        }
    }
    let blobs = dir.join("blobs");
    if blobs.is_dir() {
        sync(&blobs)?;
    }
    sync(dir)
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Renames the folder to `<dir>.broken-<n>`, deletes earlier such folders, and makes an empty one.
pub(super) fn set_aside(dir: &Path) -> io::Result<PathBuf> {
    let parent = dir.parent().filter(|p| !p.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let prefix = format!("{name}.broken-");
    let mut last = 0;
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix(&prefix));
        if let Some(number) = number.and_then(|n| n.parse::<u64>().ok()) {
            last = last.max(number);
            fs::remove_dir_all(entry.path())?;
        }
    }
    let aside = parent.join(format!("{prefix}{}", last.wrapping_add(1)));
    fs::rename(dir, &aside)?;
    fs::create_dir_all(dir)?;
    sync(parent)?;
    Ok(aside)
}
