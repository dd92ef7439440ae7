//! Effects out for frames in, rule by rule: here how conversations begin and end, and what other tests share.

mod attaching;
mod authenticating;
mod params;
mod presence;
mod publishing;
mod random;

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::auth::{Capability, ClientId};
use crate::wire::ably::{Format, Message, decode, encode, flags};

const NOW: u64 = 1_000_000;
const EVERYTHING: &str = r#"{"*":["*"]}"#;

fn opening(capability: &str, client_id: &str) -> Opening {
    Opening {
        params: ConnectParams {
            version: Some(6.0),
            ..ConnectParams::default()
        },
        identity: Identity {
            app: "app".parse().unwrap(),
            key_id: "key".into(),
            secret: Secret::new("secret"),
            client_id: ClientId::of_key(Some(client_id)).unwrap(),
            capability: Arc::new(Capability::parse(capability).unwrap()),
            token: None,
        },
        limits: Limits {
            max_channels: 3,
            max_inflight_publishes: 4,
            ..Limits::default()
        },
        connection_id: "conn1".into(),
        connection_key: "conn1!key".into(),
        resumed: false,
        resume_failed: None,
        node: NodeId(2),
    }
}

/// A session that has said CONNECTED.
fn session_with(capability: &str, client_id: &str) -> Session {
    let mut session = Session::new(opening(capability, client_id), NOW);
    assert_eq!(drain(&mut session).len(), 1);
    session
}

fn session() -> Session {
    session_with(EVERYTHING, "*")
}

fn drain(session: &mut Session) -> Vec<Effect> {
    std::iter::from_fn(|| session.poll_effect()).collect()
}

fn frame(value: &Value) -> Frame {
    decode(Format::Json, value.to_string().as_bytes()).unwrap()
}

fn send(session: &mut Session, value: Value) -> Vec<Effect> {
    session.handle_frame(frame(&value), NOW);
    drain(session)
}

fn as_json(frame: &Frame) -> Value {
    serde_json::from_slice(&encode(Format::Json, frame)).unwrap()
}

/// The one frame that these effects send, as JSON.
#[track_caller]
fn sent(effects: &[Effect]) -> Value {
    match effects {
        [Effect::Send(frame)] => as_json(frame),
        other => panic!("not one frame: {other:?}"),
    }
}

/// Asserts a frame with this action and error code and then the end; gives the error's text.
#[track_caller]
fn sent_and_closed(effects: &[Effect], action: i64, code: u64) -> String {
    let [Effect::Send(frame), Effect::Close { .. }] = effects else {
        panic!("{effects:?}")
    };
    let frame = as_json(frame);
    assert_eq!(frame["action"], action);
    assert_eq!(frame["error"]["code"], code, "{frame}");
    assert!(
        frame.get("channel").is_none(),
        "a connection's error must name no channel"
    );
    frame["error"]["message"].as_str().unwrap().to_owned()
}

fn name(text: &str) -> ChannelName {
    ChannelName::parse(text).unwrap()
}

const fn serial(index: u64) -> Serial {
    Serial {
        incarnation: 0,
        index,
        position: 0,
    }
}

fn at(index: u64, continuity: Continuity) -> AttachOutcome {
    AttachOutcome {
        at: serial(index),
        continuity,
        members: vec![],
    }
}

const FRESH: Continuity = Continuity::Fresh { backlog: false };

const ALL_MODES: u64 = 983_040;

fn attach_effect(channel: &str, from: Option<Serial>, modes: u64, in_place: bool) -> Effect {
    Effect::Attach {
        channel: name(channel),
        start: from.map_or(Start::Present, Start::After),
        echo: true,
        subscribe: modes & flags::SUBSCRIBE != 0,
        presence_subscribe: modes & flags::PRESENCE_SUBSCRIBE != 0,
        members: modes & (flags::PRESENCE | flags::PRESENCE_SUBSCRIBE) != 0,
        in_place,
    }
}

/// Attaches a channel with default modes at serial 5.
fn attach(session: &mut Session, channel: &str) {
    let effects = send(session, json!({"action": 10, "channel": channel}));
    assert_eq!(effects, [attach_effect(channel, None, ALL_MODES, false)]);
    session.handle_attached(&name(channel), at(5, FRESH), NOW);
    assert_eq!(sent(&drain(session))["action"], 11);
}

#[track_caller]
fn published(effects: &[Effect]) -> (Ticket, String, Vec<Message>) {
    match effects {
        [
            Effect::Publish {
                ticket,
                id,
                content: Content::Messages(messages),
                ..
            },
        ] => (*ticket, id.clone(), messages.clone()),
        other => panic!("not one publish: {other:?}"),
    }
}

