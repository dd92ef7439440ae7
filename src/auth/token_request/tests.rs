//! Requests as client libraries make them, against the key's owner's arithmetic.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::auth::{AppKeys, Capability, ClientId, Revocations};
use crate::types::AppId;

/// When the captured requests were made.
const NOW: u64 = 1_795_309_503_139;
const HOUR: u64 = 3_600_000;

fn keyring() -> Keyring {
    let app: AppId = "app".parse().unwrap();
    let key = |id: &str, revocable_tokens| Key {
        app: app.clone(),
        id: id.into(),
        secret: Secret::new("secret"),
        capability: Arc::new(
            Capability::parse(r#"{ "b":["subscribe","publish"],"a:*":["*"] }"#).unwrap(),
        ),
        revocable_tokens,
    };
    let keys: AppKeys = [key("key", false), key("revocable", true)]
        .into_iter()
        .collect();
    let mut ring = Keyring::default();
    ring.put(app, Arc::new(keys));
    ring
}

fn read(request: Value) -> TokenRequest {
    serde_json::from_value(request).unwrap()
}

/// Signs as client libraries do: what is falsy there is signed as nothing.
fn signed(mut request: Value) -> Value {
    let text = |name: &str| match &request[name] {
        Value::String(text) => text.clone(),
        Value::Number(number) if number.as_i64() != Some(0) => number.to_string(),
        _ => String::new(),
    };
    let names = [
        "keyName",
        "ttl",
        "capability",
        "clientId",
        "timestamp",
        "nonce",
    ];
    let signed = names.map(|name| text(name) + "\n").concat();
    let mac = hmac::sign(&Secret::new("secret").signer(), signed.as_bytes());
    request["mac"] = json!(STANDARD.encode(mac));
    request
}

/// A signed request with these fields beside the necessary ones.
fn with(more: Value) -> Value {
    let mut request =
        json!({ "keyName": "app.key", "timestamp": NOW, "nonce": "1234567890123456" });
    for (name, value) in more.as_object().unwrap() {
        request[name] = value.clone();
    }
    signed(request)
}

fn ask(request: Value) -> Result<(TokenDetails, Option<Nonce>), ErrorInfo> {
    let request = read(request);
    let name = request.key_name.clone().unwrap_or("app.key".into());
    keyring().request_token(&name, &request, None, NOW, [7; 16])
}

fn code(request: Value) -> u32 {
    ask(request).map_or_else(|err| err.code.code(), |_| 0)
}

/// `printf 'app.key\n60000\n{"*":["publish"]}\n\n1795309503139\n4135555196940621\n' |
///  openssl dgst -sha256 -hmac secret -binary | base64`
#[test]
fn the_signed_text_is_everybodys() {
    let request = json!({
        "keyName": "app.key", "capability": r#"{"*":["publish"]}"#, "ttl": 60_000,
        "timestamp": NOW, "nonce": "4135555196940621", "mac": "2Nvh46PIZQLRsJbYoDOx5m3elXdgokURHtbm2Ze3EV0=",
    });
    let (details, nonce) = ask(request).unwrap();
    assert_eq!(details.expires - details.issued, 60_000);
    assert_eq!(details.capability, r#"{"a:*":["publish"],"b":["publish"]}"#);
    let nonce = nonce.unwrap();
    assert_eq!(
        (nonce.key.to_string(), &*nonce.text),
        ("app.key".into(), "4135555196940621")
    );
    let mut later = read(with(json!({ "nonce": nonce.text })));
    later.timestamp = Some(NOW.to_string());
    let answer = keyring().request_token("app.key", &later, None, nonce.until_ms, [0; 16]);
    assert_eq!(answer.unwrap_err().code, ErrorCode::TokenRequestTimestamp);
}

#[test]
fn a_token_says_what_was_asked_for_and_enters() {
    let (details, _) = ask(with(json!({ "clientId": "me", "ttl": 123 }))).unwrap();
    let shown = serde_json::to_value(&details).unwrap();
    assert_eq!(shown["issued"], json!(NOW));
    assert_eq!(shown["expires"], json!(NOW + 123));
    assert_eq!(
        (&shown["keyName"], &shown["clientId"]),
        (&json!("app.key"), &json!("me"))
    );
    assert_eq!(
        shown["capability"],
        json!(r#"{ "b":["subscribe","publish"],"a:*":["*"] }"#)
    );
    let presented = Presented::token(shown["token"].as_str().unwrap());
    let none = Revocations::default();
    let enter = |now_ms| keyring().authenticate(&presented, None, now_ms, &none);
    let identity = enter(NOW + 122).unwrap();
    assert_eq!(identity.client_id, ClientId::Exactly("me".into()));
    let token = identity.token.unwrap();
    assert_eq!((token.issued_at_ms, token.expires_at_ms), (NOW, NOW + 123));
    assert_eq!(enter(NOW + 123).unwrap_err().code, ErrorCode::TokenExpired);
    let (nobody, _) = ask(with(json!({}))).unwrap();
    assert!(!serde_json::to_string(&nobody).unwrap().contains("clientId"));
    assert!(!format!("{nobody:?}").contains(nobody.token.expose()));
}

#[test]
fn tokens_of_one_moment_differ() {
    let token = |random| {
        let request = read(with(json!({})));
        let answer = keyring().request_token("app.key", &request, None, NOW, random);
        answer.unwrap().0.token
    };
    assert_ne!(token([1; 16]).expose(), token([2; 16]).expose());
}

#[test]
fn lifetimes_have_a_default_and_a_limit() {
    let ttl = |key: &str, ttl: Value| {
        let asked = ask(with(json!({ "keyName": key, "ttl": ttl })));
        asked
            .map(|(details, _)| details.expires - details.issued)
            .map_err(|err| err.code.code())
    };
    for none in [Value::Null, json!(0), json!("")] {
        assert_eq!(ttl("app.key", none), Ok(HOUR));
    }
    assert_eq!(ttl("app.key", json!(24 * HOUR)), Ok(24 * HOUR));
    assert_eq!(ttl("app.revocable", json!(24 * HOUR)), Ok(HOUR));
    assert_eq!(ttl("app.revocable", json!(5)), Ok(5));
    for bad in [
        json!(24 * HOUR + 1),
        json!(-1),
        json!("notanumber"),
        json!(1.5),
        json!(1e300),
    ] {
        assert_eq!(ttl("app.key", bad.clone()), Err(40003), "{bad}");
    }
}

#[test]
fn every_refusal_has_its_code() {
    let at = |ms: u64| with(json!({ "timestamp": ms }));
    let capability = |text: &str| with(json!({ "capability": text }));
    let forged = {
        let mut request = with(json!({ "clientId": "me" }));
        request["clientId"] = json!("you");
        request
    };
    let table = [
        (with(json!({})), 0),
        (forged, 40101),
        (
            json!({ "keyName": "app.key", "timestamp": NOW, "nonce": "1", "mac": "12345" }),
            40101,
        ),
        (
            json!({ "keyName": "app.key", "timestamp": NOW, "nonce": "1" }),
            40101,
        ),
        (with(json!({ "keyName": "app.nokey" })), 40400),
        (with(json!({ "keyName": "nobody.key" })), 40400),
        (with(json!({ "keyName": "nonsense" })), 40400),
        (at(NOW - CLOCK_SKEW_MAX_MS), 0),
        (at(NOW + CLOCK_SKEW_MAX_MS), 0),
        (at(NOW - CLOCK_SKEW_MAX_MS - 1), 40104),
        (at(NOW + CLOCK_SKEW_MAX_MS + 1), 40104),
        (at(NOW - 30 * 60_000), 40104),
        (with(json!({ "timestamp": null })), 40003),
        (with(json!({ "timestamp": "soon" })), 40003),
        (with(json!({ "nonce": "" })), 40003),
        (with(json!({ "nonce": "x".repeat(257) })), 40003),
        (with(json!({ "clientId": "" })), 40012),
        (with(json!({ "clientId": "x".repeat(257) })), 40012),
        (with(json!({ "clientId": null, "capability": null })), 0),
        (capability(r#"{"channel0":["publish_"]}"#), 40000),
        (capability(r#"{"channel0":["*","publish"]}"#), 40000),
        (capability(r#"{"channel0":[]}"#), 40000),
        (capability(r#"{"c":["publish"]}"#), 40160),
        (capability(r#"{"b":["history"]}"#), 40160),
    ];
    for (row, (request, expected)) in table.into_iter().enumerate() {
        assert_eq!(code(request), expected, "row {row}");
    }
    let other = read(with(json!({})));
    let answer = keyring().request_token("app.revocable", &other, None, NOW, [0; 16]);
    assert_eq!(answer.unwrap_err().code, ErrorCode::BadRequest);
}

#[test]
fn without_a_mac_the_key_itself_is_needed() {
    let request = read(json!({ "ttl": 5000, "clientId": "me", "capability": { "b": ["*"] } }));
    let ask = |presented: &Presented| {
        keyring().request_token("app.key", &request, Some(presented), NOW, [0; 16])
    };
    let key = |text: &str| Presented::from_request(None, Some(text), None).unwrap();
    let (details, nonce) = ask(&key("app.key:secret")).unwrap();
    assert_eq!((details.expires, nonce), (NOW + 5000, None));
    assert_eq!(details.capability, r#"{"b":["publish","subscribe"]}"#);
    let token = Presented::Token(details.token);
    for other in [key("app.revocable:secret"), key("app.key:wrong"), token] {
        assert_eq!(ask(&other).unwrap_err().code, ErrorCode::InvalidCredentials);
    }
}

#[test]
fn requests_are_read_leniently_and_shown_without_their_proof() {
    let request = read(json!({
        "keyName": "app.key", "ttl": 60000.0, "timestamp": 1_795_309_503_139_f64, "mac": "hidden",
        "nonce": "hidden", "more": [1],
    }));
    assert_eq!(request.ttl.as_deref(), Some("60000"));
    assert_eq!(request.timestamp.as_deref(), Some("1795309503139"));
    assert!(!format!("{request:?}").contains("hidden"));
    for bad in [json!({ "ttl": true }), json!({ "nonce": [] }), json!("x")] {
        assert!(serde_json::from_value::<TokenRequest>(bad).is_err());
    }
    let packed =
        rmp_serde::to_vec_named(&json!({ "keyName": "app.key", "timestamp": NOW, "ttl": null }));
    let packed: TokenRequest = rmp_serde::from_slice(&packed.unwrap()).unwrap();
    assert_eq!(packed.timestamp.as_deref(), Some("1795309503139"));
    assert_eq!(
        (packed.key_name.as_deref(), packed.ttl),
        (Some("app.key"), None)
    );
}

proptest! {
    #[test]
    fn any_request_is_answered_or_refused(fields in prop::collection::vec(prop_oneof![
        Just(Value::Null), any::<f64>().prop_map(|x| json!(x)), any::<i64>().prop_map(|x| json!(x)),
        "\\PC*".prop_map(|x| json!(x)), Just(json!({ "a": [] })), Just(json!(NOW)),
    ], 6), name in "(app.key|\\PC*)") {
        let mut request = json!({});
        for (field, value) in ["ttl", "capability", "clientId", "timestamp", "nonce", "mac"].iter().zip(fields) {
            request[*field] = value;
        }
        let none = keyring().request_token(&name, &read(request.clone()), None, NOW, [0; 16]);
        prop_assert!(none.is_err());
        // And well signed, so that everything behind the signature is reached.
        request["keyName"] = json!("app.key");
        let mut request = read(request);
        let ttl = request.ttl.clone().unwrap_or_default();
        let mac = hmac::sign(&Secret::new("secret").signer(), request.signed_text(&ttl).as_bytes());
        request.mac = Some(STANDARD.encode(mac));
        if let Err(error) = keyring().request_token("app.key", &request, None, NOW, [0; 16]) {
            prop_assert_ne!(error.code, ErrorCode::InvalidCredentials);
        }
    }

    #[test]
    fn any_bytes_are_a_request_or_none(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = serde_json::from_slice::<TokenRequest>(&bytes);
    }
}
