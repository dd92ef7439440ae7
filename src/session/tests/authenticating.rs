//! Credentials that change or end in the middle of a conversation, and other ends that are not the client's doing.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::auth::{Capability, ClientId, Identity, Secret, TokenClaims};
use crate::session::tests::{
    ALL_MODES, EVERYTHING, FRESH, NOW, as_json, at, attach, attach_effect, drain, name, opening,
    publish, send, sent, sent_and_closed, session_with,
};
use crate::session::{Effect, Opening, Session};
use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::flags;

const SUBSCRIBER: &str = r#"{"*":["subscribe"]}"#;

fn identity(capability: &str, client_id: ClientId, lives_ms: Option<u64>) -> Identity {
    Identity {
        app: "app".parse().unwrap(),
        key_id: "key".into(),
        secret: Secret::new("secret"),
        client_id,
        capability: Arc::new(Capability::parse(capability).unwrap()),
        token: lives_ms.map(|lives| TokenClaims {
            issued_at_ms: NOW,
            expires_at_ms: NOW + lives,
            revocation_key: None,
            revocable: false,
            any_client: false,
        }),
    }
}

/// A session whose token lives so long, without heartbeats, that has said CONNECTED.
fn with_token(capability: &str, lives_ms: u64) -> Session {
    let mut opening = opening(capability, "me");
    opening.identity = identity(capability, ClientId::Exactly("me".into()), Some(lives_ms));
    opening.limits.idle_interval_ms = 0;
    let mut session = Session::new(opening, NOW);
    assert_eq!(drain(&mut session).len(), 1);
    session
}

fn offer(session: &mut Session, token: &str) -> Vec<Effect> {
    send(
        session,
        json!({"action": 17, "auth": {"accessToken": token}}),
    )
}

#[track_caller]
fn checks(effects: &[Effect], expected: &str) {
    let [Effect::Authenticate { token }] = effects else {
        panic!("{effects:?}")
    };
    assert_eq!(token.expose(), expected);
    assert!(
        !format!("{effects:?}").contains(expected),
        "a token is never shown"
    );
}

fn renew(session: &mut Session, capability: &str) -> Vec<Value> {
    checks(&offer(session, "t2"), "t2");
    let me = ClientId::Exactly("me".into());
    session.handle_authenticated(Ok(identity(capability, me, None)), NOW);
    let effects = drain(session);
    let (frames, rest): (Vec<_>, Vec<_>) = effects
        .into_iter()
        .partition(|effect| matches!(effect, Effect::Send(_)));
    for effect in rest {
        let Effect::Attach {
            channel,
            in_place: true,
            ..
        } = effect
        else {
            assert!(
                matches!(effect, Effect::Detach { .. } | Effect::Depart { .. }),
                "{effect:?}"
            );
            continue;
        };
        session.handle_attached(&channel, at(6, FRESH), NOW);
    }
    let frames = frames.into_iter().chain(drain(session));
    frames.map(|effect| sent(&[effect])).collect()
}

#[test]
fn a_token_ends_after_the_client_was_asked_for_another() {
    // (how long it lives, after how long the client is asked)
    for (lives, asks) in [
        (3_600_000, Some(3_570_000)),
        (35_000, Some(5_000)),
        (34_000, Some(17_000)),
        (11_000, Some(5_500)),
        (10_999, None),
        (5_000, None),
    ] {
        let mut session = with_token(EVERYTHING, lives);
        if let Some(asks) = asks {
            assert_eq!(session.next_deadline(), Some(NOW + asks), "{lives}");
            session.handle_tick(NOW + asks - 1);
            assert_eq!(drain(&mut session), []);
            session.handle_tick(NOW + asks);
            assert_eq!(sent(&drain(&mut session)), json!({"action": 17}));
        }
        assert_eq!(session.next_deadline(), Some(NOW + lives), "{lives}");
        session.handle_tick(NOW + lives - 1);
        assert_eq!(drain(&mut session), []);
        session.handle_tick(NOW + lives);
        sent_and_closed(&drain(&mut session), 6, 40142);
        assert_eq!(session.next_deadline(), None);
    }
    // A timer that is so late that asking makes no sense.
    let mut late = with_token(EVERYTHING, 60_000);
    late.handle_tick(NOW + 55_000);
    assert_eq!(drain(&mut late), []);
    let mut key = opening(EVERYTHING, "me");
    key.limits.idle_interval_ms = 0;
    assert_eq!(
        Session::new(key, NOW).next_deadline(),
        None,
        "a key does not expire"
    );
}

