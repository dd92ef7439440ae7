//! Publishing: what is stored under which key, what is refused, and the order of answers.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::session::tests::{
    EVERYTHING, FRESH, NOW, at, drain, name, publish, published, send, sent, sent_and_closed,
    serial, session, session_with,
};
use crate::session::{Effect, Ticket};
use crate::types::ErrorCode;
use crate::wire::ably::{Data, Message, flags};

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
        (40010, json!({"channel": "[meta]c", "messages": [{}]})),
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
    session.handle_attached(&name("c"), at(5, FRESH), NOW);
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
    for (msg_serial, (action, code)) in (0_u64..).zip([(19, 40000), (21, 40000)]) {
        let nack = sent(&send(
            &mut session,
            json!({"action": action, "channel": "c", "msgSerial": msg_serial}),
        ));
        assert_eq!(
            (&nack["action"], &nack["error"]["code"]),
            (&json!(2), &json!(code))
        );
    }
}

#[test]
fn answers_keep_the_clients_order() {
    let mut session = session();
    let tickets: Vec<Ticket> = (7..11)
        .map(|n| publish(&mut session, n, usize::try_from(n - 6).unwrap()))
        .collect();
    session.handle_published(tickets[1], Ok(Some(serial(2))), NOW);
    session.handle_published(tickets[2], Err(ErrorCode::Busy.into()), NOW);
    session.handle_published(tickets[3], Ok(Some(serial(4))), NOW);
    assert_eq!(drain(&mut session), [], "7 has no answer yet");
    session.handle_published(tickets[0], Ok(Some(serial(9))), NOW);
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
    session.handle_published(tickets[0], Ok(Some(serial(9))), NOW);
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
    session.handle_published(first, Ok(Some(serial(1))), NOW);
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
    session.handle_published(ticket, Ok(Some(serial(1))), NOW);
    assert_eq!(sent(&drain(&mut session))["count"], 1);
}

#[test]
fn an_ack_holds_a_bounded_number_of_serials() {
    let mut session = session();
    let tickets: Vec<Ticket> = (0..3).map(|n| publish(&mut session, n, 600)).collect();
    for ticket in tickets.iter().rev() {
        session.handle_published(*ticket, Ok(Some(serial(1))), NOW);
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
        session.handle_published(ticket, Ok(Some(serial(1))), NOW);
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
