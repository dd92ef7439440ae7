//! Firth: a clustered edge broker. Each module is a room; `tests/tidy.rs` holds who may import whom.

pub mod admin;
pub mod auth;
pub mod bridge;
pub mod broker;
pub mod channel;
pub mod client;
pub mod cluster;
pub mod config;
pub mod gateway;
pub mod node;
pub mod placement;
pub mod raft;
pub mod session;
pub mod stdx;
pub mod storage;
pub mod tasks;
pub mod telemetry;
pub mod transport;
pub mod types;
pub mod wire;
