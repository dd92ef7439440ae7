//! What can be read of a channel: its messages, its members, what became of them, and what it is at present (§3.2).

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;

use crate::auth::Operation;
use crate::gateway::answer::{self, answer};
use crate::gateway::rest::Answer;
use crate::gateway::rest::asked::Asked;
use crate::gateway::{Door, history, members};
use crate::types::{ErrorCode, ErrorInfo};

pub(super) async fn history(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::History)?;
            let query = history::Query::parse(&asked.pairs)?;
            let page = query.messages(&door.broker, &key).await?;
            Ok(answer::page(asked.format, &page))
        })
        .await
}

pub(super) async fn presence_history(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::History)?;
            let query = history::Query::parse(&asked.pairs)?;
            let page = query.presence(&door.broker, &key).await?;
            Ok(answer::page(asked.format, &page))
        })
        .await
}

pub(super) async fn message(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::History)?;
            let found = history::message(&door.broker, &key, asked.segment("serial")).await?;
            Ok(answer(StatusCode::OK, asked.format, &found))
        })
        .await
}

/// A message has the one version that it was published as.
pub(super) async fn versions(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::History)?;
            let found = history::message(&door.broker, &key, asked.segment("serial")).await?;
            Ok(answer(StatusCode::OK, asked.format, &[found]))
        })
        .await
}

/// Refused: no channel's messages can be changed.
pub(super) async fn change(State(door): State<Door>, asked: Asked) -> Answer {
    use Operation::{MessageDeleteAny, MessageDeleteOwn, MessageUpdateAny, MessageUpdateOwn};
    // Which of these is needed the action says, which makes no difference here.
    let any = [
        MessageUpdateAny,
        MessageUpdateOwn,
        MessageDeleteAny,
        MessageDeleteOwn,
    ];
    refuse(&door, &asked, &any)
}

/// Refused: no channel's messages can be annotated.
pub(super) async fn annotate(State(door): State<Door>, asked: Asked) -> Answer {
    refuse(&door, &asked, &[Operation::AnnotationPublish])
}

/// Refused, likewise.
pub(super) async fn annotations(State(door): State<Door>, asked: Asked) -> Answer {
    use Operation::{AnnotationSubscribe, History, Subscribe};
    refuse(&door, &asked, &[AnnotationSubscribe, History, Subscribe])
}

/// To who may do one of these it says that nobody can, to others that they may not.
fn refuse(door: &Door, asked: &Asked, operations: &[Operation]) -> Answer {
    let admitted = |operation: &Operation| asked.admit_to(door, *operation);
    let mut refusals = operations.iter().map(admitted).map(Result::err);
    let refusal = refusals.next().flatten();
    let permitted = refusal.is_none() || refusals.any(|refusal| refusal.is_none());
    let error = refusal.filter(|_| !permitted);
    asked.finish(Err(error.unwrap_or(ErrorCode::MessagesUnchangeable.into())))
}

pub(super) async fn members(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::Subscribe)?;
            let query = members::Query::parse(&asked.pairs)?;
            let page = query.page(door.broker.members(&key).await?);
            Ok(answer::page(asked.format, &page))
        })
        .await
}

/// What a channel is at present. What no node counts over all of them is left out, not guessed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Details<'a> {
    channel_id: &'a str,
    status: Status,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    /// Told when it is known: a channel with members is in use. Of one without members it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    is_active: Option<bool>,
    occupancy: Occupancy,
}

#[derive(Debug, Serialize)]
struct Occupancy {
    metrics: Metrics,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Metrics {
    presence_members: usize,
}

pub(super) async fn details(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::ChannelMetadata)?;
            let presence_members = door.broker.members(&key).await?.len();
            let details = Details {
                channel_id: key.name.as_str(),
                status: Status {
                    is_active: (presence_members > 0).then_some(true),
                    occupancy: Occupancy {
                        metrics: Metrics { presence_members },
                    },
                },
            };
            Ok(answer(StatusCode::OK, asked.format, &details))
        })
        .await
}

/// Refused: which channels somebody is attached to no node knows of the others, and a list with holes is worse than none.
pub(super) async fn list(State(door): State<Door>, asked: Asked) -> Answer {
    let result = asked.identity(&door).and_then(|_| {
        let what = "channels cannot be enumerated; ask for one by its name";
        Err(ErrorInfo::new(ErrorCode::NotFound, what))
    });
    asked.finish(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ably::{Format, encode_value};

    #[test]
    fn what_is_not_counted_is_not_told() {
        let told = |is_active, presence_members| {
            let details = Details {
                channel_id: "c",
                status: Status {
                    is_active,
                    occupancy: Occupancy {
                        metrics: Metrics { presence_members },
                    },
                },
            };
            String::from_utf8(encode_value(Format::Json, &details).to_vec()).unwrap()
        };
        assert_eq!(
            told(Some(true), 2),
            r#"{"channelId":"c","status":{"isActive":true,"occupancy":{"metrics":{"presenceMembers":2}}}}"#
        );
        assert!(!told(None, 0).contains("isActive"));
    }
}
