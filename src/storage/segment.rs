//! One segment file: its name, its 64-byte header, and reading a frame back from it.
//!
//! ```text
//!  0 "FIRTHLOG" | 8 format version u32 | 12 CRC32C of everything else u32
//! 16 number u64 | 24 incarnation u64 | 32 end of the head u64 | 40 zeros
//! ```
//!
//! Behind the header stands the *head*: the state of every group as it was then, so that older segments can go. A
//! file gets a segment's name only when its header and head are durable, so a bad header is always damage.
//!
//! A sealed segment ends with its indexes, its directory and a seal, and the file with a copy of that seal: from
//! there a reader finds the rest.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use crate::storage::disk::DiskFile;
use crate::storage::frame::{self, Frame, u32_at, u64_at};
use crate::storage::track::Track;

pub(super) const MAGIC: &[u8; 8] = b"FIRTHLOG";
/// What this build writes, and all it reads: no release wrote older ones.
pub(super) const VERSION: u32 = 3;
pub(super) const HEADER: usize = 64;
const SUFFIX: &str = ".log";

#[derive(Debug)]
pub(super) struct Segment {
    pub(super) number: u32,
    /// Zero when it could not be learned: then no frame can be read.
    pub(super) incarnation: u64,
    pub(super) file: Arc<dyn DiskFile>,
    /// Size of the file.
    pub(super) size: AtomicU64,
    /// Something in it is known to be unreadable.
    pub(super) damaged: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) number: u64,
    pub(super) incarnation: u64,
    /// Bytes that the header and the state of the groups take.
    pub(super) head_end: u64,
}

/// Why a file has no segment header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadHeader {
    Short,
    Magic,
    Checksum,
    Version(u32),
}

/// File name of a segment: its number in hexadecimal, so that names sort like numbers.
pub(super) fn name(number: u32) -> String {
    format!("{number:08x}{SUFFIX}")
}

/// The number in a segment's file name; `None` for other files.
pub(super) fn number(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(SUFFIX).filter(|text| text.len() == 8)?;
    u32::from_str_radix(digits, 16).ok()
}

/// Header and head of a new segment: all that precedes its first record.
pub(super) fn opening<'a>(
    number: u32,
    incarnation: u64,
    tracks: impl Iterator<Item = (u32, &'a Track)>,
) -> Vec<u8> {
    let mut out = vec![0; HEADER];
    for (group, track) in tracks {
        track.for_each_frame(group, |frame| frame.encode(incarnation, 0, &mut out));
    }
    let header = Header {
        number: u64::from(number),
        incarnation,
        head_end: out.len() as u64,
    };
    header.encode(&mut out[..HEADER]);
    out
}

impl Header {
    fn encode(self, out: &mut [u8]) {
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[16..24].copy_from_slice(&self.number.to_le_bytes());
        out[24..32].copy_from_slice(&self.incarnation.to_le_bytes());
        out[32..40].copy_from_slice(&self.head_end.to_le_bytes());
        let sum = Self::checksum(out);
        out[12..16].copy_from_slice(&sum.to_le_bytes());
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, BadHeader> {
        let head = bytes.get(..HEADER).ok_or(BadHeader::Short)?;
        if !head.starts_with(MAGIC) {
            return Err(BadHeader::Magic);
        }
        if Self::checksum(head) != u32_at(head, 12) {
            return Err(BadHeader::Checksum);
        }
        match u32_at(head, 8) {
            VERSION => Ok(Self {
                number: u64_at(head, 16),
                incarnation: u64_at(head, 24),
                head_end: u64_at(head, 32),
            }),
            newer => Err(BadHeader::Version(newer)),
        }
    }

    fn checksum(head: &[u8]) -> u32 {
        let sum = crc32c::crc32c(&head[..12]);
        crc32c::crc32c_append(sum, &head[16..HEADER])
    }
}

impl Segment {
    pub(super) fn new(number: u32, incarnation: u64, file: Arc<dyn DiskFile>) -> io::Result<Self> {
        Ok(Self {
            number,
            incarnation,
            size: AtomicU64::new(file.size()?),
            file,
            damaged: AtomicBool::new(false),
        })
    }

    /// Reads a frame of this payload length.
    pub(super) fn read(&self, offset: u32, length: u32) -> io::Result<Vec<u8>> {
        let end = u64::from(offset) + frame::HEADER as u64 + u64::from(length);
        if end > self.file.size()? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let size = frame::HEADER + length as usize;
        self.file.read_new(size, u64::from(offset))
    }

    /// Whether these bytes are the expected frame, which is given without its payload. Says why not.
    pub(super) fn verify(&self, bytes: &[u8], expected: Frame<'_>) -> Result<(), String> {
        let (found, _) = frame::decode(bytes, self.incarnation).map_err(|bad| bad.to_string())?;
        let same = Frame {
            payload: &[],
            ..found
        } == expected;
        match same && found.size() == bytes.len() {
            true => Ok(()),
            false => Err("another record stands there".to_owned()),
        }
    }
}

/// A number that no earlier use of any file had.
pub(super) fn new_incarnation() -> io::Result<u64> {
    let random = getrandom::u64().map_err(|error| io::Error::other(error.to_string()))?;
    Ok(random | 1)
}
