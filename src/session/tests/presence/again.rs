//! Members that were lost and are entered again without the client's asking.

use serde_json::json;

use super::*;

#[test]
fn a_member_that_was_removed_by_mistake_enters_again() {
    let mut session = attached();
    enter(&mut session, 0, "me", "hi");
    let removed = |session: &mut Session, channel: &ChannelName| {
        session.handle_member_left(channel, "me", NOW);
        drain(session)
    };
    let (ticket, id, seen) = record(&removed(&mut session, &name("c")));
    assert!(!id.starts_with("conn1"), "{id}");
    assert_eq!(seen, [event(2, "me", "hi")]);
    session.handle_published(ticket, Ok(Some(serial(8))), NOW);
    assert_eq!(drain(&mut session), [], "the client did not ask");
    // Refused for a while: again later.
    let (ticket, second, _) = record(&removed(&mut session, &name("c")));
    assert_ne!(id, second);
    session.handle_published(ticket, Err(ErrorCode::Busy.into()), NOW);
    assert_eq!(session.next_deadline(), Some(NOW + 1000));
    session.handle_tick(NOW + 1000);
    let (ticket, ..) = record(&drain(&mut session));
    // Refused for good: it is no member.
    session.handle_published(ticket, Err(ErrorCode::TooManyMembers.into()), NOW);
    session.handle_tick(NOW + 5000);
    assert_eq!(drain(&mut session), []);
    assert_eq!(removed(&mut session, &name("c")), []);
    assert_eq!(removed(&mut session, &name("x")), []);

    // It leaves while it waits to be entered again.
    enter(&mut session, 3, "me", "hi");
    let (ticket, ..) = record(&removed(&mut session, &name("c")));
    session.handle_published(ticket, Err(ErrorCode::Busy.into()), NOW);
    let (ticket, ..) = record(&events(&mut session, 4, json!([{"action": 3}])));
    session.handle_published(ticket, Ok(None), NOW);
    drain(&mut session);
    session.handle_tick(NOW + 9000);
    let effects = drain(&mut session);
    let again = effects
        .iter()
        .any(|effect| matches!(effect, Effect::Publish { .. }));
    assert!(!again, "{effects:?}");
    assert_eq!(session.handle_gone(NOW), []);

    // Removed because the client left.
    let mut session = attached();
    enter(&mut session, 0, "me", "hi");
    let (ticket, ..) = record(&events(&mut session, 1, json!([{"action": 3}])));
    assert_eq!(removed(&mut session, &name("c")), []);
    stored(&mut session, ticket);
    assert_eq!(session.handle_gone(NOW), []);
}

#[test]
fn a_member_whose_removal_was_among_what_was_skipped_enters_again() {
    let mut session = attached();
    enter(&mut session, 0, "me", "hi");
    let lost = ErrorCode::ContinuityLost.into();
    let mut skip = |members| {
        session.handle_discontinuity(&name("c"), serial(50), members, &lost, NOW);
        drain(&mut session)
    };
    let own = PresenceMessage {
        connection_id: Some("conn1".into()),
        client_id: Some("me".into()),
        ..PresenceMessage::default()
    };
    let told = |effects: &[Effect]| {
        effects
            .iter()
            .any(|it| matches!(it, Effect::Publish { .. }))
    };
    assert!(!told(&skip(vec![own])), "it is still in");
    let (_, _, seen) = record(&skip(vec![])[1..]);
    assert_eq!(seen, [event(2, "me", "hi")]);
}

#[test]
fn an_enter_that_was_stored_before_and_undone_since_is_made_again() {
    let mut session = resumed();
    let (ticket, ..) = record(&events(
        &mut session,
        5,
        json!([{"action": 2, "data": "hi"}]),
    ));
    session.handle_published(ticket, Ok(Some(serial(3))), NOW);
    drain(&mut session);
    // It is still there.
    session.handle_repeated(&name("c"), &[member("conn1", "me", "conn1:5:0")], NOW);
    assert_eq!(drain(&mut session), []);
    // Another connection's is not it.
    session.handle_repeated(&name("c"), &[member("conn2", "me", "conn2:5:0")], NOW);
    let (again, id, seen) = record(&drain(&mut session));
    assert!(id.starts_with("again-"), "{id}");
    assert_eq!(seen, [event(2, "me", "hi")]);
    // Whether it happened nobody knows, and the client does not ask again: the session does.
    session.handle_published(again, Err(ErrorCode::Timeout.into()), NOW);
    session.handle_tick(NOW + 1000);
    record(&drain(&mut session));
    // What is being left is not missing.
    let (leave, ..) = record(&events(&mut session, 6, json!([{"action": 3}])));
    session.handle_repeated(&name("c"), &[], NOW);
    assert_eq!(drain(&mut session), []);
    stored(&mut session, leave);
    session.handle_repeated(&name("x"), &[], NOW);
    assert_eq!(session.handle_gone(NOW), []);
}
