//! Where log lines go. Metrics and traces follow with operations.

use tracing_subscriber::EnvFilter;

/// What is logged and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// A filter in `tracing`'s form, such as `info,firth::raft=debug`.
    pub filter: String,
}

impl Default for Options {
    fn default() -> Self {
        // openraft logs each refused call in words that only its authors need; what stops a group, ours say.
        let filter = "info,openraft=off".to_owned();
        Self { filter }
    }
}

/// The filter cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("log filter `{filter}`: {reason}")]
pub struct Error {
    filter: String,
    reason: String,
}

/// Sends log lines to standard error from now on. Does nothing when something listens already.
///
/// # Errors
/// When the filter cannot be read.
pub fn start(options: &Options) -> Result<(), Error> {
    let filter = EnvFilter::try_new(&options.filter).map_err(|err| Error {
        filter: options.filter.clone(),
        reason: err.to_string(),
    })?;
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    // A second node in one process, as in tests, keeps the first one's.
    let _ = lines.try_init();
    Ok(())
}
