//! The newest snapshot of each group and the one before it, a file each.
//!
//! `"FIRTHSNP" | CRC32C of the rest u32 | version u32 | length u64 | bytes`

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::storage::disk::Disk;
use crate::storage::frame::u32_at;
use crate::types::GroupId;
use crate::wire::checkpoint;

const MAGIC: &[u8; 8] = b"FIRTHSNP";
const HEADER: usize = 24;

/// Where a group's snapshots lie. One that was stored is replaced at once or not at all, and kept as a fallback until
/// the next one is.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    disk: Arc<dyn Disk>,
    name: String,
}

/// Why a file that is there gives no snapshot.
enum Bad {
    /// Of a newer format: nothing is wrong with it.
    Newer(io::Error),
    Damaged(io::Error),
}

impl SnapshotFile {
    pub(super) fn new(disk: Arc<dyn Disk>, group: GroupId) -> Self {
        let name = format!("snapshot-{:04}", group.0);
        Self { disk, name }
    }

    /// Makes `snapshot` the group's snapshot, durably. The one before becomes the fallback if it can be read.
    ///
    /// # Errors
    /// When the disk fails; the former snapshot stands then.
    pub fn store(&self, snapshot: &[u8]) -> io::Result<()> {
        let temporary = self.temporary();
        let length = (snapshot.len() as u64).to_le_bytes();
        let version = checkpoint::VERSION.to_le_bytes();
        let sum =
            crc32c::crc32c_append(crc32c::crc32c(&[&version[..], &length].concat()), snapshot);
        let header = [&MAGIC[..], &sum.to_le_bytes(), &version, &length].concat();
        let file = self.disk.create(&temporary)?;
        file.write_at(&header, 0)?;
        file.write_at(snapshot, HEADER as u64)?;
        file.sync()?;
        // A damaged one must not take the place of a good fallback. A crash between the two renames leaves the
        // fallback alone, which is the former snapshot then.
        if let Ok(Some(_)) = self.read(&self.name) {
            self.disk.rename(&self.name, &self.old())?;
        }
        self.disk.rename(&temporary, &self.name)?;
        self.disk.sync_dir()
    }

    /// The group's snapshot, if there is one: the fallback when the newest is damaged or missing.
    ///
    /// # Errors
    /// When there are files but none of them can be read, or the newest was written by a newer build; the error names
    /// the file.
    pub fn load(&self) -> io::Result<Option<Bytes>> {
        let newest = match self.read(&self.name) {
            Ok(Some(newest)) => return Ok(Some(newest)),
            Ok(None) => None,
            Err(Bad::Newer(error)) => return Err(error),
            Err(Bad::Damaged(error)) => Some(error),
        };
        match (self.read(&self.old()), newest) {
            (Ok(Some(old)), newest) => {
                let why =
                    newest.map_or_else(|| "it is missing".to_owned(), |error| error.to_string());
                tracing::warn!(
                    file = self.name,
                    why,
                    "the newest snapshot cannot be read; taking the one before"
                );
                Ok(Some(old))
            }
            (Ok(None), None) => Ok(None),
            (_, Some(error)) | (Err(Bad::Newer(error) | Bad::Damaged(error)), None) => Err(error),
        }
    }

