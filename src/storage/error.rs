//! Why a log could not be opened, and which entries could not be read.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::types::GroupId;

/// Each says which file and what an operator would need to know. None of them changed what was found on the disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not {doing} {}: {source}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("log directory {} is in use by another process", dir.display())]
    Locked { dir: PathBuf },
    #[error(
        "{} says that this directory belongs to node {found_node} of cluster `{found_cluster}`, \
         but node {node} of cluster `{cluster}` was to open it", file.display()
    )]
    WrongOwner {
        file: PathBuf,
        found_cluster: String,
        found_node: u64,
        cluster: String,
        node: u64,
    },
    #[error(
        "{} has format version {found}, this build reads up to {supported}; it was written by a newer release",
        file.display()
    )]
    NewerVersion {
        file: PathBuf,
        found: u32,
        supported: u32,
    },
    #[error(
        "{} has format version {found}, this build reads only {supported}; it was written by an older build, and \
         cannot be converted", file.display()
    )]
    OlderVersion {
        file: PathBuf,
        found: u32,
        supported: u32,
    },
    #[error("{} holds {found} but no identity file; refusing to guess whose log it is", dir.display())]
    NoIdentity { dir: PathBuf, found: String },
    #[error("{} is damaged at byte {offset}: {what}", file.display())]
    Damaged {
        file: PathBuf,
        offset: u64,
        what: String,
    },
    #[error("segment_bytes is {found}, it must be from {min} to {max}")]
    SegmentBytes { found: u64, min: u64, max: u64 },
}

/// Entries that exist but cannot be read here, because their bytes were damaged or lost. What is inside an
/// `io::Error` of kind `InvalidData`; a peer may have them, for [`GroupLog::repair`](crate::storage::GroupLog::repair).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {} of group {} is unreadable: {what}", range.start, group.0)]
pub struct Damaged {
    pub group: GroupId,
    /// Indices, of which the first was asked for.
    pub range: Range<u64>,
    /// Where and why.
    pub what: String,
}

impl From<Damaged> for io::Error {
    fn from(damaged: Damaged) -> Self {
        Self::new(io::ErrorKind::InvalidData, damaged)
    }
}

impl Error {
    /// A file of a version that this build does not read.
    pub(super) fn version(file: PathBuf, found: u32, supported: u32) -> Self {
        match found > supported {
            true => Self::NewerVersion {
                file,
                found,
                supported,
            },
            false => Self::OlderVersion {
                file,
                found,
                supported,
            },
        }
    }

    /// Damage where votes may be lost.
    pub(super) fn newest(file: PathBuf, offset: u64, what: &str) -> Self {
        let what = format!(
            "{what}. The newest votes and entries may be lost, so nothing that this directory acknowledged may be \
             trusted: move it away, and admit the node anew with an empty one"
        );
        Self::Damaged { file, offset, what }
    }

    /// For `map_err`: what was being done to which file.
    pub(super) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }
}
