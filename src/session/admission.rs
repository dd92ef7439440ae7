//! What messages a client may publish: counts, sizes, names, ids, extras (§2.6). The same for every door.

use crate::auth::ClientId;
use crate::session::extras;
use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::ably::{Message, MessageAction, PresenceAction, PresenceMessage};

/// Most messages in one publish.
const MESSAGES_MAX: usize = 1000;

/// Longest message id in bytes.
const ID_BYTES_MAX: usize = 512;

/// Messages that may be stored as one record.
#[derive(Clone, Debug, PartialEq)]
pub struct Admission {
    /// Each with its client id, and without anything that is the server's to say.
    pub messages: Vec<Message>,
    pub count: u16,
    /// What makes a repetition recognisable, when the client chose ids.
    pub base_id: Option<String>,
    /// Delivered, but no part of history.
    pub ephemeral: bool,
    /// Only who has `Operation::PrivilegedHeaders` on the channel may publish them.
    pub privileged: bool,
}

/// Takes the connection keys out of messages that are to be published on behalf of a connection: the one key of all, if
/// they have one. Who publishes then is that connection, with its id and under its client id, which is what [`admit`]
/// must be told.
///
/// # Errors
/// `InvalidConnectionKey` when messages of one publish name different connections.
pub fn take_connection_key(messages: &mut [Message]) -> Result<Option<String>, ErrorInfo> {
    let keys = messages.iter_mut();
    // All are taken, whatever becomes of them.
    let keys: Vec<_> = keys.map(|message| message.connection_key.take()).collect();
    if keys.iter().all(|key| *key == keys[0]) {
        return Ok(keys.into_iter().next().flatten());
    }
    let what = "messages of one publish are on behalf of different connections";
    Err(ErrorInfo::new(ErrorCode::InvalidConnectionKey, what))
}

/// Checks messages of one publish by a client that may call itself `client_id`. `max_bytes` is for all
/// messages together.
///
/// # Errors
/// Says which rule was broken; nothing of the publish may be stored then.
pub fn admit(
    messages: Vec<Message>,
    client_id: &ClientId,
    max_bytes: usize,
) -> Result<Admission, ErrorInfo> {
    let refused = |code, what: String| Err(ErrorInfo::new(code, what));
    if messages.is_empty() {
        return refused(ErrorCode::InvalidPublish, "publish holds no message".into());
    }
    if messages.len() > MESSAGES_MAX {
        let what = format!(
            "{} messages in one publish; at most {MESSAGES_MAX}",
            messages.len()
        );
        return refused(ErrorCode::TooManyMessages, what);
    }
    let base_id = base_id(&messages)?;
    let ephemeral = is_ephemeral(&messages)?;
    let admitted = messages
        .into_iter()
        .map(|message| admit_one(message, client_id));
    let messages = admitted.collect::<Result<Vec<_>, _>>()?;
    let bytes: usize = messages.iter().map(Message::size).sum();
    if bytes > max_bytes {
        return refused(
            ErrorCode::MessageTooLarge,
            format!("{bytes} bytes in one publish; at most {max_bytes}"),
        );
    }
    let count = u16::try_from(messages.len()).expect("at most 1000 messages, checked above");
    Ok(Admission {
        privileged: messages
            .iter()
            .any(|m| extras::is_privileged(m.extras.as_ref())),
        messages,
        count,
        base_id,
        ephemeral,
    })
}

fn admit_one(message: Message, client_id: &ClientId) -> Result<Message, ErrorInfo> {
    let refused = |code, what: &str| Err(ErrorInfo::new(code, what));
    match message.action {
        None | Some(MessageAction::Create) => {}
        Some(_) => {
            let what = "only new messages can be published; changing messages is not supported yet";
            return refused(ErrorCode::InvalidPublish, what);
        }
    }
    if message.connection_key.is_some() {
        let what = "only REST can publish on behalf of a connection";
        return refused(ErrorCode::InvalidConnectionKey, what);
    }
    if message.has_invalid_base64() {
        return refused(
            ErrorCode::InvalidMessageData,
            "data is not base64, as its encoding says",
        );
    }
    extras::check(message.extras.as_ref())?;
    Ok(Message {
        client_id: client_id.assign(message.client_id.as_deref())?,
        id: message.id,
        name: message.name,
        data: message.data,
        encoding: message.encoding,
        extras: message.extras,
        ..Message::default()
    })
}

