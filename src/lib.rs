//! Firth: a clustered edge broker. Each module is a room; `tests/tidy.rs` holds who may import whom.
//! Pure rooms may not name clocks, tasks or unordered maps: `clippy.toml` lists them.

pub mod admin;
pub mod archive;
#[deny(clippy::disallowed_methods, clippy::disallowed_types)]
pub mod auth;
pub mod bridge;
pub mod broker;
#[deny(clippy::disallowed_methods, clippy::disallowed_types)]
pub mod channel;
pub mod client;
pub mod cluster;
pub mod config;
pub mod gateway;
pub mod node;
#[deny(clippy::disallowed_methods, clippy::disallowed_types)]
pub mod placement;
pub mod raft;
#[deny(clippy::disallowed_methods, clippy::disallowed_types)]
pub mod session;
#[deny(clippy::disallowed_methods, clippy::disallowed_types)]
pub mod stdx;
pub mod storage;
pub mod tasks;
pub mod telemetry;
pub mod transport;
#[deny(clippy::disallowed_methods, clippy::disallowed_types)]
pub mod types;
#[deny(clippy::disallowed_methods, clippy::disallowed_types)]
pub mod wire;
