//! Why a log could not be opened.

use std::io;
use std::path::{Path, PathBuf};

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
    #[error("{} holds {found} but no identity file; refusing to guess whose log it is", dir.display())]
    NoIdentity { dir: PathBuf, found: String },
    #[error("{} is damaged at byte {offset}: {what}", file.display())]
    Damaged {
        file: PathBuf,
        offset: u64,
        what: String,
    },
    #[error("the log in {} is not whole: group {group}: {what}", dir.display())]
    Hole {
        dir: PathBuf,
        group: u32,
        what: String,
    },
    #[error("segment_bytes is {found}, it must be from {min} to {max}")]
    SegmentBytes { found: u64, min: u64, max: u64 },
}

impl Error {
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