fn publish(session: &mut Session, msg_serial: u64, messages: usize) -> Ticket {
    let messages = vec![json!({}); messages];
    let frame =
        json!({"action": 15, "channel": "c", "msgSerial": msg_serial, "messages": messages});
    published(&send(session, frame)).0
}

#[test]
fn a_conversation_begins_with_who_the_client_is() {
    let mut session = Session::new(opening(EVERYTHING, "me"), NOW);
    assert_eq!(
        sent(&drain(&mut session)),
        json!({"action": 4, "connectionId": "conn1", "connectionDetails": {
            "clientId": "me", "connectionKey": "conn1!key", "maxMessageSize": 65536, "maxFrameSize": 524_288,
            "connectionStateTtl": 120_000, "maxIdleInterval": 15_000, "serverId": "2",
        }})
    );
    let mut session = Session::new(
        Opening {
            resume_failed: Some(ErrorCode::ResumeImpossible.into()),
            ..opening(EVERYTHING, "*")
        },
        NOW,
    );
    let connected = sent(&drain(&mut session));
    assert_eq!(connected["connectionDetails"]["clientId"], "*");
    assert_eq!(connected["error"]["code"], 80018);
}

#[test]
fn old_versions_are_refused_in_band() {
    for version in [None, Some(1.2)] {
        let params = ConnectParams {
            version,
            ..ConnectParams::default()
        };
        let mut session = Session::new(
            Opening {
                params,
                ..opening(EVERYTHING, "*")
            },
            NOW,
        );
        sent_and_closed(&drain(&mut session), 9, 40017);
        assert!(session.is_closed());
        assert_eq!(send(&mut session, json!({"action": 0})), []);
    }
}

#[test]
fn heartbeats_are_echoed_and_sent_when_nothing_else_was() {
    let mut session = session();
    assert_eq!(
        sent(&send(&mut session, json!({"action": 0, "id": "7"}))),
        json!({"action": 0, "id": "7"})
    );
    let due = session.next_deadline().unwrap();
    assert!(NOW < due && due <= NOW + 15_000);
    session.handle_tick(due - 1);
    assert_eq!(drain(&mut session), []);
    session.handle_tick(due);
    assert_eq!(sent(&drain(&mut session)), json!({"action": 0}));
    assert!(session.next_deadline().unwrap() > due);
    session.handle_sent(due + 5);
    assert_eq!(session.next_deadline(), Some(due + 5 + (due - NOW)));
    let mut limits = opening(EVERYTHING, "*").limits;
    limits.idle_interval_ms = 0;
    let silent = Session::new(
        Opening {
            limits,
            ..opening(EVERYTHING, "*")
        },
        NOW,
    );
    assert_eq!(silent.next_deadline(), None);
}

#[test]
fn conversations_end_as_asked() {
    let mut ending = session();
    attach(&mut ending, "c");
    publish(&mut ending, 0, 1);
    let effects = send(&mut ending, json!({"action": 7}));
    assert_eq!(
        effects,
        [
            Effect::Send(Frame::new(Action::Closed)),
            Effect::Close { code: 1000 }
        ]
    );
    ending.handle_tick(NOW + 1_000_000);
    ending.handle_detached(&name("c"), NOW);
    ending.handle_drain(NOW);
    assert_eq!(drain(&mut ending), []);
    assert_eq!(ending.next_deadline(), None);

    assert_eq!(
        send(&mut session(), json!({"action": 5})),
        [Effect::Close { code: 1000 }]
    );

    let mut drained = session();
    drained.handle_drain(NOW);
    sent_and_closed(&drain(&mut drained), 6, 50310);
}

#[test]
fn frames_that_make_no_sense_end_the_conversation() {
    let unknown = send(&mut session(), json!({"action": 99}));
    assert!(sent_and_closed(&unknown, 9, 40000).contains("99"));
    sent_and_closed(&send(&mut session(), json!({})), 9, 40000);
    let mut garbled = session();
    garbled.handle_undecodable(decode(Format::Json, b"{").unwrap_err(), NOW);
    sent_and_closed(&drain(&mut garbled), 9, 40001);
}

#[test]
fn frames_that_only_servers_send_are_ignored() {
    for action in [1, 2, 3, 4, 6, 8, 9, 11, 13, 16, 18, 20] {
        assert_eq!(
            send(
                &mut session(),
                json!({"action": action, "channel": "c", "msgSerial": 0})
            ),
            [],
            "{action}"
        );
    }
}
