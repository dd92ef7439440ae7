//! Presence: what is stored for what a client says, what it is answered, and who leaves when.

use serde_json::{Value, json};

use crate::auth::ClientId;
use crate::session::tests::{
    ALL_MODES, EVERYTHING, FRESH, NOW, as_json, at, attach, drain, name, opening, send, sent,
    serial, session_with,
};
use crate::session::{
    AttachOutcome, Content, Continuity, Effect, Limits, Opening, Session, Ticket,
};
use crate::types::{ChannelName, ErrorCode};
use crate::wire::ably::{Data, PresenceAction, PresenceMessage, flags};

mod again;

/// A session as `me`, attached to `c`.
fn attached() -> Session {
    let mut session = session_with(EVERYTHING, "me");
    attach(&mut session, "c");
    session
}

fn resumed() -> Session {
    let opening = Opening {
        resumed: true,
        ..opening(EVERYTHING, "me")
    };
    let mut session = Session::new(opening, NOW);
    drain(&mut session);
    session
}

fn events(session: &mut Session, msg_serial: u64, events: Value) -> Vec<Effect> {
    send(
        session,
        json!({"action": 14, "channel": "c", "msgSerial": msg_serial, "presence": events}),
    )
}

/// Action, client id and data.
type Event = (i64, String, Option<String>);

/// The record of one presence publish.
#[track_caller]
fn record(effects: &[Effect]) -> (Ticket, String, Vec<Event>) {
    let [
        Effect::Publish {
            ticket,
            id,
            content: Content::Presence(events),
            ephemeral: false,
            ..
        },
    ] = effects
    else {
        panic!("not one presence publish: {effects:?}")
    };
    let of = |event: &PresenceMessage| {
        assert_eq!(
            (&event.id, &event.connection_id, event.timestamp),
            (&None, &None, None)
        );
        (
            event.action.unwrap().number(),
            event.client_id.clone().unwrap(),
            text(event),
        )
    };
    (*ticket, id.clone(), events.iter().map(of).collect())
}

fn text(event: &PresenceMessage) -> Option<String> {
    event.data.as_ref().map(|data| match data {
        Data::Text(text) => text.clone(),
        Data::Binary(bytes) => format!("{bytes:?}"),
    })
}

fn event(action: i64, client_id: &str, data: &str) -> (i64, String, Option<String>) {
    (action, client_id.to_owned(), Some(data.to_owned()))
}

fn stored(session: &mut Session, ticket: Ticket) {
    session.handle_published(ticket, Ok(Some(serial(9))), NOW);
    assert_eq!(sent(&drain(session))["action"], 1);
}

fn enter(session: &mut Session, msg_serial: u64, client_id: &str, data: &str) {
    let event = json!([{"action": 2, "clientId": client_id, "data": data}]);
    let (ticket, ..) = record(&events(session, msg_serial, event));
    stored(session, ticket);
}

/// A member as a channel's list has it.
fn member(connection_id: &str, client_id: &str, id: &str) -> PresenceMessage {
    PresenceMessage {
        id: Some(id.into()),
        action: Some(PresenceAction::Present),
        client_id: Some(client_id.into()),
        connection_id: Some(connection_id.into()),
        data: Some(Data::Text("was".into())),
        timestamp: Some(NOW - 5),
        ..PresenceMessage::default()
    }
}

fn with_members(members: Vec<PresenceMessage>) -> AttachOutcome {
    AttachOutcome {
        members,
        ..at(5, FRESH)
    }
}

/// (client id, data) of who leaves.
fn leavers(members: &[PresenceMessage]) -> Vec<(String, Option<String>)> {
    let leaver = |member: &PresenceMessage| {
        assert_eq!(member.action, Some(PresenceAction::Leave));
        (member.client_id.clone().unwrap(), text(member))
    };
    members.iter().map(leaver).collect()
}

fn left(client_id: &str, data: &str) -> (String, Option<String>) {
    (client_id.to_owned(), Some(data.to_owned()))
}