#[test]
fn a_new_token_is_told_by_connected_and_lasts_its_own_time() {
    let mut session = with_token(EVERYTHING, 60_000);
    checks(&offer(&mut session, "t2"), "t2");
    let me = ClientId::Exactly("me".into());
    session.handle_authenticated(Ok(identity(EVERYTHING, me, Some(100_000))), NOW);
    let connected = sent(&drain(&mut session));
    assert_eq!(
        (&connected["action"], &connected["connectionId"]),
        (&json!(4), &json!("conn1"))
    );
    assert_eq!(connected["connectionDetails"]["connectionKey"], "conn1!key");
    assert_eq!(session.next_deadline(), Some(NOW + 70_000));
    // Asked by nobody: nothing.
    session.handle_authenticated(Err(ErrorCode::InvalidCredentials.into()), NOW);
    assert_eq!(drain(&mut session), []);
}

#[test]
fn of_two_tokens_the_newer_counts() {
    let mut session = with_token(EVERYTHING, 60_000);
    checks(&offer(&mut session, "token-a"), "token-a");
    assert_eq!(offer(&mut session, "token-b"), []);
    assert_eq!(offer(&mut session, "token-c"), []);
    session.handle_authenticated(Err(ErrorCode::InvalidCredentials.into()), NOW);
    checks(&drain(&mut session), "token-c");
    let me = ClientId::Exactly("me".into());
    session.handle_authenticated(Ok(identity(EVERYTHING, me, None)), NOW);
    assert_eq!(sent(&drain(&mut session))["action"], 4);
}

#[test]
fn who_is_not_believed_is_refused_without_a_loop() {
    for (error, action, code) in [
        (ErrorCode::InvalidCredentials, 9, 40101),
        (ErrorCode::TokenUnrecognized, 9, 40101),
        (ErrorCode::TokenExpired, 9, 40101),
        (ErrorCode::NoLeader, 6, 50320),
    ] {
        let mut session = with_token(EVERYTHING, 60_000);
        offer(&mut session, "t");
        session.handle_authenticated(Err(ErrorInfo::from(error)), NOW);
        sent_and_closed(&drain(&mut session), action, code);
    }
    for empty in [
        json!({"action": 17}),
        json!({"action": 17, "auth": {"accessToken": ""}}),
    ] {
        sent_and_closed(&send(&mut with_token(EVERYTHING, 60_000), empty), 9, 40101);
    }
}

#[test]
fn a_connection_stays_the_same_client() {
    let exactly = |id: &str| ClientId::Exactly(id.into());
    // (who it was, who the token says, who it is)
    let table = [
        (exactly("me"), exactly("me"), Some(exactly("me"))),
        (exactly("me"), ClientId::Any, Some(exactly("me"))),
        (exactly("me"), exactly("you"), None),
        (exactly("me"), ClientId::Anonymous, None),
        (ClientId::Any, exactly("me"), Some(exactly("me"))),
        (ClientId::Anonymous, exactly("me"), Some(exactly("me"))),
        (
            ClientId::Anonymous,
            ClientId::Anonymous,
            Some(ClientId::Anonymous),
        ),
    ];
    for (former, new, expected) in table {
        let mut opening = opening(EVERYTHING, "*");
        opening.identity.client_id = former.clone();
        let mut session = Session::new(opening, NOW);
        let connected = sent(&drain(&mut session));
        let told = connected["connectionDetails"].get("clientId");
        assert_eq!(told.is_none(), former == ClientId::Anonymous);
        offer(&mut session, "t");
        session.handle_authenticated(Ok(identity(EVERYTHING, new, None)), NOW);
        let effects = drain(&mut session);
        match expected {
            Some(id) => {
                sent(&effects);
                assert_eq!(session.identity().client_id, id);
            }
            None => drop(sent_and_closed(&effects, 9, 40102)),
        }
    }
    let mut session = with_token(EVERYTHING, 60_000);
    offer(&mut session, "t");
    let mut other = identity(EVERYTHING, exactly("me"), None);
    other.app = "other".parse().unwrap();
    session.handle_authenticated(Ok(other), NOW);
    sent_and_closed(&drain(&mut session), 9, 40102);
}

