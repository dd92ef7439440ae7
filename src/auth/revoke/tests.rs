//! What a request to revoke comes to.

use std::sync::Arc;

use serde_json::json;

use super::*;
use crate::auth::{AppKeys, Capability, Key, Secret};
use crate::types::AppId;

const NOW: u64 = 1_795_309_503_139;

fn keyring() -> Keyring {
    let app: AppId = "app".parse().unwrap();
    let key = |id: &str, revocable_tokens| Key {
        app: app.clone(),
        id: id.into(),
        secret: Secret::new("secret"),
        capability: Arc::new(Capability::everything()),
        revocable_tokens,
    };
    let keys: AppKeys = [key("key", false), key("revocable", true)]
        .into_iter()
        .collect();
    let mut ring = Keyring::default();
    ring.put(app, Arc::new(keys));
    ring
}

fn ask(name: &str, key: &str, request: serde_json::Value) -> Result<Vec<Revoked>, ErrorCode> {
    let request: RevocationRequest = serde_json::from_value(request).unwrap();
    let presented = Presented::from_request(None, Some(key), None).unwrap();
    let revoked = keyring().revoke(name, &presented, &request, NOW);
    revoked.map_err(|err| err.code)
}

#[test]
fn targets_are_answered_one_by_one() {
    let request = json!({ "targets": ["clientId:me", "invalidType:abc", "channel:a:*"] });
    let revoked = ask("app.revocable", "app.revocable:secret", request).unwrap();
    let given: Vec<&str> = revoked.iter().map(|one| &*one.target).collect();
    assert_eq!(given, ["clientId:me", "invalidType:abc", "channel:a:*"]);
    let first = revoked[0].outcome.clone().unwrap();
    assert_eq!((first.issued_before_ms, first.applies_at_ms), (NOW, NOW));
    assert_eq!(first.target, Target::ClientId("me".into()));
    assert_eq!(revoked[1].outcome.clone().unwrap_err().code.status(), 400);
    assert_eq!(
        revoked[2].outcome.clone().unwrap().target,
        Target::Channel("a:*".into())
    );
    let ago = NOW - 20 * 60_000;
    let request =
        json!({ "targets": ["clientId:me"], "issuedBefore": ago, "allowReauthMargin": true });
    let revoked = ask("app.revocable", "app.revocable:secret", request).unwrap();
    let first = revoked[0].outcome.clone().unwrap();
    assert_eq!(
        (first.issued_before_ms, first.applies_at_ms),
        (ago, NOW + 30_000)
    );
}

#[test]
fn only_the_key_itself_revokes_its_tokens_if_it_can() {
    let some = || json!({ "targets": ["clientId:me"] });
    let code = |name, key| ask(name, key, some()).unwrap_err();
    assert_eq!(
        code("app.key", "app.key:secret"),
        ErrorCode::RevocationDisabled
    );
    assert_eq!(
        code("app.revocable", "app.key:secret"),
        ErrorCode::WrongKeyForRevocation
    );
    assert_eq!(
        code("app.revocable", "app.revocable:x"),
        ErrorCode::InvalidCredentials
    );
    assert_eq!(
        code("nonsense", "app.revocable:secret"),
        ErrorCode::InvalidCredentials
    );
    let request = serde_json::from_value(some()).unwrap();
    let token = Presented::token("t");
    let error = keyring()
        .revoke("app.revocable", &token, &request, NOW)
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::RevocationNeedsKey);
}

#[test]
fn times_and_targets_are_bounded() {
    let many = vec!["clientId:me"; 101];
    for bad in [
        json!({ "targets": [] }),
        json!({ "targets": many }),
        json!({ "targets": ["clientId:me"], "issuedBefore": NOW + 1 }),
        json!({ "targets": ["clientId:me"], "issuedBefore": NOW - 3_600_001 }),
    ] {
        let code = ask("app.revocable", "app.revocable:secret", bad).unwrap_err();
        assert_eq!(code, ErrorCode::InvalidParameter);
    }
}