#[test]
fn events_are_stored_as_what_they_mean() {
    let mut session = attached();
    let update = events(
        &mut session,
        0,
        json!([{"action": 4, "data": "hi", "id": "x", "connectionId": "y", "timestamp": 1}]),
    );
    let (ticket, id, seen) = record(&update);
    assert_eq!(id, "conn1:0");
    assert_eq!(
        seen,
        [event(2, "me", "hi")],
        "an update of nobody is an enter"
    );
    stored(&mut session, ticket);
    let (_, _, seen) = record(&events(
        &mut session,
        1,
        json!([{"action": 4, "data": "ho"}]),
    ));
    assert_eq!(seen, [event(4, "me", "ho")]);
    // Before the update has its result: what was asked for last is what is left.
    let (ticket, _, seen) = record(&events(&mut session, 2, json!([{"action": 3}])));
    assert_eq!(
        seen,
        [event(3, "me", "ho")],
        "a leave without data carries the last"
    );
    session.handle_published(ticket, Ok(Some(serial(9))), NOW);
    assert_eq!(drain(&mut session), [], "1 has no answer yet");
    let (_, _, seen) = record(&events(
        &mut session,
        3,
        json!([{"action": 2}, {"action": 3, "data": "bye"}]),
    ));
    assert_eq!(seen, [(2, "me".to_owned(), None), event(3, "me", "bye")]);
}

