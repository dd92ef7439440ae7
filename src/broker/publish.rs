//! One publish, from a door to its outcome.

use bytes::Bytes;

use crate::channel::{Attendant, Outcome};
use crate::cluster::{SubmitError, Submitted};
use crate::types::{ChannelKey, ErrorCode, ErrorInfo, Serial};
use crate::wire::{control, entry};

/// Messages, or presence events, to store as one record.
#[derive(Clone, Debug, PartialEq)]
pub struct Publish {
    pub key: ChannelKey,
    /// Idempotency key, unique per channel.
    pub id: String,
    /// Empty where no connection publishes.
    pub connection_id: String,
    /// Messages in `body`, or presence events.
    pub count: u32,
    /// An encoded [`entry::Body`].
    pub body: Bytes,
    /// Where in Kafka it was read.
    pub source: Option<entry::Source>,
    /// Set when `body` holds presence events: what they change. Who attends the connection is filled in here: this
    /// process.
    pub presence: Option<entry::Presence>,
    /// Delivered, but no part of history, whatever the channel's rule.
    pub ephemeral: bool,
}

/// Why a publish has no serial.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Too much waits, or nobody leads. Nothing was stored.
    #[error("{0}")]
    Busy(ErrorInfo),
    /// It was sent, and no outcome came in time: it may or may not be stored. Safe to repeat with the same id.
    #[error("{0}")]
    Indeterminate(ErrorInfo),
    /// Read from Kafka by a former owner. Nothing was stored.
    #[error("fenced by a newer owner")]
    Fenced,
    /// Read from Kafka, and the record before it is not stored. Nothing was stored.
    #[error("the record before it is not stored")]
    Gap,
    /// More members than the channel may have. Nothing was stored.
    #[error("the channel has as many presence members as it may have")]
    Full,
}

impl From<PublishError> for ErrorInfo {
    fn from(err: PublishError) -> Self {
        match err {
            PublishError::Busy(info) | PublishError::Indeterminate(info) => info,
            PublishError::Full => Self::new(ErrorCode::TooManyMembers, err.to_string()),
            PublishError::Fenced | PublishError::Gap => {
                Self::new(ErrorCode::Internal, err.to_string())
            }
        }
    }
}

/// A publish under way.
#[derive(Debug)]
pub struct Published(Result<Submitted, SubmitError>);

impl Published {
    pub(super) const fn new(submitted: Result<Submitted, SubmitError>) -> Self {
        Self(submitted)
    }

    /// Waits until the publish is durable on a majority, or is known not to be, or time is up. Tells the record's
    /// serial, the first one if it is a repetition (`None` where only its Kafka position is remembered), and whether it
    /// is one. Presence events that changed nothing are no record: `None`, and no repetition.
    ///
    /// # Errors
    /// See [`PublishError`].
    pub async fn outcome(self) -> Result<(Option<Serial>, bool), PublishError> {
        let outcome = match self.0 {
            Ok(submitted) => submitted.await.unwrap_or(Err(SubmitError::Indeterminate)),
            Err(err) => Err(err),
        };
        match outcome {
            Ok(Outcome::Stored(serial)) => Ok((Some(serial), false)),
            Ok(Outcome::Duplicate(serial)) => Ok((serial, true)),
            Ok(Outcome::Unchanged) => Ok((None, false)),
            Ok(Outcome::Full) => Err(PublishError::Full),
            Ok(Outcome::Fenced) => Err(PublishError::Fenced),
            Ok(Outcome::Gap) => Err(PublishError::Gap),
            Ok(Outcome::Invalid | Outcome::Moved) => {
                let what = "the replicas refused what this node let in";
                let info = ErrorInfo::new(ErrorCode::Internal, what);
                Err(PublishError::Indeterminate(info))
            }
            Err(err) => Err(refused(err)),
        }
    }
}

fn refused(err: SubmitError) -> PublishError {
    let info = |code| ErrorInfo::new(code, err.to_string());
    match err {
        SubmitError::Busy => PublishError::Busy(info(ErrorCode::Busy)),
        SubmitError::NoLeader => PublishError::Busy(info(ErrorCode::NoLeader)),
        SubmitError::Indeterminate => PublishError::Indeterminate(info(ErrorCode::Timeout)),
    }
}

impl Publish {
    pub(super) fn into_entry(
        self,
        rule: &control::Namespace,
        attendant: Attendant,
    ) -> entry::Publish {
        let Attendant { node, boot } = attendant;
        let presence = self.presence.map(|presence| entry::Presence {
            node,
            boot,
            ..presence
        });
        entry::Publish {
            app: self.key.app.to_string(),
            channel: self.key.name.to_string(),
            id: self.id,
            connection_id: self.connection_id,
            count: self.count,
            body: self.body,
            source: self.source,
            retention_ms: rule.retention_ms,
            retention_bytes: rule.retention_bytes,
            last_only: rule.last_only,
            ephemeral: rule.ephemeral || self.ephemeral,
            moved: None,
            presence,
        }
    }
}
