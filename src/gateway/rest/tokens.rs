//! Tokens: asking for them, and taking them back (§3.7.2, §3.7.5).

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;

use crate::auth::{RevocationRequest, Revoked, TokenDetails, TokenRequest};
use crate::gateway::Door;
use crate::gateway::answer::answer;
use crate::gateway::rest::Answer;
use crate::gateway::rest::asked::Asked;
use crate::gateway::rest::sent::Sent;
use crate::types::ErrorInfo;
use crate::wire::ably::ErrorBody;
use crate::wire::control;

pub(super) async fn request(State(door): State<Door>, asked: Asked, body: Body) -> Answer {
    asked
        .respond(async {
            let sent = Sent::read(&asked.headers, body, door.limits.max_frame_bytes).await?;
            let details = issue(&door, &asked, &sent.value()?).await?;
            Ok(answer(StatusCode::CREATED, asked.format, &details))
        })
        .await
}

async fn issue(
    door: &Door,
    asked: &Asked,
    request: &TokenRequest,
) -> Result<TokenDetails, ErrorInfo> {
    // Who signed needs no credential, and whoever signed nothing is told that a key is needed.
    let presented = asked.presented().ok();
    let key_name = asked.segment("key");
    door.keys.issue(key_name, request, presented.as_ref()).await
}

/// What came of one target.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Outcome {
    #[serde(rename_all = "camelCase")]
    Revoked {
        target: String,
        /// Milliseconds since 1970.
        issued_before: u64,
        applies_at: u64,
    },
    Failed {
        target: String,
        error: ErrorBody,
    },
}

impl Outcome {
    fn of(revoked: Revoked) -> Self {
        let target = revoked.target;
        match revoked.outcome {
            Ok(revocation) => Self::Revoked {
                target,
                issued_before: revocation.issued_before_ms,
                applies_at: revocation.applies_at_ms,
            },
            Err(error) => Self::Failed {
                target,
                error: ErrorBody::from(&error),
            },
        }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Counted {
    success_count: usize,
    failure_count: usize,
    results: Vec<Outcome>,
}

pub(super) async fn revoke(State(door): State<Door>, asked: Asked, body: Body) -> Answer {
    asked
        .respond(async {
            let sent = Sent::read(&asked.headers, body, door.limits.max_frame_bytes).await?;
            let revoked = take_back(&door, &asked, &sent.value()?).await?;
            let success_count = revoked.iter().filter(|it| it.outcome.is_ok()).count();
            let counted = Counted {
                success_count,
                failure_count: revoked.len() - success_count,
                results: revoked.into_iter().map(Outcome::of).collect(),
            };
            let (status, format) = (StatusCode::CREATED, asked.format);
            Ok(match asked.understands_counts() {
                true => answer(status, format, &counted),
                false => answer(status, format, &counted.results),
            })
        })
        .await
}

async fn take_back(
    door: &Door,
    asked: &Asked,
    request: &RevocationRequest,
) -> Result<Vec<Revoked>, ErrorInfo> {
    let revoked = door
        .keys
        .revoke(asked.segment("key"), &asked.presented()?, request)?;
    if let Some(change) = change(&revoked) {
        door.broker.revoke_tokens(change).await?;
    }
    Ok(revoked)
}

/// What the registry is to remember; nothing when no target can be.
fn change(revoked: &[Revoked]) -> Option<control::RevokeTokens> {
    let good = || revoked.iter().filter_map(|it| it.outcome.as_ref().ok());
    let first = good().next()?;
    Some(control::RevokeTokens {
        app: first.key.app.to_string(),
        key: first.key.key_id.clone(),
        targets: good().map(|it| it.target.to_string()).collect(),
        issued_before_ms: first.issued_before_ms,
        applies_at_ms: first.applies_at_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{KeyName, Revocation, Target};
    use crate::wire::ably::{Format, encode_value};

    fn revoked(target: &str) -> Revoked {
        Revoked {
            target: target.to_owned(),
            outcome: Target::parse(target).map(|target| Revocation {
                key: KeyName::parse("app.key").unwrap(),
                target,
                issued_before_ms: 1,
                applies_at_ms: 2,
            }),
        }
    }

    #[test]
    fn only_targets_that_can_be_revoked_reach_the_registry() {
        let all = [
            revoked("clientId:a"),
            revoked("nonsense:b"),
            revoked("channel:c:d"),
        ];
        let change = change(&all).unwrap();
        assert_eq!((&*change.app, &*change.key), ("app", "key"));
        assert_eq!(change.targets, ["clientId:a", "channel:c:d"]);
        assert_eq!((change.issued_before_ms, change.applies_at_ms), (1, 2));
        assert!(super::change(&[revoked("x:y")]).is_none());
    }

    #[test]
    fn each_target_has_its_answer() {
        let told = |target: &str| {
            let bytes = encode_value(Format::Json, &Outcome::of(revoked(target)));
            serde_json::from_slice::<serde_json::Value>(&bytes).unwrap()
        };
        let good = serde_json::json!({"target": "clientId:a", "issuedBefore": 1, "appliesAt": 2});
        assert_eq!(told("clientId:a"), good);
        let bad = told("x:y");
        assert_eq!(
            (&bad["target"], &bad["error"]["statusCode"]),
            (&"x:y".into(), &400.into())
        );
    }
}
