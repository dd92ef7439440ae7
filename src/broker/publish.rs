//! One publish, from a door to its outcome.

use std::time::Duration;

use bytes::Bytes;

use crate::channel::Outcome;
use crate::cluster::{SubmitError, Submitted};
use crate::types::{ChannelKey, ErrorCode, ErrorInfo, Serial};
use crate::wire::entry;

/// Messages to store as one record.
#[derive(Clone, Debug, PartialEq)]
pub struct Publish {
    pub key: ChannelKey,
    /// Idempotency key, unique per channel.
    pub id: String,
    /// Empty where no connection publishes.
    pub connection_id: String,
    /// Messages in `body`.
    pub count: u32,
    /// An encoded [`entry::Body`].
    pub body: Bytes,
    /// Where in Kafka it was read.
    pub source: Option<entry::Source>,
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
}

impl From<PublishError> for ErrorInfo {
    fn from(err: PublishError) -> Self {
        match err {
            PublishError::Busy(info) | PublishError::Indeterminate(info) => info,
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
    /// is one.
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
    pub(super) fn into_entry(self, retention: Duration) -> entry::Publish {
        entry::Publish {
            app: self.key.app.to_string(),
            channel: self.key.name.to_string(),
            id: self.id,
            connection_id: self.connection_id,
            count: self.count,
            body: self.body,
            source: self.source,
            retention_ms: u64::try_from(retention.as_millis()).unwrap_or(u64::MAX),
            ..Default::default()
        }
    }
}
