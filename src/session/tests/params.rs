//! What attachments are asked for beside modes: rewind, qualifiers, occupancy, and under which name they are answered.

use serde_json::{Value, json};

use crate::session::tests::{
    ALL_MODES, EVERYTHING, FRESH, NOW, as_json, at, attach, drain, name, send, sent, serial,
    session, session_with,
};
use crate::session::{Continuity, Delivery, Effect, Occupancy, Session, Start};
use crate::wire::ably::flags;

/// Sends an ATTACH with these parameters: where it begins, and what ATTACHED echoes.
fn attached_with(session: &mut Session, attach: Value) -> (Start, Value) {
    let channel = attach["channel"].as_str().unwrap().to_owned();
    let effects = send(session, attach);
    let [Effect::Attach { start, .. }] = &effects[..] else {
        panic!("{effects:?}")
    };
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    let attached = sent(&drain(session));
    assert_eq!(
        attached["channel"], channel,
        "answered under the client's name"
    );
    (*start, attached["params"].clone())
}

#[test]
fn a_rewind_counts_messages_or_time() {
    let rewind = |count, within_ms| Start::Rewind { count, within_ms };
    // (rewind, rewindLimit, where it begins)
    let table = [
        ("1", None, rewind(1, None)),
        ("100", Some("5"), rewind(100, None)),
        ("101", None, rewind(100, None)),
        ("999999999", None, rewind(100, None)),
        ("15s", None, rewind(100, Some(15_000))),
        ("2m", Some("7"), rewind(7, Some(120_000))),
        ("2m", Some("700"), rewind(100, Some(120_000))),
        ("0", None, Start::Present),
        ("0s", None, Start::Present),
        ("2m", Some("0"), Start::Present),
    ];
    for (text, limit, expected) in table {
        let mut params = json!({"rewind": text});
        if let Some(limit) = limit {
            params["rewindLimit"] = json!(limit);
        }
        let attach = json!({"action": 10, "channel": "c", "params": params});
        let (start, echoed) = attached_with(&mut session(), attach);
        assert_eq!(start, expected, "{text} {limit:?}");
        assert_eq!(echoed, params);
    }
    for bad in [
        "",
        "x",
        "-1",
        "1h",
        "1.5",
        "s",
        "m",
        "1 ",
        "+1",
        "9999999999",
    ] {
        let attach = json!({"action": 10, "channel": "c", "params": {"rewind": bad}});
        assert_eq!(
            sent(&send(&mut session(), attach))["error"]["code"],
            40003,
            "{bad}"
        );
    }
    let attach =
        json!({"action": 10, "channel": "c", "params": {"rewind": "1m", "rewindLimit": "x"}});
    assert_eq!(sent(&send(&mut session(), attach))["error"]["code"], 40003);
}

#[test]
fn a_rewind_is_for_who_was_never_attached() {
    let rewind = json!({"rewind": "3"});
    let start = |attach: Value| attached_with(&mut session(), attach).0;
    let again = json!({"action": 10, "channel": "c", "params": rewind, "flags": ALL_MODES | flags::ATTACH_RESUME});
    assert_eq!(start(again), Start::Present);
    let after = json!({"action": 10, "channel": "c", "params": rewind, "channelSerial": serial(3).to_string()});
    assert_eq!(start(after), Start::After(serial(3)));
    let foreign = json!({"action": 10, "channel": "c", "params": rewind, "channelSerial": "s"});
    assert_eq!(start(foreign), Start::Present);
    let deaf = json!({"action": 10, "channel": "c", "params": rewind, "flags": flags::PUBLISH});
    assert_eq!(start(deaf), Start::Present);
    // A second ATTACH goes on where the first one is.
    let mut session = session();
    attach(&mut session, "c");
    let again = json!({"action": 10, "channel": "c", "params": rewind});
    assert_eq!(attached_with(&mut session, again).0, Start::Present);
}

#[test]
fn a_rewind_that_found_messages_says_so() {
    for (backlog, flag) in [(true, flags::HAS_BACKLOG), (false, 0)] {
        let mut session = session();
        send(
            &mut session,
            json!({"action": 10, "channel": "c", "params": {"rewind": "3"}}),
        );
        session.handle_attached(&name("c"), at(5, Continuity::Fresh { backlog }), NOW);
        assert_eq!(sent(&drain(&mut session))["flags"], ALL_MODES | flag);
    }
}

