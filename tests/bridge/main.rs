//! The bridge against a real Apache Kafka, over a broker that lives in memory and misbehaves as the contract allows.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]
#![allow(clippy::too_many_lines, reason = "a scenario is told in one piece")]

mod errors;
mod kafka;
mod memory;
mod scenarios;
