//! What std lacks: a stable hash, growing pauses, a byte budget. No domain words.

mod backoff;
mod budget;
mod hash;

pub use backoff::Backoff;
pub use budget::{ByteBudget, ByteGrant};
pub use hash::stable_hash;
