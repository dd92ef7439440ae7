//! The file that says whose log a directory holds.
//!
//! `"FIRTHDIR" | CRC32C of the rest u32 | length u32 | firth.segment.v1.Identity`

use std::path::Path;

use prost::Message;

use crate::storage::disk::Disk;
use crate::storage::frame::u32_at;
use crate::storage::{Error, Owner};
use crate::wire::segment::{Identity, VERSION};

pub(super) const FILE: &str = "identity";
const TEMPORARY: &str = "identity.tmp";
pub(super) const LOCK: &str = "lock";
const MAGIC: &[u8; 8] = b"FIRTHDIR";
const HEADER: usize = 16;

/// Reads the identity, or writes it when the directory is new, and compares it with the owner.
pub(super) fn claim(disk: &dyn Disk, dir: &Path, owner: &Owner) -> Result<Identity, Error> {
    let names = disk.list().map_err(Error::io("list", dir))?;
    if names.iter().any(|name| name == FILE) {
        let found = read(disk, dir)?;
        return match found.cluster_id == owner.cluster_id && found.node == owner.node {
            true => Ok(found),
            false => Err(Error::WrongOwner {
                file: dir.join(FILE),
                found_cluster: found.cluster_id,
                found_node: found.node,
                cluster: owner.cluster_id.clone(),
                node: owner.node,
            }),
        };
    }
    let ours = |name: &str| name == LOCK || name == TEMPORARY;
    if let Some(found) = names.into_iter().find(|name| !ours(name)) {
        let dir = dir.to_owned();
        return Err(Error::NoIdentity { dir, found });
    }
    create(disk, dir, owner)
}

fn read(disk: &dyn Disk, dir: &Path) -> Result<Identity, Error> {
    let path = dir.join(FILE);
    let file = disk.open(FILE).map_err(Error::io("open", &path))?;
    let size = file.size().map_err(Error::io("measure", &path))?;
    let damaged = |what: &str| Error::Damaged {
        file: path.clone(),
        offset: 0,
        what: what.to_owned(),
    };
    if size < HEADER as u64 || size > 1 << 16 {
        return Err(damaged("no identity file has this size"));
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    file.read_at(&mut bytes, 0)
        .map_err(Error::io("read", &path))?;
    if !bytes.starts_with(MAGIC) {
        return Err(damaged("not an identity file"));
    }
    if u32_at(&bytes, 8) != crc32c::crc32c(&bytes[12..])
        || u32_at(&bytes, 12) as usize != bytes.len() - HEADER
    {
        return Err(damaged("checksum does not match"));
    }
    let identity =
        Identity::decode(&bytes[HEADER..]).map_err(|error| damaged(&error.to_string()))?;
    match identity.version {
        VERSION => Ok(identity),
        found => Err(Error::NewerVersion {
            file: path,
            found,
            supported: VERSION,
        }),
    }
}

fn create(disk: &dyn Disk, dir: &Path, owner: &Owner) -> Result<Identity, Error> {
    let path = dir.join(FILE);
    let mut random = [0; 16];
    getrandom::fill(&mut random)
        .map_err(|error| Error::io("name", &path)(std::io::Error::other(error.to_string())))?;
    let identity = Identity {
        version: VERSION,
        cluster_id: owner.cluster_id.clone(),
        node: owner.node,
        directory_id: format!("{:032x}", u128::from_be_bytes(random)),
    };
    write(disk, &identity).map_err(Error::io("write", &path))?;
    Ok(identity)
}

/// Replaces the file at once or not at all, durably.
pub(super) fn write(disk: &dyn Disk, identity: &Identity) -> std::io::Result<()> {
    let body = identity.encode_to_vec();
    let length = u32::try_from(body.len()).map_err(std::io::Error::other)?;
    let rest = [&length.to_le_bytes()[..], &body].concat();
    let sum = crc32c::crc32c(&rest).to_le_bytes();
    let file = disk.create(TEMPORARY)?;
    file.write_at(&[&MAGIC[..], &sum, &rest].concat(), 0)?;
    file.sync()?;
    disk.rename(TEMPORARY, FILE)?;
    disk.sync_dir()
}
