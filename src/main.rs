//! The `firth` command.

fn main() {}
