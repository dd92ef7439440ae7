//! `cargo bench`: the log beside the raw limit of the disk below the working directory. Takes the arguments of
//! `firth bench log`.

use std::process::ExitCode;

use clap::Parser;
use firth::storage::bench;

/// The log beside the raw limit of the disk
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    args: bench::Args,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench is there to be read"
)]
fn main() -> ExitCode {
    match bench::run(&Cli::parse().args) {
        Ok(report) => println!("{report}"),
        Err(failure) => {
            eprintln!("{failure}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
