//! What clusters are put through.

mod prepared;
mod running;
