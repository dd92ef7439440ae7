//! Firth: a clustered edge broker. Each module is a room; `tests/tidy.rs` holds who may import whom.

pub mod bridge;
pub mod stdx;
pub mod tasks;
pub mod types;
pub mod wire;
