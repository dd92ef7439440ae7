//! Several channels in one request: publishing to them, and listing their members (§3.5).

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};

use crate::auth::{Identity, Operation};
use crate::gateway::Door;
use crate::gateway::answer::answer;
use crate::gateway::rest::asked::{Asked, permitted};
use crate::gateway::rest::one_or_many::OneOrMany;
use crate::gateway::rest::publish::{Stored, check};
use crate::gateway::rest::sent::Sent;
use crate::gateway::rest::{Answer, BATCH_CHANNELS_MAX};
use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::{ErrorBody, Message, PresenceMessage};

/// Bytes of a batch.
const BODY_BYTES_MAX: usize = 2 * 1024 * 1024;

/// Parts of a batch, each with channels of its own.
const SPECS_MAX: usize = 100;

/// The same messages for several channels.
#[derive(Debug, Deserialize)]
struct Spec {
    channels: OneOrMany<String>,
    messages: OneOrMany<Message>,
}

#[derive(Debug, Serialize)]
struct Failed {
    channel: String,
    error: ErrorBody,
}

/// What came of one channel.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Outcome<T> {
    Done(T),
    Failed(Failed),
}

impl<T> Outcome<T> {
    fn of(channel: &str, result: Result<T, ErrorInfo>) -> Self {
        let failed = |error: ErrorInfo| {
            Self::Failed(Failed {
                channel: channel.to_owned(),
                error: ErrorBody::from(&error),
            })
        };
        result.map_or_else(failed, Self::Done)
    }

    const fn is_done(&self) -> bool {
        matches!(self, Self::Done(_))
    }
}

/// What came of several, from version 3 on.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Counted<T> {
    success_count: usize,
    failure_count: usize,
    results: Vec<Outcome<T>>,
}

impl<T> Counted<T> {
    fn of(results: Vec<Outcome<T>>) -> Self {
        let success_count = results.iter().filter(|it| it.is_done()).count();
        Self {
            success_count,
            failure_count: results.len() - success_count,
            results,
        }
    }
}

/// The same in version 2, when something failed.
#[derive(Debug, Serialize)]
struct PartlyFailed<T> {
    error: ErrorBody,
    #[serde(rename = "batchResponse")]
    batch_response: Vec<Outcome<T>>,
}

/// The answer of version 2: what came of each channel, alone when all went well.
fn uncounted<T: Serialize>(asked: &Asked, good: StatusCode, results: Vec<Outcome<T>>) -> Answer {
    if results.iter().all(Outcome::is_done) {
        return answer(good, asked.format, &results);
    }
    let error = ErrorInfo::from(ErrorCode::BatchFailed);
    let failed = PartlyFailed {
        error: ErrorBody::from(&error),
        batch_response: results,
    };
    answer(StatusCode::BAD_REQUEST, asked.format, &failed)
}

pub(super) async fn publish(State(door): State<Door>, asked: Asked, body: Body) -> Answer {
    let result = store(&door, &asked, body).await;
    asked.finish(result)
}

async fn store(door: &Door, asked: &Asked, body: Body) -> Result<Answer, ErrorInfo> {
    let identity = asked.identity(door)?;
    let sent = Sent::read(&asked.headers, body, BODY_BYTES_MAX).await?;
    let specs = sent.value::<OneOrMany<Spec>>()?.0;
    if !(1..=SPECS_MAX).contains(&specs.len()) {
        let what = format!("1 to {SPECS_MAX} parts of a batch are possible");
        return Err(ErrorInfo::new(ErrorCode::InvalidPublish, what));
    }
    for spec in &specs {
        check_channels(&spec.channels.0)?;
    }
    // One part after another: what is under way at a time is bounded by one part's channels.
    let mut done = Vec::new();
    for spec in specs {
        done.push(store_one(door, &identity, spec).await);
    }
    if asked.understands_counts() {
        let counted: Vec<_> = done.into_iter().map(Counted::of).collect();
        return Ok(answer(StatusCode::CREATED, asked.format, &counted));
    }
    // Clients of that time know of no serials.
    let unnumbered = |outcome| match outcome {
        Outcome::Done(stored) => Outcome::Done(Stored {
            serials: None,
            ..stored
        }),
        Outcome::Failed(failed) => Outcome::Failed(failed),
    };
    let flat = done.into_iter().flatten().map(unnumbered).collect();
    Ok(uncounted(asked, StatusCode::CREATED, flat))
}

