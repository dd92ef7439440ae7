//! What clusters are put through.

mod running;
