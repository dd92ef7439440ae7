//! What a group replicates, as its owner implements it and as a replica of it starts anew.

use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::channel::{Archive, Outcome};

/// What applying an entry answers to its proposer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// An entry that carries no command.
    None,
    /// One for each publish of the entry.
    Publishes(Vec<Outcome>),
    /// A command of the control group: why it was refused, if it was.
    Control(Result<(), String>),
}

/// How far a restored checkpoint reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restored {
    /// The state is that of the index at which the checkpoint was made.
    Whole,
    /// What the checkpoint leans on is gone or behind; nothing was restored. The outline in it may still serve.
    Unusable,
}

/// Entries in log order, each with its payload if it carries a command; `None` at the end.
pub type Replay<'a> = &'a mut dyn FnMut() -> io::Result<Option<(u64, Option<Bytes>)>>;

/// A replicated state machine. It sees each committed entry once, in log order, also again after a restart.
///
/// Its *horizon* is the log index up to which nobody needs the log any more: its *outline* and the log behind the
/// horizon make the whole state.
pub trait Machine: Send + Sync + 'static {
    /// # Errors
    /// When this build cannot apply the entry. The group stops then, rather than differ from its replicas.
    fn apply(&mut self, index: u64, payload: Bytes) -> Result<Response, String>;
    /// An entry without command lies at `index`.
    fn skip(&mut self, index: u64);

    /// The whole state as bytes, for a restart of this replica.
    fn checkpoint(&self) -> Bytes;
    /// A checkpoint made at `index` or later is durable: no older one is restored any more.
    ///
    /// # Errors
    /// When what checkpoints refer to failed; the group stops then.
    fn checkpointed(&mut self, index: u64) -> Result<(), String>;
    /// Replaces the state by one that `checkpoint` wrote at `index`.
    ///
    /// # Errors
    /// When the bytes are damaged or newer than this build.
    fn restore(&mut self, index: u64, checkpoint: Bytes) -> Result<Restored, String>;
    /// What the checkpoints refer to and must be made durable with them.
    fn archive(&self) -> Option<Arc<dyn Archive>>;

    /// Never sinks. `None`: the whole log is needed.
    fn horizon(&self) -> Option<u64>;
    /// The group's oldest entries are all that still lies in old segments of the node's log: a machine that chooses its
    /// horizon by itself moves it on.
    fn let_go(&mut self);
    /// What a replica needs that has the log behind the horizon. Small: no record is in it.
    fn outline(&self) -> Bytes;
    /// Replaces the state by an outline, or by what a checkpoint holds of one. The log from its horizon on follows.
    ///
    /// # Errors
    /// When the bytes are damaged or newer than this build.
    fn restore_outline(&mut self, index: u64, outline: Bytes) -> Result<(), String>;
    /// Replaces the state by an outline and the entries that follow it, at once: nobody sees what is between.
    ///
    /// # Errors
    /// When the outline or an entry cannot be applied; the former state stands then.
    fn rebuild(&mut self, index: u64, outline: Bytes, replay: Replay<'_>) -> Result<(), String>;
}