async fn store_one(door: &Door, identity: &Identity, spec: Spec) -> Vec<Outcome<Stored>> {
    let ready = check(door, identity, spec.messages.0);
    let stored = spec.channels.0.iter().map(|channel| {
        let ready = ready.as_ref();
        async move {
            let result = match ready {
                Ok(ready) => ready.store(door, identity, channel).await,
                Err(err) => Err(err.clone()),
            };
            Outcome::of(channel, result)
        }
    });
    join_all(stored).await
}

#[derive(Debug, Serialize)]
struct Present {
    channel: String,
    presence: Vec<PresenceMessage>,
}

pub(super) async fn presence(State(door): State<Door>, asked: Asked) -> Answer {
    let result = list(&door, &asked).await;
    asked.finish(result)
}

async fn list(door: &Door, asked: &Asked) -> Result<Answer, ErrorInfo> {
    let identity = asked.identity(door)?;
    let separator = asked.param(&["separator"]).filter(|it| !it.is_empty());
    let named = asked.param(&["channels", "channel"]).unwrap_or_default();
    let channels = named.split(separator.unwrap_or(","));
    let channels: Vec<String> = channels
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect();
    check_channels(&channels)?;
    let identity = &identity;
    let found = channels.iter().map(|channel| async move {
        let result = members(door, identity, channel).await;
        Outcome::of(channel, result)
    });
    let results = join_all(found).await;
    if asked.understands_counts() {
        return Ok(answer(StatusCode::OK, asked.format, &Counted::of(results)));
    }
    Ok(uncounted(asked, StatusCode::OK, results))
}

async fn members(door: &Door, identity: &Identity, channel: &str) -> Result<Present, ErrorInfo> {
    let key = permitted(identity, Operation::Subscribe, channel)?;
    Ok(Present {
        channel: channel.to_owned(),
        presence: door.broker.members(&key).await?,
    })
}

fn check_channels(channels: &[String]) -> Result<(), ErrorInfo> {
    if (1..=BATCH_CHANNELS_MAX).contains(&channels.len()) {
        return Ok(());
    }
    let what = format!("1 to {BATCH_CHANNELS_MAX} channels are possible");
    Err(ErrorInfo::new(ErrorCode::InvalidParameter, what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ably::{Format, decode_value, encode_value};

    #[test]
    fn a_part_names_one_channel_or_many_and_one_message_or_many() {
        for (text, channels, messages) in [
            (r#"{"channels":"a","messages":{"data":"x"}}"#, 1, 1),
            (
                r#"{"channels":["a","b"],"messages":[{"data":"x"},{}]}"#,
                2,
                2,
            ),
        ] {
            let spec: OneOrMany<Spec> = decode_value(Format::Json, text.as_bytes()).unwrap();
            let [spec] = &spec.0[..] else {
                panic!("{text}")
            };
            assert_eq!(
                (spec.channels.0.len(), spec.messages.0.len()),
                (channels, messages)
            );
        }
        for bad in [
            r#"{"channels":"a"}"#,
            r#"{"messages":{}}"#,
            "1",
            r#"{"channels":1,"messages":{}}"#,
        ] {
            assert!(
                decode_value::<OneOrMany<Spec>>(Format::Json, bad.as_bytes()).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn results_are_counted_and_keep_their_order() {
        let error = ErrorInfo::from(ErrorCode::CapabilityDenied);
        let results = vec![Outcome::of("a", Ok("done")), Outcome::of("b", Err(error))];
        let counted = encode_value(Format::Json, &Counted::of(results));
        let read: serde_json::Value = serde_json::from_slice(&counted).unwrap();
        assert_eq!(
            (&read["successCount"], &read["failureCount"]),
            (&1.into(), &1.into())
        );
        assert_eq!(read["results"][0], "done");
        assert_eq!(read["results"][1]["channel"], "b");
        assert_eq!(read["results"][1]["error"]["code"], 40160);
    }
}
