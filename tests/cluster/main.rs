//! Whole clusters in one process, on disks that forget, fail and block when told to.
//!
//! A node is what `node.rs` builds below its doors: log, QUIC transport on loopback, Raft groups, cluster; each on a
//! runtime of its own, so that dropping it is a `kill -9`. What every scenario promises is checked in `ledger`: what
//! was acknowledged is there once, in its publisher's order, alike on all nodes, whose states have the same digest.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod disk;
mod ledger;
mod net;
mod node;
mod scenarios;
