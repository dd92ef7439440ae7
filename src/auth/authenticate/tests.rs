//! Tokens and keys against a keyring: who comes in, as whom, and with which code the others are refused.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use proptest::prelude::*;
use ring::hmac;
use serde_json::{Value, json};

use super::*;
use crate::auth::{AppKeys, Operation, Secret, Target};
use crate::types::{AppId, ChannelName, Retry};

const NOW: u64 = 1_795_309_503_139;
const HOUR: u64 = 3_600_000;

fn keyring() -> Keyring {
    keyring_of("secret")
}

/// All keys have this secret.
fn keyring_of(secret: &str) -> Keyring {
    let app: AppId = "app".parse().unwrap();
    let key = |id: &str, capability: &str, revocable_tokens| Key {
        app: app.clone(),
        id: id.into(),
        secret: Secret::new(secret),
        capability: Arc::new(Capability::parse(capability).unwrap()),
        revocable_tokens,
    };
    let keys: AppKeys = [
        key("all", r#"{"*":["*"]}"#, false),
        key("some", r#"{"a:*":["publish","subscribe"]}"#, false),
        key("revocable", r#"{"*":["*"]}"#, true),
    ]
    .into_iter()
    .collect();
    let mut ring = Keyring::default();
    ring.put(app, Arc::new(keys));
    ring
}

/// A JWT as a customer would make it, with any JSON in it.
fn jwt(secret: &str, header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(header), part(claims));
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let signature = hmac::sign(&key, signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn header(kid: &str) -> Value {
    json!({ "typ": "JWT", "alg": "HS256", "kid": kid })
}

/// Claims of a token of an hour that began a minute ago, and these.
fn claims(more: Value) -> Value {
    let iat = NOW / 1000 - 60;
    let mut claims = json!({ "iat": iat, "exp": iat + 3600 });
    let more: BTreeMap<String, Value> = serde_json::from_value(more).unwrap();
    for (name, value) in more {
        claims[name] = value;
    }
    claims
}

fn of(kid: &str, more: Value) -> String {
    jwt("secret", &header(kid), &claims(more))
}

fn enter(token: &str, wanted: Option<&str>) -> Result<Identity, ErrorInfo> {
    let none = Revocations::default();
    keyring().authenticate(&Presented::token(token), wanted, NOW, &none)
}

fn code(token: &str) -> u32 {
    enter(token, None).map_or_else(|err| err.code.code(), |_| 0)
}

#[test]
fn a_key_enters_as_anybody_and_for_ever() {
    let presented = Presented::from_request(None, Some("app.some:secret"), None).unwrap();
    let none = Revocations::default();
    let enter = |wanted| {
        keyring()
            .authenticate(&presented, wanted, NOW, &none)
            .unwrap()
    };
    let identity = enter(Some("me"));
    assert_eq!(identity.client_id, ClientId::Exactly("me".into()));
    assert_eq!((identity.key_id.as_str(), &identity.token), ("some", &None));
    assert_eq!(enter(None).client_id, ClientId::Any);
}

#[test]
fn a_jwt_enters_as_what_it_says() {
    let identity = enter(
        &of(
            "app.all",
            json!({
                "x-ably-capability": r#"{"a:b":["publish"],"[meta]*":["*"]}"#,
                "x-ably-clientId": "me",
                "x-ably-revocation-key": "group",
                "something": ["else"],
            }),
        ),
        None,
    )
    .unwrap();
    let issued_at_ms = (NOW / 1000 - 60) * 1000;
    let token = TokenClaims {
        issued_at_ms,
        expires_at_ms: issued_at_ms + HOUR,
        revocation_key: Some("group".into()),
        revocable: false,
        any_client: false,
    };
    assert_eq!(identity.token, Some(token));
    assert_eq!(identity.client_id, ClientId::Exactly("me".into()));
    assert_eq!((identity.app.as_str(), &*identity.key_id), ("app", "all"));
    assert_eq!(identity.capability.text(), r#"{"a:b":["publish"]}"#);
}

#[test]
fn a_token_never_may_more_than_its_key() {
    let may = |more: Value, operation, channel: &str| {
        let identity = enter(&of("app.some", more), None).unwrap();
        let channel = ChannelName::parse(channel).unwrap();
        identity.capability.allows(operation, &channel)
    };
    let everything = json!({ "x-ably-capability": r#"{"[*]*":["*"]}"# });
    assert!(may(everything.clone(), Operation::Publish, "a:b"));
    assert!(!may(everything.clone(), Operation::History, "a:b"));
    assert!(!may(everything, Operation::Publish, "b"));
    assert!(may(json!({}), Operation::Publish, "a:b"));
    assert!(!may(json!({}), Operation::Publish, "b"));
}

#[test]
fn every_refusal_has_the_code_that_tells_the_client_what_to_do() {
    let iat = NOW / 1000;
    let life = |iat: u64, exp: u64| of("app.all", json!({ "iat": iat, "exp": exp }));
    let capability = |text: &str| of("app.some", json!({ "x-ably-capability": text }));
    let table = [
        (of("app.all", json!({})), 0),
        ("opaque".into(), 40143),
        ("app.opaque-token".into(), 40143),
        (format!("{}x", of("app.all", json!({}))), 40144),
        (jwt("other", &header("app.all"), &claims(json!({}))), 40144),
        (
            jwt("secret", &json!({ "alg": "HS256" }), &claims(json!({}))),
            40144,
        ),
        (
            jwt(
                "secret",
                &json!({ "alg": "none", "kid": "app.all" }),
                &claims(json!({})),
            ),
            40144,
        ),
        (of("all", json!({})), 40144),
        (of("app.nokey", json!({})), 40101),
        (of("invalid.invalid", json!({})), 40400),
        (life(iat - 3600, iat), 40142),
        (life(iat - 10, iat - 20), 40142),
        (life(iat + 110, iat + 3600), 0),
        (life(iat + 130, iat + 3600), 40144),
        (life(iat, iat + 86_400), 0),
        (life(iat, iat + 86_401), 40003),
        (of("app.all", json!({ "iat": null })), 40144),
        (of("app.all", json!({ "exp": null })), 40144),
        (of("app.all", json!({ "exp": "tomorrow" })), 40144),
        (of("app.all", json!({ "exp": -1 })), 40144),
        (of("app.all", json!({ "nbf": iat + 600 })), 40144),
        (capability(r#"{"b":["publish"]}"#), 40160),
        (capability(r#"{"a:b":["history"]}"#), 40160),
        (capability(r#"{"a:b":[]}"#), 40000),
        (capability("nonsense"), 40000),
        (
            of("app.all", json!({ "x-ably-capability": { "a": ["*"] } })),
            40144,
        ),
        (
            of("app.all", json!({ "x-ably-clientId": "x".repeat(257) })),
            40012,
        ),
        ("e".repeat(TOKEN_BYTES_MAX + 1), 40005),
    ];
    for (at, (token, expected)) in table.iter().enumerate() {
        assert_eq!(code(token), *expected, "row {at}");
    }
}

#[test]
fn a_client_id_beside_a_token_must_be_the_tokens() {
    let wanted = |more: Value, wanted: &str| {
        enter(&of("app.all", more), Some(wanted)).map(|found| found.client_id)
    };
    let me = ClientId::Exactly("me".into());
    assert_eq!(
        wanted(json!({ "x-ably-clientId": "me" }), "me"),
        Ok(me.clone())
    );
    assert_eq!(wanted(json!({ "x-ably-clientId": "*" }), "me"), Ok(me));
    for more in [json!({}), json!({ "x-ably-clientId": "you" })] {
        assert_eq!(wanted(more, "me").unwrap_err().code.code(), 40102);
    }
    let nobody = enter(&of("app.all", json!({ "x-ably-clientId": "" })), None).unwrap();
    assert_eq!(nobody.client_id, ClientId::Anonymous);
}

#[test]
fn a_token_that_can_be_revoked_lives_for_an_hour() {
    let iat = NOW / 1000 - 60;
    let long = of("app.revocable", json!({ "iat": iat, "exp": iat + 7200 }));
    let identity = enter(&long, None).unwrap();
    let token = identity.token.unwrap();
    assert_eq!(
        (token.expires_at_ms, token.revocable),
        (iat * 1000 + HOUR, true)
    );
    let old = of(
        "app.revocable",
        json!({ "iat": iat - 3600, "exp": iat + 3600 }),
    );
    assert_eq!(code(&old), 40142);
}

#[test]
fn a_revoked_token_does_not_enter_and_does_not_stay() {
    let mut revoked = Revocations::default();
    let revocation = crate::auth::Revocation {
        key: KeyName::parse("app.revocable").unwrap(),
        target: Target::parse("clientId:me").unwrap(),
        issued_before_ms: NOW,
        applies_at_ms: NOW + 5,
    };
    revoked.add(revocation, NOW).unwrap();
    let presented = Presented::token(of("app.revocable", json!({ "x-ably-clientId": "*" })));
    let ring = keyring();
    let me = ring
        .authenticate(&presented, Some("me"), NOW, &revoked)
        .unwrap();
    assert_eq!(ring.review(&me, NOW + 4, &revoked), Ok(()));
    let error = ring.review(&me, NOW + 5, &revoked).unwrap_err();
    assert_eq!(error.code, ErrorCode::TokenRevoked);
    let error = ring
        .authenticate(&presented, Some("me"), NOW + 5, &revoked)
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::TokenRevoked);
    assert!(
        ring.authenticate(&presented, Some("you"), NOW + 5, &revoked)
            .is_ok()
    );
}

#[test]
fn who_is_in_is_reviewed() {
    let none = Revocations::default();
    let (mut ring, identity) = (keyring(), enter(&of("app.all", json!({})), None).unwrap());
    let end = identity.token.as_ref().unwrap().expires_at_ms;
    assert_eq!(ring.review(&identity, end - 1, &none), Ok(()));
    let code = |ring: &Keyring, now_ms| ring.review(&identity, now_ms, &none).unwrap_err().code;
    assert_eq!(code(&ring, end), ErrorCode::TokenExpired);
    ring.put("app".parse().unwrap(), Arc::default());
    assert_eq!(code(&ring, NOW), ErrorCode::KeyRevoked);
    assert_eq!(code(&Keyring::default(), NOW), ErrorCode::NotFound);
    let other = keyring_of("another");
    assert_eq!(
        code(&other, NOW),
        ErrorCode::KeyRevoked,
        "under the same id"
    );
}

#[test]
fn a_customers_jwt_may_carry_a_token() {
    let carry = |inner: &str, exp: Value| {
        let claims = json!({ "sub": "user", "x-ably-token": inner, "exp": exp });
        jwt("whoever", &json!({ "alg": "RS256" }), &claims)
    };
    let inner = of("app.all", json!({ "x-ably-clientId": "me" }));
    let end = |exp: Value| {
        let identity = enter(&carry(&inner, exp), None).unwrap();
        assert_eq!(identity.client_id, ClientId::Exactly("me".into()));
        identity.token.unwrap().expires_at_ms
    };
    let inner_end = (NOW / 1000 - 60) * 1000 + HOUR;
    assert_eq!(end(Value::Null), inner_end);
    assert_eq!(end(json!(NOW / 1000 + 86_400)), inner_end);
    assert_eq!(end(json!(NOW / 1000 + 60)), (NOW / 1000 + 60) * 1000);
    assert_eq!(code(&carry(&inner, json!(NOW / 1000 - 1))), 40142);
    assert_eq!(
        code(&carry(&carry(&inner, Value::Null), Value::Null)),
        40144
    );
    let unsigned = jwt("other", &header("app.all"), &claims(json!({})));
    assert_eq!(
        code(&carry(&unsigned, Value::Null)),
        40144,
        "the inner one must be signed"
    );
    assert_eq!(code(&carry("opaque", Value::Null)), 40143);
}

#[test]
fn a_connection_that_renews_does_not_loop_and_stays_in_its_app() {
    let me = enter(&of("app.all", json!({ "x-ably-clientId": "me" })), None).unwrap();
    let renew = |next| me.renewed_by(next).map(|next| next.client_id);
    let own = Ok(ClientId::Exactly("me".into()));
    assert_eq!(renew(Ok(me.clone())), own);
    let any = enter(&of("app.some", json!({ "x-ably-clientId": "*" })), None).unwrap();
    assert_eq!(renew(Ok(any.clone())), own);
    let other = Identity {
        app: "other".parse().unwrap(),
        ..any
    };
    assert_eq!(
        renew(Ok(other)).unwrap_err().code,
        ErrorCode::IncompatibleCredentials
    );
    for code in ErrorCode::ALL {
        let error = renew(Err((*code).into())).unwrap_err();
        assert_ne!(error.code.retry(), Retry::WithNewToken, "{code}");
    }
}

#[test]
fn refusals_repeat_no_secret() {
    for text in ["app.all:hidden", "hidden", "app.hidden"] {
        for presented in [
            Presented::from_request(None, Some(text), None),
            Presented::from_request(None, None, Some(text)),
        ] {
            let none = Revocations::default();
            let refused = presented
                .and_then(|presented| keyring().authenticate(&presented, None, NOW, &none));
            let error = refused.unwrap_err();
            assert!(!format!("{error:?} {error}").contains("hidden"), "{error}");
        }
    }
}

proptest! {
    #[test]
    fn any_token_is_believed_or_refused(text in "\\PC*", wanted in prop::option::of("\\PC*")) {
        prop_assert!(enter(&text, wanted.as_deref()).is_err());
    }

    /// Well signed nonsense.
    #[test]
    fn any_claims_are_believed_or_refused(
        names in prop::collection::vec(prop::sample::select(vec![
            "iat", "exp", "nbf", "x-ably-capability", "x-ably-clientId", "x-ably-revocation-key", "x-ably-token",
        ]), 0..7),
        values in prop::collection::vec(prop_oneof![
            any::<f64>().prop_map(|x| json!(x)), any::<i64>().prop_map(|x| json!(x)),
            "\\PC*".prop_map(|x| json!(x)), Just(json!(NOW / 1000)), Just(json!([{}])), Just(Value::Null),
        ], 7),
    ) {
        let said: serde_json::Map<_, _> = names.iter().map(|name| (*name).to_owned()).zip(values).collect();
        let _ = enter(&jwt("secret", &header("app.all"), &Value::Object(said.clone())), None);
        let _ = enter(&of("app.revocable", Value::Object(said)), Some("me"));
    }
}