#[test]
fn to_leave_as_nobody_is_answered_and_nothing_else() {
    let mut session = attached();
    let ack = sent(&events(&mut session, 0, json!([{"action": 3}])));
    assert_eq!(
        ack,
        json!({"action": 1, "msgSerial": 0, "count": 1, "res": [{"serials": [null]}]})
    );
    let mut session = session_with(EVERYTHING, "*");
    attach(&mut session, "c");
    let mixed = json!([{"action": 3, "clientId": "x"}, {"action": 2, "clientId": "a"}, {"action": 3, "clientId": "y"},
        {"action": 2, "clientId": "b"}]);
    let (ticket, _, seen) = record(&events(&mut session, 0, mixed));
    assert_eq!(seen.len(), 2);
    session.handle_published(ticket, Ok(Some(serial(9))), NOW);
    let text = |offset| serial(9).message(offset).to_string();
    let serials = json!([{"serials": [null, text(0), null, text(1)]}]);
    assert_eq!(sent(&drain(&mut session))["res"], serials);
    // The log found nothing to change.
    let (ticket, ..) = record(&events(
        &mut session,
        1,
        json!([{"action": 3, "clientId": "a"}]),
    ));
    session.handle_published(ticket, Ok(None), NOW);
    assert_eq!(
        sent(&drain(&mut session))["res"],
        json!([{"serials": [null]}])
    );
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table of refusals")]
fn presence_that_breaks_a_rule_is_refused() {
    let big = "x".repeat(65_537);
    let table = [
        (40010, json!({"channel": ":c", "presence": [{"action": 2}]})),
        (
            40160,
            json!({"channel": "sub", "presence": [{"action": 2}]}),
        ),
        (
            91001,
            json!({"channel": "other", "presence": [{"action": 2}]}),
        ),
        (
            40165,
            json!({"channel": "deaf", "presence": [{"action": 2}]}),
        ),
        (40030, json!({"channel": "c"})),
        (40000, json!({"channel": "c", "presence": [{}]})),
        (40000, json!({"channel": "c", "presence": [{"action": 1}]})),
        (40000, json!({"channel": "c", "presence": [{"action": 0}]})),
        (40000, json!({"channel": "c", "presence": [{"action": 9}]})),
        (
            40012,
            json!({"channel": "c", "presence": [{"action": 2, "clientId": "you"}]}),
        ),
        (
            40012,
            json!({"channel": "c", "presence": [{"action": 2, "clientId": "*"}]}),
        ),
        (
            40009,
            json!({"channel": "c", "presence": [{"action": 2, "data": big}]}),
        ),
        (
            40013,
            json!({"channel": "c", "presence": [{"action": 2, "data": "*", "encoding": "base64"}]}),
        ),
        (
            40032,
            json!({"channel": "c", "presence": [{"action": 2, "extras": {"x": 1}}]}),
        ),
        (
            40034,
            json!({"channel": "c", "presence": vec![json!({"action": 2}); 1001]}),
        ),
        (
            40099,
            json!({"channel": "c", "presence": [{"action": 2}], "params": {"_forceNack": "true"}}),
        ),
    ];
    let capability = r#"{"c":["*"],"other":["*"],"deaf":["*"],"sub":["subscribe"]}"#;
    let mut session = session_with(capability, "me");
    attach(&mut session, "c");
    send(
        &mut session,
        json!({"action": 10, "channel": "deaf", "flags": flags::PUBLISH}),
    );
    session.handle_attached(&name("deaf"), at(5, FRESH), NOW);
    drain(&mut session);
    for (msg_serial, (code, mut frame)) in (0_u64..).zip(table) {
        frame["action"] = json!(14);
        frame["msgSerial"] = json!(msg_serial);
        let nack = sent(&send(&mut session, frame));
        assert_eq!(
            (&nack["action"], &nack["msgSerial"]),
            (&json!(2), &json!(msg_serial))
        );
        assert_eq!(nack["error"]["code"], code, "{nack}");
    }
    assert_eq!(
        session.handle_gone(NOW),
        [],
        "nobody is a member who was refused"
    );
}

#[test]
fn presence_needs_a_client_id() {
    for id in [ClientId::Anonymous, ClientId::Any] {
        let mut opening = opening(EVERYTHING, "*");
        opening.identity.client_id = id;
        let mut session = Session::new(opening, NOW);
        drain(&mut session);
        attach(&mut session, "c");
        let nack = sent(&events(&mut session, 0, json!([{"action": 2}])));
        assert_eq!(nack["error"]["code"], 91000);
    }
}

#[test]
fn members_are_limited() {
    let limits = Limits {
        max_members: 2,
        max_member_bytes: 5_000,
        ..Limits::default()
    };
    let mut session = Session::new(
        Opening {
            limits,
            ..opening(EVERYTHING, "*")
        },
        NOW,
    );
    drain(&mut session);
    attach(&mut session, "c");
    enter(&mut session, 0, "a", "");
    enter(&mut session, 1, "b", "");
    let nack = sent(&events(
        &mut session,
        2,
        json!([{"action": 2, "clientId": "x"}]),
    ));
    assert_eq!(nack["error"]["code"], 91003);
    enter(&mut session, 3, "b", "again");
    let swap = json!([{"action": 3, "clientId": "a"}, {"action": 2, "clientId": "x"}]);
    let (ticket, _, seen) = record(&events(&mut session, 4, swap));
    assert_eq!(seen.len(), 2);
    // The log has a limit of its own: who it refuses is no member.
    session.handle_published(ticket, Err(ErrorCode::TooManyMembers.into()), NOW);
    assert_eq!(sent(&drain(&mut session))["error"]["code"], 91003);
    let big = json!([{"action": 4, "clientId": "a", "data": "x".repeat(4_000)}]);
    assert_eq!(sent(&events(&mut session, 5, big))["error"]["code"], 91003);
    let gone = session.handle_gone(NOW);
    assert_eq!(leavers(&gone[0].1), [left("a", ""), left("b", "again")]);
}

#[test]
fn what_was_refused_did_not_happen() {
    let mut session = attached();
    enter(&mut session, 0, "me", "one");
    let mut publish = |msg_serial, action, outcome: Option<ErrorCode>| {
        let event = json!([{"action": action, "data": format!("{msg_serial}")}]);
        let (ticket, ..) = record(&events(&mut session, msg_serial, event));
        if let Some(error) = outcome {
            session.handle_published(ticket, Err(error.into()), NOW);
            drain(&mut session);
        }
        ticket
    };
    publish(1, 3, Some(ErrorCode::Busy));
    publish(2, 4, Some(ErrorCode::NoLeader));
    // Its fate is unknown: somebody who may be there must be had to leave.
    publish(3, 4, Some(ErrorCode::Timeout));
    publish(4, 3, Some(ErrorCode::Timeout));
    let gone = session.handle_gone(NOW);
    assert_eq!(gone.len(), 1);
    assert_eq!(leavers(&gone[0].1), [left("me", "3")]);
    assert_eq!(session.handle_gone(NOW), [], "told once");
}

#[test]
fn results_may_come_in_any_order() {
    let mut session = attached();
    let enter = record(&events(
        &mut session,
        0,
        json!([{"action": 2, "data": "in"}]),
    ))
    .0;
    let leave = record(&events(&mut session, 1, json!([{"action": 3}]))).0;
    session.handle_published(leave, Ok(Some(serial(4))), NOW);
    session.handle_published(enter, Ok(Some(serial(3))), NOW);
    drain(&mut session);
    assert_eq!(
        session.handle_gone(NOW),
        [],
        "the leave came after the enter"
    );
}

#[test]
fn members_leave_with_their_attachment() {
    let mut session = attached();
    enter(&mut session, 0, "me", "hi");
    let effects = send(&mut session, json!({"action": 12, "channel": "c"}));
    let [Effect::Depart { channel, members }, Effect::Detach { .. }] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(
        (channel, leavers(members)),
        (&name("c"), vec![left("me", "hi")])
    );
    session.handle_detached(&name("c"), NOW);
    drain(&mut session);
    assert_eq!(session.handle_gone(NOW), []);

    // An enter without a result may have happened.
    let mut session = attached();
    let (ticket, ..) = record(&events(
        &mut session,
        0,
        json!([{"action": 2, "data": "hi"}]),
    ));
    let effects = send(&mut session, json!({"action": 12, "channel": "c"}));
    assert!(matches!(effects[0], Effect::Depart { .. }));
    session.handle_detached(&name("c"), NOW);
    drain(&mut session);
    stored(&mut session, ticket);
    assert_eq!(session.handle_gone(NOW), []);

    // Given up by the owner.
    let mut session = attached();
    enter(&mut session, 0, "me", "hi");
    session.handle_attachment_failed(&name("c"), &ErrorCode::NoLeader.into(), NOW);
    assert!(matches!(
        drain(&mut session)[..],
        [Effect::Depart { .. }, Effect::Send(_)]
    ));
}

#[test]
fn members_leave_at_once_or_after_the_grace() {
    let entered = || {
        let mut session = attached();
        enter(&mut session, 0, "me", "hi");
        session
    };
    let at_once = |session: &mut Session| {
        let effects = drain(session);
        let [
            Effect::Depart { members, .. },
            Effect::Send(_),
            Effect::Close { .. },
        ] = &effects[..]
        else {
            panic!("{effects:?}")
        };
        assert_eq!(leavers(members), [left("me", "hi")]);
        assert_eq!(session.handle_gone(NOW), []);
    };
    let later = |session: &mut Session| {
        let effects = drain(session);
        assert!(
            !effects.iter().any(|e| matches!(e, Effect::Depart { .. })),
            "{effects:?}"
        );
        let gone = session.handle_gone(NOW);
        assert_eq!(
            (gone.len(), leavers(&gone[0].1)),
            (1, vec![left("me", "hi")])
        );
        assert!(session.is_closed());
    };
    let frame = |session: &mut Session, action: i64| {
        session.handle_frame(super::frame(&json!({"action": action})), NOW);
    };
    let mut session = entered();
    frame(&mut session, 7);
    at_once(&mut session);
    let mut session = entered();
    frame(&mut session, 99);
    at_once(&mut session);
    let mut session = entered();
    frame(&mut session, 5);
    later(&mut session);
    later(&mut entered());
    let mut session = entered();
    session.handle_drain(NOW);
    later(&mut session);
    let mut session = entered();
    session.handle_revoked(NOW);
    later(&mut session);
    // The owner lost the socket before it could carry out what CLOSE asked for.
    let mut session = entered();
    frame(&mut session, 7);
    assert_eq!(leavers(&session.handle_gone(NOW)[0].1), [left("me", "hi")]);
    assert_eq!(drain(&mut session), []);
    let mut session = entered();
    session.handle_taken_over(NOW);
    assert_eq!(session.handle_gone(NOW), []);
}

#[test]
fn the_grace_is_what_the_client_says_within_bounds() {
    for (asked, expected) in [
        (None, 15_000),
        (Some(0), 0),
        (Some(7), 7),
        (Some(u64::MAX), 120_000),
    ] {
        let mut opening = opening(EVERYTHING, "me");
        opening.params.remain_present_for_ms = asked;
        assert_eq!(Session::new(opening, NOW).remain_present_for_ms(), expected);
    }
}

#[test]
fn an_attachment_begins_with_the_members() {
    let members: Vec<_> = (0..150)
        .map(|n| member("other", &n.to_string(), "other:0:0"))
        .collect();
    for (modes, syncs) in [
        (ALL_MODES, true),
        (flags::PRESENCE_SUBSCRIBE, true),
        (flags::PRESENCE, false),
    ] {
        let mut session = session_with(EVERYTHING, "me");
        send(
            &mut session,
            json!({"action": 10, "channel": "[?]c", "flags": modes}),
        );
        let outcome = AttachOutcome {
            members: members.clone(),
            ..at(5, Continuity::Resumed { backlog: false })
        };
        session.handle_attached(&name("c"), outcome, NOW);
        let frames: Vec<Value> = drain(&mut session)
            .iter()
            .map(|e| sent(std::slice::from_ref(e)))
            .collect();
        let has = if syncs { flags::HAS_PRESENCE } else { 0 };
        assert_eq!(frames[0]["flags"], modes | flags::RESUMED | has);
        assert_eq!(frames.len(), if syncs { 3 } else { 1 });
        for (frame, (count, last)) in frames[1..].iter().zip([(100, false), (50, true)]) {
            assert_eq!(
                (&frame["action"], &frame["channel"]),
                (&json!(16), &json!("[?]c"))
            );
            assert_eq!(frame["presence"].as_array().unwrap().len(), count);
            let (token, cursor) = frame["channelSerial"]
                .as_str()
                .unwrap()
                .split_once(':')
                .unwrap();
            assert!(!token.is_empty() && cursor.is_empty() == last);
            let first = json!({"id": "other:0:0", "action": 1, "clientId": frame["presence"][0]["clientId"],
                "connectionId": "other", "data": "was", "timestamp": NOW - 5});
            assert_eq!(frame["presence"][0], first);
        }
    }
}

#[test]
fn a_gap_brings_the_members_again() {
    let mut session = attached();
    let lost = ErrorCode::ContinuityLost.into();
    let members = vec![member("other", "you", "other:0:0")];
    session.handle_discontinuity(&name("c"), serial(50), members, &lost, NOW);
    let effects = drain(&mut session);
    let [Effect::Send(attached), Effect::Send(sync)] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(as_json(attached)["flags"], ALL_MODES | flags::HAS_PRESENCE);
    assert_eq!(as_json(sync)["presence"][0]["clientId"], "you");
}

#[test]
fn a_client_may_ask_for_the_members() {
    let mut session = attached();
    let ask = json!({"action": 16, "channel": "c"});
    let read = [Effect::Members { channel: name("c") }];
    assert_eq!(send(&mut session, ask.clone()), read);
    assert_eq!(
        send(&mut session, ask.clone()),
        [],
        "one answer is on its way"
    );
    session.handle_members(
        &name("c"),
        Ok(vec![member("other", "you", "other:0:0")]),
        NOW,
    );
    let first = sent(&drain(&mut session));
    assert_eq!(
        (&first["action"], &first["presence"][0]["clientId"]),
        (&json!(16), &json!("you"))
    );
    send(&mut session, ask.clone());
    session.handle_members(&name("c"), Ok(vec![]), NOW);
    let none = sent(&drain(&mut session));
    assert!(none.get("presence").is_none() && none["channelSerial"] != first["channelSerial"]);
    send(&mut session, ask.clone());
    session.handle_members(&name("c"), Err(ErrorCode::Timeout.into()), NOW);
    assert_eq!(drain(&mut session), []);
    assert_eq!(send(&mut session, ask.clone()), read, "it may ask again");
    // Not asked, or gone meanwhile.
    send(&mut session, json!({"action": 12, "channel": "c"}));
    session.handle_members(&name("c"), Ok(vec![]), NOW);
    session.handle_members(&name("x"), Ok(vec![]), NOW);
    assert_eq!(drain(&mut session), []);
    assert_eq!(send(&mut super::session(), ask), []);
}

#[test]
fn a_resumed_connection_finds_its_members() {
    let mut session = resumed();
    send(&mut session, json!({"action": 10, "channel": "c"}));
    let members = vec![
        member("conn1", "me", "conn1:3:0"),
        member("other", "you", "other:0:0"),
        // Another connection whose id begins alike.
        member("conn10", "me", "conn10:0:0"),
    ];
    session.handle_attached(&name("c"), with_members(members), NOW);
    let effects = drain(&mut session);
    assert_eq!(effects[0], Effect::Attend { channel: name("c") });
    assert_eq!(effects.len(), 3, "ATTACHED and one page");
    // The client enters again: it is there already.
    let again = json!([{"action": 2, "id": "conn1:3:0", "clientId": "me", "data": "was"}]);
    let effects = events(&mut session, 4, again);
    let [Effect::Attend { .. }, Effect::Send(ack)] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(as_json(ack)["res"], json!([{"serials": [null]}]));
    // With another id, as an old client library sends: it is news.
    let stale = json!([{"action": 2, "id": "conn0:3:0", "data": "now"}]);
    let (ticket, id, seen) = record(&events(&mut session, 5, stale));
    assert_eq!(
        (id.as_str(), seen),
        ("conn1:5", vec![event(2, "me", "now")])
    );
    stored(&mut session, ticket);
    let again = json!([{"action": 2, "id": "conn1:5:0"}]);
    assert!(matches!(
        events(&mut session, 6, again)[..],
        [Effect::Attend { .. }, Effect::Send(_)]
    ));
    let gone = session.handle_gone(NOW);
    assert_eq!(leavers(&gone[0].1), [left("me", "now")]);
}

#[test]
fn who_has_left_is_not_found_again() {
    let mut session = resumed();
    let (attach, detach) = (
        json!({"action": 10, "channel": "c"}),
        json!({"action": 12, "channel": "c"}),
    );
    let list = |ids: &[&str]| {
        ids.iter()
            .map(|id| member("conn1", "me", id))
            .collect::<Vec<_>>()
    };
    send(&mut session, attach.clone());
    session.handle_attached(&name("c"), with_members(list(&["conn1:3:0"])), NOW);
    drain(&mut session);
    let effects = send(&mut session, detach.clone());
    assert!(matches!(effects[0], Effect::Depart { .. }));
    session.handle_detached(&name("c"), NOW);
    drain(&mut session);
    // The list is older than the leave.
    send(&mut session, attach.clone());
    session.handle_attached(&name("c"), with_members(list(&["conn1:3:0"])), NOW);
    assert!(!drain(&mut session).contains(&Effect::Attend { channel: name("c") }));
    enter(&mut session, 4, "me", "new");
    send(&mut session, detach);
    session.handle_detached(&name("c"), NOW);
    drain(&mut session);
    send(&mut session, attach);
    session.handle_attached(&name("c"), with_members(list(&["conn1:4:0"])), NOW);
    assert!(!drain(&mut session).contains(&Effect::Attend { channel: name("c") }));
    assert_eq!(session.handle_gone(NOW), []);
}

#[test]
fn a_resumed_client_may_send_again_before_it_attaches() {
    let mut session = resumed();
    let (ticket, ..) = record(&events(
        &mut session,
        7,
        json!([{"action": 2, "data": "hi"}]),
    ));
    stored(&mut session, ticket);
    // Nobody knows yet who is there: a leave is the log's to judge.
    let (ticket, ..) = record(&events(
        &mut session,
        8,
        json!([{"action": 3, "clientId": "me"}]),
    ));
    session.handle_published(ticket, Err(ErrorCode::Busy.into()), NOW);
    drain(&mut session);
    assert_eq!(leavers(&session.handle_gone(NOW)[0].1), [left("me", "hi")]);
    let mut session = resumed();
    assert_eq!(
        record(&events(&mut session, 0, json!([{"action": 3}])))
            .2
            .len(),
        1
    );
}

#[test]
fn who_may_be_present_no_more_leaves() {
    let mut session = attached();
    enter(&mut session, 0, "me", "hi");
    let token = json!({"action": 17, "auth": {"accessToken": "t"}});
    send(&mut session, token);
    let mut identity = session.identity().clone();
    let capability = crate::auth::Capability::parse(r#"{"*":["subscribe"]}"#).unwrap();
    identity.capability = std::sync::Arc::new(capability);
    session.handle_authenticated(Ok(identity), NOW);
    let effects = drain(&mut session);
    let departs = effects.iter().find_map(|effect| match effect {
        Effect::Depart { members, .. } => Some(leavers(members)),
        _ => None,
    });
    assert_eq!(departs, Some(vec![left("me", "hi")]));
}
