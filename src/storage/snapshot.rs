//! The newest snapshot of each group, a file each.
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

/// Where a group's snapshot lies. It is replaced at once or not at all.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    disk: Arc<dyn Disk>,
    name: String,
}

impl SnapshotFile {
    pub(super) fn new(disk: Arc<dyn Disk>, group: GroupId) -> Self {
        let name = format!("snapshot-{:04}", group.0);
        Self { disk, name }
    }

    /// Makes `snapshot` the group's snapshot, durably.
    ///
    /// # Errors
    /// When the disk fails; the former snapshot stands then.
    pub fn store(&self, snapshot: &[u8]) -> io::Result<()> {
        let temporary = format!("{}.tmp", self.name);
        let length = (snapshot.len() as u64).to_le_bytes();
        let version = checkpoint::VERSION.to_le_bytes();
        let sum =
            crc32c::crc32c_append(crc32c::crc32c(&[&version[..], &length].concat()), snapshot);
        let header = [&MAGIC[..], &sum.to_le_bytes(), &version, &length].concat();
        let file = self.disk.create(&temporary)?;
        file.write_at(&header, 0)?;
        file.write_at(snapshot, HEADER as u64)?;
        file.sync()?;
        self.disk.rename(&temporary, &self.name)?;
        self.disk.sync_dir()
    }

    /// The group's snapshot, if there is one.
    ///
    /// # Errors
    /// When it cannot be read, is damaged, or was written by a newer build; the error names the file.
    pub fn load(&self) -> io::Result<Option<Bytes>> {
        if !self.disk.list()?.contains(&self.name) {
            return Ok(None);
        }
        let damaged = |what: &str| {
            let what = format!("{}: {what}", self.name);
            io::Error::new(io::ErrorKind::InvalidData, what)
        };
        let file = self.disk.open(&self.name)?;
        let size = usize::try_from(file.size()?).map_err(|_| damaged("too large"))?;
        if size < HEADER {
            return Err(damaged("shorter than its header"));
        }
        let mut bytes = vec![0; size];
        file.read_at(&mut bytes, 0)?;
        if !bytes.starts_with(MAGIC) || u32_at(&bytes, 8) != crc32c::crc32c(&bytes[12..]) {
            return Err(damaged("checksum does not match"));
        }
        let (found, supported) = (u32_at(&bytes, 12), checkpoint::VERSION);
        if found > supported {
            let what = format!("has version {found}; this build reads up to {supported}");
            return Err(damaged(&what));
        }
        Ok(Some(Bytes::from(bytes).slice(HEADER..)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryDisk;

    #[test]
    fn the_newest_snapshot_is_kept_and_damage_is_told() {
        let disk = Arc::new(MemoryDisk::default());
        let file = SnapshotFile::new(disk.clone(), GroupId(3));
        assert_eq!(file.load().unwrap(), None);
        file.store(b"one").unwrap();
        file.store(b"two").unwrap();
        assert_eq!(file.load().unwrap().as_deref(), Some(&b"two"[..]));
        let raw = disk.open("snapshot-0003").unwrap();
        raw.write_at(b"x", 25).unwrap();
        assert!(
            file.load()
                .unwrap_err()
                .to_string()
                .contains("snapshot-0003")
        );
    }
}