#[test]
fn a_smaller_capability_takes_modes_and_a_larger_one_gives_them_back() {
    let mut session = session_with(EVERYTHING, "me");
    attach(&mut session, "c");
    let subscriber = flags::SUBSCRIBE | flags::PRESENCE_SUBSCRIBE;
    let frames = renew(&mut session, SUBSCRIBER);
    assert_eq!(frames.len(), 2, "{frames:?}");
    assert_eq!(
        (&frames[0]["action"], &frames[1]["action"]),
        (&json!(4), &json!(11))
    );
    assert_eq!(frames[1]["flags"], subscriber | flags::RESUMED);
    let nack = sent(&send(
        &mut session,
        json!({"action": 15, "channel": "c", "msgSerial": 0, "messages": [{}]}),
    ));
    assert_eq!(nack["error"]["code"], 40160);
    // Nothing changes: nothing is told.
    assert_eq!(renew(&mut session, SUBSCRIBER).len(), 1);
    let frames = renew(&mut session, EVERYTHING);
    assert_eq!(frames[1]["flags"], ALL_MODES | flags::RESUMED);
    publish(&mut session, 1, 1);
    // Nothing is left: the channel has failed, the connection has not.
    let frames = renew(&mut session, r#"{"other":["subscribe"]}"#);
    assert_eq!(
        (&frames[1]["action"], &frames[1]["channel"]),
        (&json!(9), &json!("c"))
    );
    assert_eq!(frames[1]["error"]["code"], 40160);
    assert_eq!(session.delivery(&name("c")), None);
    session.handle_detached(&name("c"), NOW);
    assert_eq!(drain(&mut session), []);
    assert!(!session.is_closed());
}

#[test]
fn a_capability_changes_attachments_that_are_on_their_way() {
    // While attaching: what was asked for comes into force in a second step.
    let mut session = session_with(SUBSCRIBER, "me");
    send(&mut session, json!({"action": 10, "channel": "c"}));
    renew(&mut session, EVERYTHING);
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    let effects = drain(&mut session);
    let [Effect::Send(_), again] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(*again, attach_effect("c", None, ALL_MODES, true));
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    assert_eq!(
        sent(&drain(&mut session))["flags"],
        ALL_MODES | flags::RESUMED
    );

    // While attaching, and nothing is left.
    let mut session = session_with(SUBSCRIBER, "me");
    send(&mut session, json!({"action": 10, "channel": "c"}));
    let frames = renew(&mut session, r#"{"other":["subscribe"]}"#);
    assert_eq!(frames[1]["error"]["code"], 40160);
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    assert_eq!(drain(&mut session), [Effect::Detach { channel: name("c") }]);
    session.handle_detached(&name("c"), NOW);
    assert_eq!(drain(&mut session), []);

    // What waits behind a detach is judged by the new capability too.
    let mut session = session_with(EVERYTHING, "me");
    attach(&mut session, "c");
    send(&mut session, json!({"action": 12, "channel": "c"}));
    send(
        &mut session,
        json!({"action": 10, "channel": "c", "flags": flags::PUBLISH}),
    );
    let frames = renew(&mut session, SUBSCRIBER);
    assert_eq!(
        (&frames[1]["action"], &frames[1]["error"]["code"]),
        (&json!(9), &json!(40160))
    );
    session.handle_detached(&name("c"), NOW);
    assert_eq!(drain(&mut session), []);
}

#[test]
fn a_revoked_token_ends_the_conversation_at_once_or_after_a_while() {
    let mut session = with_token(EVERYTHING, 3_600_000);
    session.handle_revoked(NOW);
    sent_and_closed(&drain(&mut session), 6, 40141);

    let mut session = with_token(EVERYTHING, 3_600_000);
    session.handle_revocation_at(NOW + 30_000, NOW);
    assert_eq!(sent(&drain(&mut session)), json!({"action": 17}));
    assert_eq!(session.next_deadline(), Some(NOW + 30_000));
    session.handle_tick(NOW + 30_000);
    sent_and_closed(&drain(&mut session), 6, 40141);

    let mut session = with_token(EVERYTHING, 3_600_000);
    session.handle_revocation_at(NOW + 30_000, NOW);
    drain(&mut session);
    assert_eq!(renew(&mut session, EVERYTHING).len(), 1);
    assert_eq!(
        session.next_deadline(),
        None,
        "a new credential is not the revoked one"
    );

    // The client answers with the token that is to be revoked: it is not asked again, and ends in time.
    session.handle_revocation_at(NOW + 30_000, NOW);
    assert_eq!(drain(&mut session), []);
    session.handle_tick(NOW + 30_000);
    sent_and_closed(&drain(&mut session), 6, 40141);
}

#[test]
fn a_connection_that_was_taken_over_ends_without_a_word() {
    let mut session = session_with(EVERYTHING, "me");
    attach(&mut session, "c");
    session.handle_taken_over(NOW);
    assert_eq!(drain(&mut session), [Effect::Close { code: 1000 }]);
    assert_eq!(session.handle_gone(NOW), []);
}

#[test]
fn a_resumed_session_is_the_same_connection() {
    let opening = Opening {
        resumed: true,
        ..opening(EVERYTHING, "me")
    };
    let mut session = Session::new(opening, NOW);
    let connected = sent(&drain(&mut session));
    assert_eq!(connected["connectionId"], "conn1");
    assert!(connected.get("error").is_none());
    assert_eq!(
        as_json(&crate::session::refusal(&ErrorCode::TokenExpired.into()))["error"]["code"],
        40142
    );
}
