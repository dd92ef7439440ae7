//! Effects out for frames in, rule by rule; and that no sequence of inputs breaks the promises.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::auth::{Capability, ClientId};
use crate::wire::ably::{Data, Format, decode, encode};

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
            client_id: ClientId::of_key(Some(client_id)).unwrap(),
            capability: Arc::new(Capability::parse(capability).unwrap()),
        },
        limits: Limits {
            max_channels: 3,
            max_inflight_publishes: 4,
            ..Limits::default()
        },
        connection_id: "conn1".into(),
        connection_key: "conn1!key".into(),
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
    }
}

fn attach_effect(channel: &str, from: Option<Serial>, subscribe: bool, in_place: bool) -> Effect {
    Effect::Attach {
        channel: name(channel),
        from,
        echo: true,
        subscribe,
        in_place,
    }
}

/// Attaches a channel with default modes at serial 5.
fn attach(session: &mut Session, channel: &str) {
    let effects = send(session, json!({"action": 10, "channel": channel}));
    assert_eq!(effects, [attach_effect(channel, None, true, false)]);
    session.handle_attached(&name(channel), at(5, Continuity::Fresh), NOW);
    assert_eq!(sent(&drain(session))["action"], 11);
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
fn an_attachment_gets_the_modes_that_are_asked_and_allowed() {
    let (p, s, pr, ps) = (
        flags::PUBLISH,
        flags::SUBSCRIBE,
        flags::PRESENCE,
        flags::PRESENCE_SUBSCRIBE,
    );
    // (capability, ATTACH's flags, ATTACH's params.modes, granted)
    let table = [
        (EVERYTHING, None, None, p | s | pr | ps),
        (EVERYTHING, Some(s | flags::ATTACH_RESUME), None, s),
        (EVERYTHING, Some(s), Some("publish, PRESENCE"), p | pr),
        (EVERYTHING, Some(p | flags::OBJECT_SUBSCRIBE), None, p),
        (r#"{"*":["subscribe"]}"#, None, None, s | ps),
        (
            r#"{"*":["publish"],"c":["subscribe"]}"#,
            Some(p | s),
            None,
            p | s,
        ),
        (
            r#"{"x":["publish"],"*":["subscribe"]}"#,
            Some(p | s),
            None,
            s,
        ),
    ];
    for (capability, flags, modes, granted) in table {
        let mut session = session_with(capability, "*");
        let mut attach = json!({"action": 10, "channel": "c"});
        if let Some(flags) = flags {
            attach["flags"] = json!(flags);
        }
        if let Some(modes) = modes {
            attach["params"] = json!({"modes": modes, "rewind": "1"});
        }
        let effects = send(&mut session, attach);
        assert_eq!(effects, [attach_effect("c", None, granted & s != 0, false)]);
        session.handle_attached(&name("c"), at(5, Continuity::Fresh), NOW);
        let attached = sent(&drain(&mut session));
        assert_eq!(attached["flags"], granted, "{capability}");
        assert_eq!(attached["channelSerial"], serial(5).to_string());
        // Params that are not understood are not echoed.
        let echoed = modes.map(|_| json!({"modes": "publish,presence"}));
        assert_eq!(attached.get("params"), echoed.as_ref());
    }
}

#[test]
fn attaches_are_refused_in_the_order_of_the_rules() {
    let refused = |capability: &str, attach: Value| {
        let mut session = session_with(capability, "*");
        let error = sent(&send(&mut session, attach.clone()));
        assert_eq!(
            (&error["action"], &error["channel"]),
            (&json!(9), &attach["channel"])
        );
        // The channel has failed, not the connection.
        assert!(!session.is_closed());
        (
            error["error"]["code"].as_u64().unwrap(),
            error["error"]["message"].to_string(),
        )
    };
    let nothing = r#"{"other":["publish"]}"#;
    for bad in ["", ":a", " a", "a\nb", "[meta]log"] {
        assert_eq!(
            refused(
                nothing,
                json!({"action": 10, "channel": bad, "params": {"modes": "?"}})
            )
            .0,
            40010
        );
    }
    let qualified = refused(EVERYTHING, json!({"action": 10, "channel": "[?rewind=1]c"}));
    assert!(
        qualified.0 == 40010 && qualified.1.contains("not supported"),
        "{qualified:?}"
    );
    assert_eq!(
        refused(
            nothing,
            json!({"action": 10, "channel": "c", "params": {"modes": "fly"}})
        )
        .0,
        40003
    );
    assert_eq!(
        refused(nothing, json!({"action": 10, "channel": "c"})).0,
        40160
    );
    let subscriber = r#"{"*":["subscribe"]}"#;
    assert_eq!(
        refused(
            subscriber,
            json!({"action": 10, "channel": "c", "flags": flags::PUBLISH})
        )
        .0,
        40160
    );
    sent_and_closed(&send(&mut session(), json!({"action": 10})), 9, 40000);
}

#[test]
fn a_connection_has_so_many_channels_and_no_more() {
    let mut session = session();
    for channel in ["a", "b", "c"] {
        attach(&mut session, channel);
    }
    let error = sent(&send(&mut session, json!({"action": 10, "channel": "d"})));
    assert_eq!(
        (&error["channel"], &error["error"]["code"]),
        (&json!("d"), &json!(90010))
    );
    send(&mut session, json!({"action": 12, "channel": "a"}));
    session.handle_detached(&name("a"), NOW);
    drain(&mut session);
    attach(&mut session, "d");
}

#[test]
fn a_serial_is_continued_from_or_the_loss_is_told() {
    let all = 983_040;
    // (serial sent, outcome, flags besides modes, error)
    let table = [
        (
            Some(serial(3).to_string()),
            Some(serial(3)),
            Continuity::Resumed { backlog: true },
            4 | 2,
            None,
        ),
        (
            Some(serial(3).to_string()),
            Some(serial(3)),
            Continuity::Resumed { backlog: false },
            4,
            None,
        ),
        (
            Some(serial(3).to_string()),
            Some(serial(3)),
            Continuity::Lost,
            0,
            Some(90003),
        ),
        (
            Some("01795309503102-000@s1".into()),
            None,
            Continuity::Fresh,
            0,
            Some(90003),
        ),
        (Some(String::new()), None, Continuity::Fresh, 0, None),
        (None, None, Continuity::Fresh, 0, None),
    ];
    for (text, from, continuity, extra, error) in table {
        let mut session = session();
        let mut attach = json!({"action": 10, "channel": "c"});
        if let Some(text) = &text {
            attach["channelSerial"] = json!(text);
        }
        assert_eq!(
            send(&mut session, attach),
            [attach_effect("c", from, true, false)]
        );
        session.handle_attached(&name("c"), at(8, continuity), NOW);
        let attached = sent(&drain(&mut session));
        assert_eq!(attached["flags"], all | extra, "{text:?} {continuity:?}");
        assert_eq!(attached["channelSerial"], serial(8).to_string());
        assert_eq!(
            attached.get("error").map(|e| e["code"].as_u64().unwrap()),
            error,
            "{text:?}"
        );
    }
}

#[test]
fn attaching_again_changes_modes_in_place() {
    let mut session = session();
    attach(&mut session, "c");
    let again = json!({"action": 10, "channel": "c", "flags": flags::PUBLISH, "channelSerial": serial(4).to_string()});
    assert_eq!(
        send(&mut session, again),
        [attach_effect("c", None, false, true)]
    );
    session.handle_attached(
        &name("c"),
        at(9, Continuity::Resumed { backlog: false }),
        NOW,
    );
    let attached = sent(&drain(&mut session));
    assert_eq!(attached["flags"], flags::PUBLISH | flags::RESUMED);
    assert_eq!(attached["channelSerial"], serial(9).to_string());
}

#[test]
fn attaching_again_in_vain_ends_the_attachment() {
    let mut session = session_with(r#"{"c":["subscribe"]}"#, "*");
    attach(&mut session, "c");
    let effects = send(
        &mut session,
        json!({"action": 10, "channel": "c", "flags": flags::PUBLISH}),
    );
    let [Effect::Detach { .. }, Effect::Send(error)] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(as_json(error)["error"]["code"], 40160);
    session.handle_detached(&name("c"), NOW);
    assert_eq!(drain(&mut session), [], "the client waits for no DETACHED");
    attach(&mut session, "c");
}

#[test]
fn detaching_always_ends_in_detached() {
    let mut session = session();
    let detached = json!({"action": 13, "channel": "c"});
    let detach = json!({"action": 12, "channel": "c"});
    assert_eq!(sent(&send(&mut session, detach.clone())), detached);
    assert_eq!(
        sent(&send(&mut session, json!({"action": 12, "channel": "[x"})))["channel"],
        "[x"
    );
    attach(&mut session, "c");
    assert_eq!(
        send(&mut session, detach.clone()),
        [Effect::Detach { channel: name("c") }]
    );
    assert_eq!(
        send(&mut session, detach.clone()),
        [],
        "one detach is under way"
    );
    session.handle_detached(&name("c"), NOW);
    assert_eq!(sent(&drain(&mut session)), detached);
    sent_and_closed(&send(&mut session, json!({"action": 12})), 9, 40000);
}

#[test]
fn requests_wait_for_the_one_under_way_and_the_newest_counts() {
    let mut session = session();
    let (attach_frame, detach_frame) = (
        json!({"action": 10, "channel": "c"}),
        json!({"action": 12, "channel": "c"}),
    );
    let detach = Effect::Detach { channel: name("c") };
    // DETACH while attaching: never ATTACHED after it.
    send(&mut session, attach_frame.clone());
    assert_eq!(send(&mut session, detach_frame.clone()), []);
    session.handle_attached(&name("c"), at(5, Continuity::Fresh), NOW);
    assert_eq!(drain(&mut session), [detach.clone()]);
    // ATTACH while detaching: no DETACHED after it.
    let late = json!({"action": 10, "channel": "c", "channelSerial": serial(3).to_string()});
    assert_eq!(send(&mut session, late), []);
    session.handle_detached(&name("c"), NOW);
    assert_eq!(
        drain(&mut session),
        [attach_effect("c", Some(serial(3)), true, false)]
    );
    // DETACH and ATTACH while attaching: both are done, the last is answered.
    assert_eq!(send(&mut session, detach_frame), []);
    assert_eq!(send(&mut session, attach_frame.clone()), []);
    session.handle_attached(&name("c"), at(5, Continuity::Fresh), NOW);
    assert_eq!(drain(&mut session), [detach]);
    session.handle_detached(&name("c"), NOW);
    assert_eq!(drain(&mut session), [attach_effect("c", None, true, false)]);
    // ATTACH while attaching: both are answered.
    assert_eq!(send(&mut session, attach_frame), []);
    session.handle_attached(&name("c"), at(6, Continuity::Fresh), NOW);
    let effects = drain(&mut session);
    assert_eq!(effects[1], attach_effect("c", None, true, true));
    session.handle_attached(
        &name("c"),
        at(6, Continuity::Resumed { backlog: false }),
        NOW,
    );
    assert_eq!(
        sent(&drain(&mut session))["flags"],
        983_040 | flags::RESUMED
    );
}

#[test]
fn a_channel_that_cannot_be_followed_is_retried_or_failed() {
    for (code, action) in [
        (ErrorCode::NoLeader, 13),
        (ErrorCode::Timeout, 13),
        (ErrorCode::TooManyChannels, 9),
    ] {
        for live in [false, true] {
            let mut session = session();
            send(&mut session, json!({"action": 10, "channel": "c"}));
            if live {
                session.handle_attached(&name("c"), at(5, Continuity::Fresh), NOW);
                drain(&mut session);
            }
            session.handle_attachment_failed(&name("c"), &code.into(), NOW);
            let told = sent(&drain(&mut session));
            assert_eq!(
                (&told["action"], &told["channel"]),
                (&json!(action), &json!("c"))
            );
            assert_eq!(told["error"]["code"], code.code());
            attach(&mut session, "c");
        }
    }
    // The client gave up meanwhile: it gets what it waits for.
    let mut session = session();
    send(&mut session, json!({"action": 10, "channel": "c"}));
    send(&mut session, json!({"action": 12, "channel": "c"}));
    session.handle_attachment_failed(&name("c"), &ErrorCode::NoLeader.into(), NOW);
    assert_eq!(
        sent(&drain(&mut session)),
        json!({"action": 13, "channel": "c"})
    );
    // Lost by the owner without a word: the client attaches again by itself.
    attach(&mut session, "c");
    session.handle_detached(&name("c"), NOW);
    assert_eq!(
        sent(&drain(&mut session)),
        json!({"action": 13, "channel": "c"})
    );
}

#[test]
fn a_gap_is_told_where_the_client_believes_there_is_none() {
    let mut session = session();
    let lost = ErrorInfo::from(ErrorCode::ContinuityLost);
    session.handle_discontinuity(&name("c"), serial(50), &lost, NOW);
    assert_eq!(drain(&mut session), []);
    attach(&mut session, "c");
    session.handle_discontinuity(&name("c"), serial(50), &lost, NOW);
    let attached = sent(&drain(&mut session));
    assert_eq!(
        (&attached["action"], &attached["flags"]),
        (&json!(11), &json!(983_040))
    );
    assert_eq!(attached["channelSerial"], serial(50).to_string());
    assert_eq!(attached["error"]["code"], 90003);
}

#[track_caller]
fn published(effects: &[Effect]) -> (Ticket, String, Vec<Message>) {
    match effects {
        [
            Effect::Publish {
                ticket,
                id,
                messages,
                ..
            },
        ] => (*ticket, id.clone(), messages.clone()),
        other => panic!("not one publish: {other:?}"),
    }
}

#[test]
fn a_publish_needs_no_attachment_and_is_recognisable() {
    let mut session = session_with(EVERYTHING, "me");
    let publish = json!({"action": 15, "channel": "c", "msgSerial": 3, "messages": [
        {"name": "bin", "data": "AQID", "encoding": "base64", "size": 6, "action": 0}
    ]});
    let (_, id, messages) = published(&send(&mut session, publish));
    assert_eq!(id, "conn1:3");
    let expected = Message {
        name: Some("bin".into()),
        data: Some(Data::Binary(Bytes::from_static(&[1, 2, 3]))),
        client_id: Some("me".into()),
        ..Message::default()
    };
    assert_eq!(messages, [expected]);
    let own = json!({"action": 15, "channel": "c", "msgSerial": 4, "messages": [{"id": "x:0"}, {"id": "x:1"}]});
    let (_, id, messages) = published(&send(&mut session, own));
    assert_eq!((id.as_str(), messages[1].id.as_deref()), ("x", Some("x:1")));
}

#[test]
fn a_publish_that_breaks_a_rule_is_refused() {
    let capability = r#"{"c":["publish","subscribe"],"sub":["subscribe"]}"#;
    let big = "x".repeat(65_537);
    let table = [
        (40010, json!({"channel": ":c", "messages": [{}]})),
        (40010, json!({"channel": "[?rewind=1]c", "messages": [{}]})),
        (40010, json!({"messages": [{}]})),
        (40160, json!({"channel": "sub", "messages": [{}]})),
        (40160, json!({"channel": "nothing", "messages": [{}]})),
        (40030, json!({"channel": "c", "messages": []})),
        (
            40030,
            json!({"channel": "c", "messages": [{"action": 1, "serial": "s"}]}),
        ),
        (40009, json!({"channel": "c", "messages": [{"data": big}]})),
        (
            40012,
            json!({"channel": "c", "messages": [{"clientId": "you"}]}),
        ),
        (
            40012,
            json!({"channel": "c", "messages": [{"clientId": "*"}]}),
        ),
        (
            40013,
            json!({"channel": "c", "messages": [{"data": "*", "encoding": "base64"}]}),
        ),
        (
            40031,
            json!({"channel": "c", "messages": [{"id": "a:0"}, {"id": "b:1"}]}),
        ),
        (
            40034,
            json!({"channel": "c", "messages": vec![json!({}); 1001]}),
        ),
        (
            40006,
            json!({"channel": "c", "messages": [{"connectionKey": "k"}]}),
        ),
        (
            40099,
            json!({"channel": "c", "messages": [{}], "params": {"_forceNack": true}}),
        ),
    ];
    let mut session = session_with(capability, "me");
    for (msg_serial, (code, mut publish)) in (0_u64..).zip(table) {
        publish["action"] = json!(15);
        publish["msgSerial"] = json!(msg_serial);
        let nack = sent(&send(&mut session, publish));
        assert_eq!(
            (&nack["action"], &nack["msgSerial"], &nack["count"]),
            (&json!(2), &json!(msg_serial), &json!(1))
        );
        assert_eq!(nack["error"]["code"], code, "{nack}");
    }
    sent_and_closed(
        &send(
            &mut session,
            json!({"action": 15, "channel": "c", "messages": [{}]}),
        ),
        9,
        40000,
    );
}

#[test]
fn an_attachment_without_the_mode_does_not_publish() {
    let mut session = session();
    send(
        &mut session,
        json!({"action": 10, "channel": "c", "flags": flags::SUBSCRIBE}),
    );
    session.handle_attached(&name("c"), at(5, Continuity::Fresh), NOW);
    drain(&mut session);
    let nack = sent(&send(
        &mut session,
        json!({"action": 15, "channel": "c", "msgSerial": 0, "messages": [{}]}),
    ));
    assert_eq!(nack["error"]["code"], 40165);
    published(&send(
        &mut session,
        json!({"action": 15, "channel": "other", "msgSerial": 1, "messages": [{}]}),
    ));
}

#[test]
fn what_is_not_supported_yet_is_refused_in_its_turn() {
    let mut session = session();
    for (msg_serial, (action, code)) in (0_u64..).zip([(14, 91000), (19, 40000), (21, 40000)]) {
        let nack = sent(&send(
            &mut session,
            json!({"action": action, "channel": "c", "msgSerial": msg_serial}),
        ));
        assert_eq!(
            (&nack["action"], &nack["error"]["code"]),
            (&json!(2), &json!(code))
        );
    }
    let auth = send(
        &mut session,
        json!({"action": 17, "auth": {"accessToken": "t"}}),
    );
    assert!(sent_and_closed(&auth, 9, 40101).contains("not supported"));
}

fn publish(session: &mut Session, msg_serial: u64, messages: usize) -> Ticket {
    let messages = vec![json!({}); messages];
    let frame =
        json!({"action": 15, "channel": "c", "msgSerial": msg_serial, "messages": messages});
    published(&send(session, frame)).0
}

#[test]
fn answers_keep_the_clients_order() {
    let mut session = session();
    let tickets: Vec<Ticket> = (7..11)
        .map(|n| publish(&mut session, n, usize::try_from(n - 6).unwrap()))
        .collect();
    session.handle_published(tickets[1], Ok(serial(2)), NOW);
    session.handle_published(tickets[2], Err(ErrorCode::Busy.into()), NOW);
    session.handle_published(tickets[3], Ok(serial(4)), NOW);
    assert_eq!(drain(&mut session), [], "7 has no answer yet");
    session.handle_published(tickets[0], Ok(serial(9)), NOW);
    let answers: Vec<Value> = drain(&mut session)
        .iter()
        .map(|effect| sent(std::slice::from_ref(effect)))
        .collect();
    let text = |index, offset| serial(index).message(offset).to_string();
    assert_eq!(
        answers[0],
        json!({"action": 1, "msgSerial": 7, "count": 2, "res": [
            {"serials": [text(9, 0)]}, {"serials": [text(2, 0), text(2, 1)]}
        ]})
    );
    assert_eq!(
        (&answers[1]["action"], &answers[1]["msgSerial"]),
        (&json!(2), &json!(9))
    );
    assert_eq!(answers[1]["error"]["code"], 50004);
    assert_eq!(
        (
            &answers[2]["action"],
            &answers[2]["msgSerial"],
            &answers[2]["count"]
        ),
        (&json!(1), &json!(10), &json!(1))
    );
    // Twice told, or never asked: nothing.
    session.handle_published(tickets[0], Ok(serial(9)), NOW);
    assert_eq!(drain(&mut session), []);
}

#[test]
fn a_refusal_waits_for_the_publishes_before_it() {
    let mut session = session();
    let first = publish(&mut session, 0, 1);
    assert_eq!(
        send(
            &mut session,
            json!({"action": 14, "channel": "c", "msgSerial": 1})
        ),
        []
    );
    session.handle_published(first, Ok(serial(1)), NOW);
    let actions: Vec<i64> = drain(&mut session)
        .iter()
        .map(|effect| {
            sent(std::slice::from_ref(effect))["action"]
                .as_i64()
                .unwrap()
        })
        .collect();
    assert_eq!(actions, [1, 2]);
}

#[test]
fn a_repeated_number_is_answered_once() {
    let mut session = session();
    let ticket = publish(&mut session, 5, 1);
    for msg_serial in [5, 4, 0] {
        let again =
            json!({"action": 15, "channel": "c", "msgSerial": msg_serial, "messages": [{}]});
        assert_eq!(send(&mut session, again), []);
    }
    session.handle_published(ticket, Ok(serial(1)), NOW);
    assert_eq!(sent(&drain(&mut session))["count"], 1);
}

#[test]
fn an_ack_holds_a_bounded_number_of_serials() {
    let mut session = session();
    let tickets: Vec<Ticket> = (0..3).map(|n| publish(&mut session, n, 600)).collect();
    for ticket in tickets.iter().rev() {
        session.handle_published(*ticket, Ok(serial(1)), NOW);
    }
    let counts: Vec<Value> = drain(&mut session)
        .iter()
        .map(|effect| sent(std::slice::from_ref(effect))["count"].clone())
        .collect();
    assert_eq!(counts, [1, 1, 1]);
}

#[test]
fn too_many_unanswered_publishes_are_refused_and_remembered_as_one() {
    let mut session = session();
    let tickets: Vec<Ticket> = (0..4).map(|n| publish(&mut session, n, 1)).collect();
    for msg_serial in 4..1000 {
        let more = json!({"action": 15, "channel": "c", "msgSerial": msg_serial, "messages": [{}]});
        assert_eq!(send(&mut session, more), []);
    }
    for ticket in tickets {
        session.handle_published(ticket, Ok(serial(1)), NOW);
    }
    let effects = drain(&mut session);
    let nack = sent(&effects[4..]);
    assert_eq!(
        (&nack["action"], &nack["msgSerial"], &nack["count"]),
        (&json!(2), &json!(4), &json!(996))
    );
    assert_eq!(nack["error"]["code"], 42911);
    publish(&mut session, 1000, 1);
}

#[test]
fn a_client_that_floods_with_gaps_is_ended() {
    let mut session = session();
    for n in 0..4 {
        publish(&mut session, n, 1);
    }
    let effects: Vec<Effect> = (0..100)
        .flat_map(|n| {
            send(
                &mut session,
                json!({"action": 14, "channel": "c", "msgSerial": 10 + 2 * n}),
            )
        })
        .collect();
    sent_and_closed(&effects, 9, 42921);
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

/// One input of a random conversation; numbers choose among what is under way.
#[derive(Clone, Debug)]
enum Input {
    Frame(Frame),
    Published(prop::sample::Index, bool),
    Attached(u8, Continuity),
    Failed(u8, bool),
    Detached(u8),
    Discontinuity(u8),
    Tick(u64),
    Undecodable,
    Drain,
}

fn input() -> impl Strategy<Value = Input> {
    let action = prop_oneof![
        8 => Just(15_i64), 4 => Just(10), 4 => Just(12), 2 => Just(14), 1 => 0..23_i64, 1 => any::<i64>()
    ];
    let channel = prop_oneof![
        8 => "[a-e]".prop_map(Some), 1 => Just(None), 1 => "\\PC{0,3}".prop_map(Some)
    ];
    let step = prop_oneof![8 => Just(1_u64), 1 => 0..4_u64, 1 => any::<u64>()];
    // Mostly plain messages: the others take long to make up.
    let message =
        prop_oneof![9 => Just(Message::default()), 1 => crate::wire::ably::tests::message()];
    let frame_parts = (
        action,
        channel,
        step,
        any::<u64>(),
        vec(message, 0..3),
        "[0-9a-f-]{0,26}",
    );
    let frame =
        frame_parts.prop_map(
            |(action, channel, msg_serial, flags, messages, serial)| Frame {
                channel,
                msg_serial: Some(msg_serial),
                flags: Some(flags & 0xffff_ffff),
                messages,
                channel_serial: Some(serial),
                ..Frame::new(Action::from_number(action))
            },
        );
    let continuity = prop_oneof![
        Just(Continuity::Fresh),
        Just(Continuity::Lost),
        any::<bool>().prop_map(|backlog| Continuity::Resumed { backlog })
    ];
    prop_oneof![
        20 => frame.prop_map(Input::Frame),
        8 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(n, ok)| Input::Published(n, ok)),
        4 => (0..5_u8, continuity).prop_map(|(n, c)| Input::Attached(n, c)),
        1 => (0..5_u8, any::<bool>()).prop_map(|(n, ok)| Input::Failed(n, ok)),
        4 => (0..5_u8).prop_map(Input::Detached),
        1 => (0..5_u8).prop_map(Input::Discontinuity),
        1 => (0..40_000_u64).prop_map(Input::Tick),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Attach,
    Detach,
}

/// What a client and the owner of a session may rely on, followed along a random conversation.
#[derive(Default)]
struct Model {
    /// Numbered frames without an answer.
    unanswered: BTreeSet<u64>,
    newest: Option<u64>,
    tickets: Vec<Ticket>,
    under_way: BTreeMap<ChannelName, Request>,
    followed: BTreeSet<ChannelName>,
    closed: bool,
}

impl Model {
    /// Frames count up from the last one, so that most are new, some repeat and some leave gaps.
    fn number(&mut self, frame: &mut Frame) {
        let step = frame.msg_serial.unwrap_or_default();
        let number = self.newest.map_or(step % 3, |newest| {
            newest.saturating_add(step).max(1) - u64::from(step > 1)
        });
        frame.msg_serial = Some(number);
        let numbered = matches!(
            frame.action,
            Action::Message | Action::Presence | Action::Annotation | Action::Object
        );
        if numbered && self.newest.is_none_or(|newest| number > newest) {
            self.newest = Some(number);
            self.unanswered.insert(number);
        }
    }

    fn follow(&mut self, effects: Vec<Effect>) {
        assert!(effects.len() <= 64, "one input, many effects");
        for effect in effects {
            assert!(!self.closed, "an effect after Close");
            match effect {
                Effect::Send(frame) if matches!(frame.action, Action::Ack | Action::Nack) => {
                    self.answer(&frame)
                }
                Effect::Send(_) => {}
                Effect::Publish { ticket, .. } => self.tickets.push(ticket),
                Effect::Attach {
                    channel, in_place, ..
                } => {
                    assert_eq!(self.followed.contains(&channel), in_place, "{channel}");
                    assert!(
                        self.under_way.insert(channel, Request::Attach).is_none(),
                        "two requests at once"
                    );
                }
                Effect::Detach { channel } => {
                    assert!(self.followed.contains(&channel), "{channel}");
                    assert!(
                        self.under_way.insert(channel, Request::Detach).is_none(),
                        "two requests at once"
                    );
                }
                Effect::Close { .. } => self.closed = true,
            }
        }
    }

    /// The owner has nothing to do with the channel any more.
    fn ended(&mut self, channel: &ChannelName) {
        self.under_way.remove(channel);
        self.followed.remove(channel);
    }

    fn answer(&mut self, frame: &Frame) {
        let (first, count) = (frame.msg_serial.unwrap(), frame.count.unwrap());
        assert!(count > 0);
        if frame.action == Action::Ack {
            assert_eq!(u64::try_from(frame.res.len()), Ok(count));
        }
        for number in (0..count).map(|place| first + place) {
            assert_eq!(
                self.unanswered.pop_first(),
                Some(number),
                "answers out of order"
            );
        }
    }
}

fn apply(session: &mut Session, model: &mut Model, input: Input, now: &mut u64) {
    let channel = |n: u8| name(["a", "b", "c", "d", "e"][usize::from(n)]);
    match input {
        Input::Frame(mut frame) => {
            model.number(&mut frame);
            session.handle_frame(frame, *now);
        }
        Input::Published(index, ok) => {
            if model.tickets.is_empty() {
                return;
            }
            let ticket = model.tickets.swap_remove(index.index(model.tickets.len()));
            let outcome = if ok {
                Ok(serial(3))
            } else {
                Err(ErrorCode::Busy.into())
            };
            session.handle_published(ticket, outcome, *now);
        }
        Input::Attached(n, continuity) => {
            if model.under_way.get(&channel(n)) != Some(&Request::Attach) {
                return;
            }
            model.under_way.remove(&channel(n));
            model.followed.insert(channel(n));
            session.handle_attached(&channel(n), at(5, continuity), *now);
        }
        Input::Failed(n, later) => {
            model.ended(&channel(n));
            let code = if later {
                ErrorCode::NoLeader
            } else {
                ErrorCode::TooManyChannels
            };
            session.handle_attachment_failed(&channel(n), &code.into(), *now);
        }
        Input::Detached(n) => {
            model.ended(&channel(n));
            session.handle_detached(&channel(n), *now);
        }
        Input::Discontinuity(n) => {
            session.handle_discontinuity(
                &channel(n),
                serial(7),
                &ErrorCode::ContinuityLost.into(),
                *now,
            );
        }
        Input::Tick(ms) => {
            *now += ms;
            session.handle_tick(*now);
            assert!(
                session
                    .next_deadline()
                    .is_none_or(|deadline| deadline > *now)
            );
        }
        Input::Undecodable => {
            session.handle_undecodable(decode(Format::Json, b"").unwrap_err(), *now)
        }
        Input::Drain => session.handle_drain(*now),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_conversation_breaks_the_promises(
        inputs in vec(input(), 0..120),
        end in prop_oneof![Just(None), Just(Some(Input::Undecodable)), Just(Some(Input::Drain))],
    ) {
        let mut session = session();
        let mut model = Model::default();
        let mut now = NOW;
        for input in inputs {
            apply(&mut session, &mut model, input, &mut now);
            model.follow(drain(&mut session));
        }
        for ticket in std::mem::take(&mut model.tickets) {
            session.handle_published(ticket, Ok(serial(9)), now);
            model.follow(drain(&mut session));
        }
        prop_assert!(model.closed || model.unanswered.is_empty(), "never answered: {:?}", model.unanswered);
        if let Some(end) = end {
            apply(&mut session, &mut model, end, &mut now);
            model.follow(drain(&mut session));
            prop_assert!(session.is_closed());
        }
    }
    /// An owner that reports what it was never asked for confuses itself, but brings nothing down.
    #[test]
    fn a_confused_owner_panics_nothing(inputs in vec(input(), 0..120)) {
        let mut session = session();
        for (input, now) in inputs.into_iter().zip(NOW..) {
            match input {
                Input::Frame(frame) => session.handle_frame(frame, now),
                Input::Attached(n, continuity) => {
                    session.handle_attached(&name(&"abcde"[usize::from(n)..=usize::from(n)]), at(1, continuity), now);
                }
                other => apply(&mut session, &mut Model::default(), other, &mut { now }),
            }
            drop(drain(&mut session));
        }
    }
}