/// One record is in history or is not.
fn is_ephemeral(messages: &[Message]) -> Result<bool, ErrorInfo> {
    let ephemeral = |message: &&Message| extras::is_ephemeral(message.extras.as_ref());
    match messages.iter().filter(ephemeral).count() {
        0 => Ok(false),
        all if all == messages.len() => Ok(true),
        _ => {
            let what = "either all messages of a publish are ephemeral or none";
            Err(extras::invalid(what.to_owned()))
        }
    }
}

/// Checks presence events of one publish by a client that may call itself `client_id`; gives them with client ids, and
/// without anything that is the server's to say, but for ids: they tell a member that is entered again.
///
/// # Errors
/// Says which rule was broken; nothing of the publish may be stored then.
pub(super) fn check_presence(
    events: Vec<PresenceMessage>,
    client_id: &ClientId,
    max_bytes: usize,
) -> Result<Vec<PresenceMessage>, ErrorInfo> {
    let refused = |code, what: String| Err(ErrorInfo::new(code, what));
    if events.is_empty() {
        return refused(
            ErrorCode::InvalidPublish,
            "frame holds no presence event".into(),
        );
    }
    if events.len() > MESSAGES_MAX {
        let what = format!(
            "{} presence events in one frame; at most {MESSAGES_MAX}",
            events.len()
        );
        return refused(ErrorCode::TooManyMessages, what);
    }
    let checked = events
        .into_iter()
        .map(|event| check_event(event, client_id));
    let events = checked.collect::<Result<Vec<_>, _>>()?;
    let bytes: usize = events.iter().map(PresenceMessage::size).sum();
    if bytes > max_bytes {
        let what = format!("{bytes} bytes of presence in one frame; at most {max_bytes}");
        return refused(ErrorCode::MessageTooLarge, what);
    }
    Ok(events)
}

fn check_event(event: PresenceMessage, own: &ClientId) -> Result<PresenceMessage, ErrorInfo> {
    let refused = |code, what: &str| Err(ErrorInfo::new(code, what));
    match event.action {
        Some(PresenceAction::Enter | PresenceAction::Update | PresenceAction::Leave) => {}
        _ => {
            let what = "presence event is neither an enter, an update nor a leave";
            return refused(ErrorCode::BadRequest, what);
        }
    }
    if event.has_invalid_base64() {
        let what = "data is not base64, as its encoding says";
        return refused(ErrorCode::InvalidMessageData, what);
    }
    extras::check(event.extras.as_ref())?;
    let Some(client_id) = own.assign(event.client_id.as_deref())? else {
        return Err(ErrorCode::PresenceWithoutClientId.into());
    };
    Ok(PresenceMessage {
        id: event.id,
        action: event.action,
        client_id: Some(client_id),
        data: event.data,
        encoding: event.encoding,
        extras: event.extras,
        ..PresenceMessage::default()
    })
}