    /// The group's snapshots that can be read, newest first: at most two.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn load_all(&self) -> io::Result<Vec<Bytes>> {
        let mut found = Vec::new();
        let names = self.disk.list()?;
        for name in [self.name.clone(), self.old()] {
            if !names.contains(&name) {
                continue;
            }
            match self.read(&name) {
                Ok(snapshot) => found.extend(snapshot),
                Err(Bad::Newer(error) | Bad::Damaged(error)) => {
                    tracing::warn!(%error, "a snapshot cannot be read");
                }
            }
        }
        Ok(found)
    }

    /// Removes the group's snapshots, durably. Nothing happens when there are none.
    ///
    /// # Errors
    /// When the disk fails; some may be gone then. The newest is never gone before the fallback.
    pub fn remove(&self) -> io::Result<()> {
        let names = self.disk.list()?;
        for name in [self.temporary(), self.old(), self.name.clone()] {
            if names.contains(&name) {
                self.disk.remove(&name)?;
                // One at a time, so that an old one does not come back alone.
                self.disk.sync_dir()?;
            }
        }
        Ok(())
    }

    fn old(&self) -> String {
        format!("{}.old", self.name)
    }

    fn temporary(&self) -> String {
        format!("{}.tmp", self.name)
    }

    fn read(&self, name: &str) -> Result<Option<Bytes>, Bad> {
        let unreadable = |error: io::Error| {
            Bad::Damaged(io::Error::new(error.kind(), format!("{name}: {error}")))
        };
        let damaged = |what: &str| unreadable(io::Error::new(io::ErrorKind::InvalidData, what));
        if !self
            .disk
            .list()
            .map_err(unreadable)?
            .iter()
            .any(|found| found == name)
        {
            return Ok(None);
        }
        let file = self.disk.open(name).map_err(unreadable)?;
        let size = file.size().map_err(unreadable)?;
        let size = usize::try_from(size).map_err(|_| damaged("too large"))?;
        if size < HEADER {
            return Err(damaged("shorter than its header"));
        }
        let mut bytes = vec![0; size];
        file.read_at(&mut bytes, 0).map_err(unreadable)?;
        if !bytes.starts_with(MAGIC) || u32_at(&bytes, 8) != crc32c::crc32c(&bytes[12..]) {
            return Err(damaged("checksum does not match"));
        }
        let (found, supported) = (u32_at(&bytes, 12), checkpoint::VERSION);
        if found > supported {
            let what = format!("{name}: has version {found}; this build reads up to {supported}");
            return Err(Bad::Newer(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        Ok(Some(Bytes::from(bytes).slice(HEADER..)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryDisk;
    use std::sync::Mutex;

    const NAME: &str = "snapshot-0003";

    fn snapshots() -> (MemoryDisk, SnapshotFile) {
        let disk = MemoryDisk::default();
        let file = SnapshotFile::new(Arc::new(disk.clone()), GroupId(3));
        (disk, file)
    }

    fn damage(disk: &MemoryDisk, name: &str) {
        disk.open(name).unwrap().write_at(b"x", 25).unwrap();
    }

    fn loaded(file: &SnapshotFile) -> Vec<u8> {
        file.load().unwrap().unwrap().to_vec()
    }

    #[test]
    fn the_one_before_stands_in_for_a_damaged_one() {
        let (disk, file) = snapshots();
        assert_eq!(
            (file.load().unwrap(), file.load_all().unwrap()),
            (None, vec![])
        );
        file.store(b"one").unwrap();
        file.store(b"two").unwrap();
        file.store(b"three").unwrap();
        assert_eq!(file.load_all().unwrap(), [&b"three"[..], b"two"]);
        damage(&disk, NAME);
        assert_eq!(loaded(&file), b"two");
        assert_eq!(file.load_all().unwrap(), [&b"two"[..]]);
        // The damaged one does not become the fallback.
        file.store(b"four").unwrap();
        assert_eq!(file.load_all().unwrap(), [&b"four"[..], b"two"]);
        damage(&disk, NAME);
        damage(&disk, "snapshot-0003.old");
        assert!(file.load().unwrap_err().to_string().contains(NAME));
        assert_eq!(file.load_all().unwrap(), [] as [Bytes; 0]);
        file.remove().unwrap();
        file.remove().unwrap();
        assert_eq!((file.load().unwrap(), disk.list().unwrap()), (None, vec![]));
    }

    #[test]
    fn a_newer_one_is_refused_rather_than_passed_over() {
        let (disk, file) = snapshots();
        file.store(b"one").unwrap();
        file.store(b"two").unwrap();
        let mut bytes = disk.bytes(NAME);
        bytes[12] = 9;
        let sum = crc32c::crc32c(&bytes[12..]).to_le_bytes();
        bytes[8..12].copy_from_slice(&sum);
        disk.put_bytes(NAME, bytes);
        assert!(file.load().unwrap_err().to_string().contains("version 9"));
    }

    #[test]
    fn a_snapshot_is_there_whenever_power_fails() {
        let (disk, file) = snapshots();
        let images = Arc::new(Mutex::new(Vec::new()));
        file.store(b"0").unwrap();
        let (kept, watched) = (images.clone(), disk.clone());
        disk.on_op(move |_, _| {
            for keep in [false, true] {
                kept.lock().unwrap().push(watched.power_cut(|| keep));
            }
            Ok(())
        });
        for number in 1..5 {
            file.store(number.to_string().as_bytes()).unwrap();
        }
        disk.on_op(|_, _| Ok(()));
        let images = std::mem::take(&mut *images.lock().unwrap());
        let mut newest = b"0".to_vec();
        for image in images {
            let found = loaded(&SnapshotFile::new(Arc::new(image), GroupId(3)));
            // The image that lost more comes first: it may be one behind.
            assert!(found[0] + 1 >= newest[0], "{found:?} after {newest:?}");
            newest = found.max(newest);
        }
        assert!(newest[0] >= b'3', "{newest:?}");
    }
}
