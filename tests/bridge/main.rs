//! The bridge against a real Apache Kafka, over a broker that lives in memory and misbehaves as the contract allows.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod errors;
mod kafka;
mod memory;
mod scenarios;