/// The part that the ids of one publish share: of a single message any id, less a `:0` at its end; of several
/// they must be `base:0`, `base:1` and so on. Either all messages have ids or none.
fn base_id(messages: &[Message]) -> Result<Option<String>, ErrorInfo> {
    let invalid = |what: &str| Err(ErrorInfo::new(ErrorCode::InvalidMessageId, what));
    let ids: Vec<&str> = messages.iter().filter_map(|m| m.id.as_deref()).collect();
    let Some(first) = ids.first() else {
        return Ok(None);
    };
    let base = first.strip_suffix(":0").unwrap_or(first);
    if base.is_empty() || first.len() > ID_BYTES_MAX {
        return invalid("message id is empty or too long");
    }
    if ids.len() != messages.len() {
        return invalid("either all messages of a publish have ids or none");
    }
    let in_order = |(place, id): (usize, &&str)| {
        let number = id
            .strip_prefix(base)
            .and_then(|rest| rest.strip_prefix(':'));
        number == Some(&*place.to_string())
    };
    if ids.len() > 1 && !ids.iter().enumerate().all(in_order) {
        return invalid("ids of several messages must be `base:0`, `base:1` and so on");
    }
    Ok(Some(base.to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::wire::ably::Data;

    fn with_ids(ids: &[Option<&str>]) -> Vec<Message> {
        let message = |id: &Option<&str>| Message {
            id: id.map(str::to_owned),
            ..Message::default()
        };
        ids.iter().map(message).collect()
    }

    fn code(messages: Vec<Message>) -> ErrorCode {
        admit(messages, &ClientId::Any, 100).unwrap_err().code
    }

    #[test]
    fn ids_of_a_publish_share_a_base() {
        let base =
            |ids: &[Option<&str>]| admit(with_ids(ids), &ClientId::Any, 100).map(|a| a.base_id);
        assert_eq!(base(&[None]), Ok(None));
        assert_eq!(base(&[None, None]), Ok(None));
        for (id, expected) in [
            ("x", "x"),
            ("x:0", "x"),
            ("x:1", "x:1"),
            ("a/b+c:0:0", "a/b+c:0"),
        ] {
            assert_eq!(base(&[Some(id)]), Ok(Some(expected.to_owned())), "{id}");
        }
        assert_eq!(base(&[Some("x:0"), Some("x:1")]), Ok(Some("x".to_owned())));
        let long = "x".repeat(513);
        let bad: [&[Option<&str>]; 8] = [
            &[Some("")],
            &[Some(":0")],
            &[Some(&long)],
            &[Some("x:0"), None],
            &[None, Some("x:1")],
            &[Some("x:0"), Some("x:0")],
            &[Some("x:0"), Some("y:1")],
            &[Some("x"), Some("x:1")],
        ];
        for ids in bad {
            assert_eq!(
                base(ids).unwrap_err().code,
                ErrorCode::InvalidMessageId,
                "{ids:?}"
            );
        }
    }

    #[test]
    fn sizes_and_counts_are_limited() {
        let of_size = |bytes: usize| Message {
            name: Some("n".repeat(10)),
            data: Some(Data::Text("d".repeat(bytes - 10))),
            ..Message::default()
        };
        let admitted = admit(vec![of_size(60), of_size(40)], &ClientId::Any, 100).unwrap();
        assert_eq!(admitted.count, 2);
        assert_eq!(
            code(vec![of_size(60), of_size(41)]),
            ErrorCode::MessageTooLarge
        );
        assert_eq!(code(vec![]), ErrorCode::InvalidPublish);
        assert_eq!(
            code(vec![Message::default(); 1001]),
            ErrorCode::TooManyMessages
        );
        assert!(admit(vec![Message::default(); 1000], &ClientId::Any, 100).is_ok());
        // The id that the server adds counts too.
        let me = ClientId::Exactly("m".repeat(50));
        assert_eq!(
            admit(vec![of_size(60)], &me, 100).unwrap_err().code,
            ErrorCode::MessageTooLarge
        );
    }

    #[test]
    fn a_client_says_nothing_that_is_the_servers_to_say() {
        let message = Message {
            connection_id: Some("other".into()),
            timestamp: Some(1),
            serial: Some("s".into()),
            action: Some(MessageAction::Create),
            version: Some(crate::wire::ably::Version::default()),
            ..Message::default()
        };
        let admitted = admit(vec![message], &ClientId::Exactly("me".into()), 100).unwrap();
        let expected = Message {
            client_id: Some("me".into()),
            ..Message::default()
        };
        assert_eq!(admitted.messages, [expected]);
    }

    #[test]
    fn messages_that_cannot_be_stored_are_refused() {
        let update = Message {
            action: Some(MessageAction::Update),
            ..Message::default()
        };
        assert_eq!(
            code(vec![Message::default(), update]),
            ErrorCode::InvalidPublish
        );
        let behalf = Message {
            connection_key: Some("k".into()),
            ..Message::default()
        };
        assert_eq!(code(vec![behalf]), ErrorCode::InvalidConnectionKey);
        let garbled = Message {
            data: Some(Data::Text("*".into())),
            encoding: Some("base64".into()),
            ..Message::default()
        };
        assert_eq!(code(vec![garbled]), ErrorCode::InvalidMessageData);
        let other = Message {
            client_id: Some("you".into()),
            ..Message::default()
        };
        let me = ClientId::Exactly("me".into());
        assert_eq!(
            admit(vec![other], &me, 100).unwrap_err().code,
            ErrorCode::InvalidClientId
        );
    }

    fn with_extras(extras: &[serde_json::Value]) -> Vec<Message> {
        let message = |extras: &serde_json::Value| Message {
            extras: extras.as_object().cloned(),
            ..Message::default()
        };
        extras.iter().map(message).collect()
    }

    #[test]
    fn extras_hold_what_the_protocol_knows() {
        let good = [
            json!({}),
            json!({"headers": {"h": 1, "deep": {"x": [null]}}, "ref": {"timeserial": "s"}}),
            json!({"push": {}, "delta": {}, "ephemeral": false, "privileged": "whatever"}),
        ];
        for extras in good {
            let admitted = admit(
                with_extras(std::slice::from_ref(&extras)),
                &ClientId::Any,
                1000,
            )
            .unwrap();
            assert_eq!(admitted.messages[0].extras, extras.as_object().cloned());
        }
        let bad = [
            json!({"other": 1}),
            json!({"Headers": {}}),
            json!({"headers": "h"}),
            json!({"push": []}),
            json!({"ref": null}),
            json!({"delta": true}),
            json!({"ephemeral": "true"}),
            json!({"ephemeral": 1}),
        ];
        for extras in bad {
            let refused = code(with_extras(&[json!({}), extras.clone()]));
            assert_eq!(refused, ErrorCode::InvalidExtras, "{extras}");
            let event = PresenceMessage {
                action: Some(PresenceAction::Enter),
                extras: extras.as_object().cloned(),
                ..PresenceMessage::default()
            };
            let me = ClientId::Exactly("me".into());
            let refused = check_presence(vec![event], &me, 1000).unwrap_err();
            assert_eq!(refused.code, ErrorCode::InvalidExtras, "{extras}");
        }
        // What a client wrote is told back to it only in part.
        let long = "k".repeat(5000);
        let refused = admit(with_extras(&[json!({ long: 1 })]), &ClientId::Any, 10_000);
        assert!(refused.unwrap_err().message.len() < 200);
    }

    #[test]
    fn a_publish_is_ephemeral_as_a_whole_or_not() {
        let (yes, no) = (json!({"ephemeral": true}), json!({"ephemeral": false}));
        let ephemeral = |extras: &[serde_json::Value]| {
            admit(with_extras(extras), &ClientId::Any, 1000).map(|a| a.ephemeral)
        };
        assert_eq!(ephemeral(&[json!({})]), Ok(false));
        assert_eq!(ephemeral(&[no.clone(), json!({})]), Ok(false));
        assert_eq!(ephemeral(&[yes.clone(), yes.clone()]), Ok(true));
        for mixed in [[yes.clone(), no], [json!({}), yes]] {
            let error = ephemeral(&mixed).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidExtras, "{mixed:?}");
        }
    }

    #[test]
    fn privileged_extras_are_noticed_wherever_they_are() {
        let privileged = |extras: &[serde_json::Value]| {
            let admitted = admit(with_extras(extras), &ClientId::Any, 1000);
            admitted.unwrap().privileged
        };
        assert!(!privileged(&[
            json!({}),
            json!({"headers": {"privileged": 1}})
        ]));
        for value in [json!({}), json!(null), json!(false)] {
            assert!(privileged(&[json!({}), json!({"privileged": value})]));
        }
    }

    #[test]
    fn messages_of_a_publish_are_on_behalf_of_one_connection() {
        let with_keys = |keys: &[Option<&str>]| -> Vec<Message> {
            let message = |key: &Option<&str>| Message {
                connection_key: key.map(str::to_owned),
                ..Message::default()
            };
            keys.iter().map(message).collect()
        };
        let table: [(&[Option<&str>], Option<&str>); 4] = [
            (&[], None),
            (&[None, None], None),
            (&[Some("k")], Some("k")),
            (&[Some("k"), Some("k")], Some("k")),
        ];
        for (keys, taken) in table {
            let mut messages = with_keys(keys);
            let key = take_connection_key(&mut messages).unwrap();
            assert_eq!(key.as_deref(), taken, "{keys:?}");
            assert!(
                messages
                    .iter()
                    .all(|message| message.connection_key.is_none())
            );
        }
        let bad: [&[Option<&str>]; 4] = [
            &[Some("k"), Some("l")],
            &[Some("k"), None],
            &[None, Some("k")],
            &[Some("k"), Some("k"), None],
        ];
        for keys in bad {
            let error = take_connection_key(&mut with_keys(keys)).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidConnectionKey, "{keys:?}");
        }
    }
}
