//! Firth: a clustered edge broker. Each module is a room; `tests/tidy.rs` holds who may import whom.

pub mod auth;
pub mod client;
pub mod stdx;
pub mod tasks;
pub mod transport;
pub mod types;
pub mod wire;
