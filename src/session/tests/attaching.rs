//! Attaching and detaching: order of the checks, modes, continuity, requests that overtake each other.

use serde_json::{Value, json};

use crate::session::tests::{
    ALL_MODES, EVERYTHING, FRESH, NOW, as_json, at, attach, attach_effect, drain, name, send, sent,
    sent_and_closed, serial, session, session_with,
};
use crate::session::{Continuity, Effect};
use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::flags;

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
            attach["params"] = json!({"modes": modes, "what": "1"});
        }
        let effects = send(&mut session, attach);
        assert_eq!(effects, [attach_effect("c", None, granted, false)]);
        session.handle_attached(&name("c"), at(5, FRESH), NOW);
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
            FRESH,
            0,
            Some(90003),
        ),
        (Some(String::new()), None, FRESH, 0, None),
        (None, None, FRESH, 0, None),
    ];
    for (text, from, continuity, extra, error) in table {
        let mut session = session();
        let mut attach = json!({"action": 10, "channel": "c"});
        if let Some(text) = &text {
            attach["channelSerial"] = json!(text);
        }
        assert_eq!(
            send(&mut session, attach),
            [attach_effect("c", from, ALL_MODES, false)]
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
        [attach_effect("c", None, flags::PUBLISH, true)]
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
    assert_eq!(send(&mut session, detach), [], "one detach is under way");
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
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    assert_eq!(drain(&mut session), std::slice::from_ref(&detach));
    // ATTACH while detaching: no DETACHED after it.
    let late = json!({"action": 10, "channel": "c", "channelSerial": serial(3).to_string()});
    assert_eq!(send(&mut session, late), []);
    session.handle_detached(&name("c"), NOW);
    assert_eq!(
        drain(&mut session),
        [attach_effect("c", Some(serial(3)), ALL_MODES, false)]
    );
    // DETACH and ATTACH while attaching: both are done, the last is answered.
    assert_eq!(send(&mut session, detach_frame), []);
    assert_eq!(send(&mut session, attach_frame.clone()), []);
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    assert_eq!(drain(&mut session), [detach]);
    session.handle_detached(&name("c"), NOW);
    assert_eq!(
        drain(&mut session),
        [attach_effect("c", None, ALL_MODES, false)]
    );
    // ATTACH while attaching: both are answered.
    assert_eq!(send(&mut session, attach_frame), []);
    session.handle_attached(&name("c"), at(6, FRESH), NOW);
    let effects = drain(&mut session);
    assert_eq!(effects[1], attach_effect("c", None, ALL_MODES, true));
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
fn a_detach_takes_back_an_attach_that_waits() {
    let attach_frame = json!({"action": 10, "channel": "c"});
    let detach_frame = json!({"action": 12, "channel": "c"});
    let detached = json!({"action": 13, "channel": "c"});
    for attaching in [true, false] {
        let mut session = session();
        if attaching {
            send(&mut session, attach_frame.clone());
        } else {
            attach(&mut session, "c");
            send(&mut session, detach_frame.clone());
        }
        assert_eq!(send(&mut session, attach_frame.clone()), []);
        assert_eq!(send(&mut session, detach_frame.clone()), []);
        if attaching {
            session.handle_attached(&name("c"), at(5, FRESH), NOW);
            assert_eq!(drain(&mut session), [Effect::Detach { channel: name("c") }]);
        }
        session.handle_detached(&name("c"), NOW);
        assert_eq!(sent(&drain(&mut session)), detached);
    }
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
                session.handle_attached(&name("c"), at(5, FRESH), NOW);
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
    // It changed its mind twice: only the newest request is left to do.
    send(&mut session, json!({"action": 10, "channel": "c"}));
    send(&mut session, json!({"action": 12, "channel": "c"}));
    send(&mut session, json!({"action": 10, "channel": "c"}));
    session.handle_attachment_failed(&name("c"), &ErrorCode::NoLeader.into(), NOW);
    assert_eq!(
        drain(&mut session),
        [attach_effect("c", None, ALL_MODES, false)]
    );
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    assert_eq!(sent(&drain(&mut session))["action"], 11);
    session.handle_detached(&name("c"), NOW);
    drain(&mut session);
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
    session.handle_discontinuity(&name("c"), serial(50), vec![], &lost, NOW);
    assert_eq!(drain(&mut session), []);
    attach(&mut session, "c");
    session.handle_discontinuity(&name("c"), serial(50), vec![], &lost, NOW);
    let attached = sent(&drain(&mut session));
    assert_eq!(
        (&attached["action"], &attached["flags"]),
        (&json!(11), &json!(983_040))
    );
    assert_eq!(attached["channelSerial"], serial(50).to_string());
    assert_eq!(attached["error"]["code"], 90003);
}