#[test]
fn a_qualified_name_is_the_channel_with_parameters() {
    let mut session = session();
    let qualified = "[?rewind=2&modes=subscribe&delta=vcdiff]c";
    let attach = json!({"action": 10, "channel": qualified, "params": {"echo": "false"}});
    let (start, echoed) = attached_with(&mut session, attach);
    assert_eq!(
        start,
        Start::Rewind {
            count: 2,
            within_ms: None
        }
    );
    assert_eq!(
        echoed,
        json!({"rewind": "2", "modes": "subscribe", "echo": "false"})
    );
    let delivery = Delivery {
        name: qualified,
        messages: true,
        echo: false,
        presence: false,
        occupancy: None,
        modes: flags::SUBSCRIBE,
    };
    assert_eq!(session.delivery(&name("c")), Some(delivery));
    // What ATTACH says beside the name wins.
    let attach = json!({"action": 10, "channel": qualified, "params": {"rewind": "7"}});
    assert_eq!(attached_with(&mut session, attach).1["rewind"], "7");
    let nack = sent(&send(
        &mut session,
        json!({"action": 15, "channel": qualified, "msgSerial": 0, "messages": [{}]}),
    ));
    assert_eq!(
        nack["error"]["code"], 40165,
        "the attachment's modes hold under any name"
    );
    send(&mut session, json!({"action": 12, "channel": qualified}));
    session.handle_detached(&name("c"), NOW);
    assert_eq!(
        sent(&drain(&mut session)),
        json!({"action": 13, "channel": qualified})
    );
    assert_eq!(session.delivery(&name("c")), None);
}

#[test]
fn a_channel_has_the_name_that_was_used_last() {
    let mut session = session();
    attach(&mut session, "c");
    let effects = send(&mut session, json!({"action": 10, "channel": "[?]c"}));
    let [Effect::Send(error), Effect::Attach { in_place: true, .. }] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(
        (&as_json(error)["action"], &as_json(error)["channel"]),
        (&json!(9), &json!("c"))
    );
    session.handle_attached(&name("c"), at(6, FRESH), NOW);
    assert_eq!(sent(&drain(&mut session))["channel"], "[?]c");
    // The former name stands for nothing any more.
    let detached = json!({"action": 13, "channel": "c"});
    assert_eq!(
        sent(&send(&mut session, json!({"action": 12, "channel": "c"}))),
        detached
    );
    assert_eq!(session.delivery(&name("c")).unwrap().name, "[?]c");

    // While attaching: the former name hears of its end at once, and no ATTACHED.
    let mut session = super::session();
    send(&mut session, json!({"action": 10, "channel": "c"}));
    let error = sent(&send(
        &mut session,
        json!({"action": 10, "channel": "[?]c"}),
    ));
    assert_eq!(
        (&error["action"], &error["channel"]),
        (&json!(9), &json!("c"))
    );
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    let effects = drain(&mut session);
    assert!(
        matches!(effects[..], [Effect::Attach { in_place: true, .. }]),
        "{effects:?}"
    );
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    assert_eq!(sent(&drain(&mut session))["channel"], "[?]c");

    // While detaching: both are answered.
    send(&mut session, json!({"action": 12, "channel": "[?]c"}));
    let detached = sent(&send(&mut session, json!({"action": 10, "channel": "c"})));
    assert_eq!(detached, json!({"action": 13, "channel": "[?]c"}));
    session.handle_detached(&name("c"), NOW);
    assert_eq!(drain(&mut session).len(), 1);
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    assert_eq!(sent(&drain(&mut session))["channel"], "c");
}

#[test]
fn occupancy_is_for_who_may_know_it() {
    let table = [
        (EVERYTHING, "metrics", Some(Occupancy::Metrics)),
        (
            EVERYTHING,
            "metrics.subscribers",
            Some(Occupancy::Metric("subscribers")),
        ),
        (EVERYTHING, "metrics.", None),
        (EVERYTHING, "metricsx", None),
        (EVERYTHING, "all", None),
        (r#"{"*":["subscribe"]}"#, "metrics", None),
        (
            r#"{"*":["subscribe","channel-metadata"]}"#,
            "metrics",
            Some(Occupancy::Metrics),
        ),
        (r#"{"*":["publish","channel-metadata"]}"#, "metrics", None),
    ];
    for (capability, asked, expected) in table {
        let mut session = session_with(capability, "*");
        let attach = json!({"action": 10, "channel": "c", "params": {"occupancy": asked}});
        let (_, echoed) = attached_with(&mut session, attach);
        assert_eq!(
            session.delivery(&name("c")).unwrap().occupancy,
            expected,
            "{asked}"
        );
        let told = expected.map(|_| asked);
        assert_eq!(
            echoed.get("occupancy").and_then(Value::as_str),
            told,
            "{asked}"
        );
    }
}

#[test]
fn what_is_delivered_follows_the_attachment() {
    let mut session = session();
    assert_eq!(session.delivery(&name("c")), None);
    send(&mut session, json!({"action": 10, "channel": "c"}));
    assert_eq!(
        session.delivery(&name("c")),
        None,
        "nothing before ATTACHED"
    );
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    drain(&mut session);
    let all = session.delivery(&name("c")).unwrap();
    assert!(all.messages && all.presence && all.echo);
    send(
        &mut session,
        json!({"action": 10, "channel": "c", "flags": flags::PRESENCE_SUBSCRIBE}),
    );
    let less = session.delivery(&name("c")).unwrap();
    assert!(
        !less.messages && less.presence,
        "at once, not only after ATTACHED"
    );
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
    send(&mut session, json!({"action": 12, "channel": "c"}));
    assert_eq!(session.delivery(&name("c")), None);
}
