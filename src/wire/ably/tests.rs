//! Golden frames as official client libraries wrote them, round trips, and bytes that mean harm.

mod vectors;

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use serde_json::json;

use super::*;

fn json_frame(text: &str) -> Frame {
    decode(Format::Json, text.as_bytes()).unwrap()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn msgpack_frame(hex: &str) -> Frame {
    decode(Format::MsgPack, &unhex(hex)).unwrap()
}

/// A frame as a JavaScript client sent it in MessagePack, and the same in JSON (appendix A).
const CLIENT_FRAMES: &[(&str, &str)] = &[
    (
        "84a6616374696f6e0aa76368616e6e656ca76e733a63682f31a6706172616d7381a6726577696e64a131a5666c616773ce000f0000",
        r#"{"action":10,"channel":"ns:ch/1","params":{"rewind":"1"},"flags":983040}"#,
    ),
    (
        "84a6616374696f6e0fa76368616e6e656ca76e733a63682f31a86d657373616765739185a46e616d65a26576a464617461a77b2261223a317da6616374696f6e00a8656e636f64696e67a46a736f6ea473697a6509a96d736753657269616c00",
        r#"{"action":15,"channel":"ns:ch/1","messages":[{"name":"ev","data":"{\"a\":1}","action":0,"encoding":"json","size":9}],"msgSerial":0}"#,
    ),
    (
        "84a6616374696f6e0fa76368616e6e656ca76e733a63682f31a86d657373616765739184a46e616d65a362696ea464617461c403010203a6616374696f6e00a473697a6506a96d736753657269616c01",
        r#"{"action":15,"channel":"ns:ch/1","messages":[{"name":"bin","data":"AQID","action":0,"encoding":"base64","size":6}],"msgSerial":1}"#,
    ),
    (
        "84a6616374696f6e0fa76368616e6e656ca76e733a63682f31a86d657373616765739284a46e616d65a161a464617461a178a6616374696f6e00a473697a650284a46e616d65a162a665787472617381a76865616465727381a168a131a6616374696f6e00a473697a6516a96d736753657269616c02",
        r#"{"action":15,"channel":"ns:ch/1","messages":[{"name":"a","data":"x","action":0,"size":2},{"name":"b","data":null,"extras":{"headers":{"h":"1"}},"action":0,"size":22}],"msgSerial":2}"#,
    ),
    (
        "84a6616374696f6e0ea76368616e6e656ca76e733a63682f31a870726573656e63659182a464617461a26869a6616374696f6e02a96d736753657269616c03",
        r#"{"action":14,"channel":"ns:ch/1","presence":[{"action":2,"data":"hi"}],"msgSerial":3}"#,
    ),
    (
        "82a6616374696f6e00a26964b037313434313937343335393939373634",
        r#"{"action":0,"id":"7144197435999764"}"#,
    ),
    (
        "82a6616374696f6e11a46175746881ab616363657373546f6b656eaf6170702e544f4b454e535452494e47",
        r#"{"action":17,"auth":{"accessToken":"app.TOKENSTRING"}}"#,
    ),
    (
        "85a6616374696f6e0aa76368616e6e656ca76e733a63682f31a6706172616d7381a6726577696e64a131ad6368616e6e656c53657269616cb530313739353330393530333936332d303034407331a5666c616773ce000f0000",
        r#"{"action":10,"channel":"ns:ch/1","params":{"rewind":"1"},"channelSerial":"01795309503963-004@s1","flags":983040}"#,
    ),
    (
        "82a6616374696f6e0ca76368616e6e656ca76e733a63682f31",
        r#"{"action":12,"channel":"ns:ch/1"}"#,
    ),
    ("81a6616374696f6e07", r#"{"action":7}"#),
];

#[test]
fn client_frames_mean_the_same_in_both_formats() {
    for (hex, json) in CLIENT_FRAMES {
        assert_eq!(msgpack_frame(hex), json_frame(json), "{json}");
    }
    let publish = msgpack_frame(CLIENT_FRAMES[2].0);
    assert_eq!(publish.action, Action::Message);
    assert_eq!(publish.msg_serial, Some(1));
    assert_eq!(
        publish.messages[0].data,
        Some(Data::Binary(Bytes::from_static(&[1, 2, 3])))
    );
    assert_eq!(publish.messages[0].encoding, None);
    assert_eq!(publish.messages[0].size(), 6);
    let attach = msgpack_frame(CLIENT_FRAMES[0].0);
    assert_eq!(
        attach.flags,
        Some(flags::PRESENCE | flags::PUBLISH | flags::SUBSCRIBE | flags::PRESENCE_SUBSCRIBE)
    );
    assert_eq!(attach.params["rewind"], "1");
    let pair = json_frame(CLIENT_FRAMES[3].1);
    assert_eq!(
        pair.messages[1].extras,
        json!({"headers": {"h": "1"}}).as_object().cloned()
    );
    // What a client library says a message's size is: name, data, JSON of extras.
    assert_eq!(pair.messages[1].size(), 22);
}

/// Server frames that client libraries accepted, byte for byte.
#[test]
fn server_frames_are_written_as_captured() {
    let serials = |serials: &[&str]| PublishResult {
        serials: serials.iter().map(|s| Some((*s).to_owned())).collect(),
    };
    let ack = |msg_serial, res| Frame {
        msg_serial: Some(msg_serial),
        count: Some(1),
        res: vec![res],
        ..Frame::new(Action::Ack)
    };
    let attached = Frame {
        channel_serial: Some("01795309503950-000@s1".into()),
        flags: Some(983_040),
        params: [("rewind".to_owned(), "1".to_owned())].into(),
        ..Frame::of_channel(Action::Attached, "ns:ch/1")
    };
    let captured = [
        (
            attached,
            "85a6616374696f6e0ba76368616e6e656ca76e733a63682f31ad6368616e6e656c53657269616cb530313739353330393530333935302d303030407331a5666c616773ce000f0000a6706172616d7381a6726577696e64a131",
        ),
        (
            ack(0, serials(&["01795309503954-001@s1:000"])),
            "84a6616374696f6e01a96d736753657269616c00a5636f756e7401a37265739181a773657269616c7391b930313739353330393530333935342d3030314073313a303030",
        ),
        (
            ack(
                2,
                serials(&["01795309503960-003@s1:000", "01795309503960-003@s1:001"]),
            ),
            "84a6616374696f6e01a96d736753657269616c02a5636f756e7401a37265739181a773657269616c7392b930313739353330393530333936302d3030334073313a303030b930313739353330393530333936302d3030334073313a303031",
        ),
        (
            Frame::of_channel(Action::Detached, "ns:ch/1"),
            "82a6616374696f6e0da76368616e6e656ca76e733a63682f31",
        ),
        (Frame::new(Action::Closed), "81a6616374696f6e08"),
    ];
    for (frame, hex) in captured {
        assert_eq!(encode(Format::MsgPack, &frame), unhex(hex), "{frame:?}");
        assert_eq!(decode(Format::MsgPack, &unhex(hex)).unwrap(), frame);
    }
    let details = ConnectionDetails {
        client_id: Some("me".into()),
        connection_key: Some("conn1!key".into()),
        max_message_size: Some(65536),
        max_frame_size: Some(524_288),
        max_inbound_rate: Some(250),
        max_outbound_rate: None,
        connection_state_ttl: Some(120_000),
        max_idle_interval: Some(15_000),
        server_id: Some("fake".into()),
    };
    let connected = Frame {
        connection_id: Some("conn1".into()),
        connection_details: Some(details),
        ..Frame::new(Action::Connected)
    };
    assert_eq!(
        encode(Format::Json, &connected),
        r#"{"action":4,"connectionId":"conn1","connectionDetails":{"clientId":"me","connectionKey":"conn1!key","maxMessageSize":65536,"maxFrameSize":524288,"maxInboundRate":250,"connectionStateTtl":120000,"maxIdleInterval":15000,"serverId":"fake"}}"#
    );
}

#[test]
fn older_clients_leave_out_what_newer_ones_send() {
    let frame = json_frame(
        r#"{"action":15,"channel":"ns:ch/1","messages":[{"name":"bin","encoding":"base64","data":"AQID"}],"msgSerial":1}"#,
    );
    assert_eq!(frame.messages[0].action, None);
    assert_eq!(
        frame.messages[0].data,
        Some(Data::Binary(Bytes::from_static(&[1, 2, 3])))
    );
    let attach = json_frame(r#"{"action":10,"channel":"c","channelSerial":"s","flags":983072}"#);
    assert_eq!(
        attach.flags.unwrap() & flags::ATTACH_RESUME,
        flags::ATTACH_RESUME
    );
}

#[test]
fn a_connection_error_has_no_channel_key() {
    let error = ErrorInfo::new(ErrorCode::InvalidCredentials, "no such key");
    let frame = Frame {
        error: Some((&error).into()),
        ..Frame::new(Action::Error)
    };
    let text = encode(Format::Json, &frame);
    assert_eq!(
        text,
        r#"{"action":9,"error":{"code":40101,"statusCode":401,"message":"no such key"}}"#
    );
    let read = decode(Format::Json, &text).unwrap();
    assert_eq!(ErrorInfo::from(read.error.as_ref().unwrap()), error);
}

#[test]
fn base64_is_a_step_of_json_only() {
    let mut message = Message {
        data: Some(Data::Binary(Bytes::from_static(b"\xff\x00"))),
        encoding: Some("utf-8/cipher+aes-256-cbc".into()),
        ..Message::default()
    };
    let json = encode_messages(Format::Json, std::slice::from_ref(&message));
    assert_eq!(
        json,
        r#"[{"data":"/wA=","encoding":"utf-8/cipher+aes-256-cbc/base64"}]"#
    );
    assert_eq!(
        decode_messages(Format::Json, &json).unwrap(),
        [message.clone()]
    );
    let packed = encode_messages(Format::MsgPack, std::slice::from_ref(&message));
    assert_eq!(
        decode_messages(Format::MsgPack, &packed).unwrap(),
        [message.clone()]
    );
    message.encoding = None;
    let json = encode_messages(Format::Json, &[message]);
    assert_eq!(json, r#"[{"data":"/wA=","encoding":"base64"}]"#);
}

#[test]
fn data_that_is_not_base64_is_kept_and_told() {
    let bad = decode_messages(Format::Json, br#"{"data":"*","encoding":"utf-8/base64"}"#).unwrap();
    assert!(bad[0].has_invalid_base64());
    assert_eq!(bad[0].data, Some(Data::Text("*".into())));
    let unpadded = decode_messages(Format::Json, br#"{"data":"/wA","encoding":"base64"}"#).unwrap();
    assert_eq!(
        unpadded[0].data,
        Some(Data::Binary(Bytes::from_static(b"\xff\x00")))
    );
    assert!(!unpadded[0].has_invalid_base64());
    // A step that merely ends in the same letters is another step.
    let other = decode_messages(Format::Json, br#"{"data":"AQID","encoding":"xbase64"}"#).unwrap();
    assert_eq!(other[0].encoding.as_deref(), Some("xbase64"));
}

#[test]
fn json_values_as_data_become_their_text() {
    let body = br#"[{"data":{"k":[1,null]}},{"data":[1.5],"encoding":"utf-8"},{"data":7},{"data":{},"encoding":"json"}]"#;
    let read = decode_messages(Format::Json, body).unwrap();
    let seen: Vec<_> = read
        .iter()
        .map(|m| (m.data.clone().unwrap(), m.encoding.as_deref().unwrap()))
        .collect();
    let text = |text: &str| Data::Text(text.to_owned());
    assert_eq!(
        seen,
        [
            (text(r#"{"k":[1,null]}"#), "json"),
            (text("[1.5]"), "utf-8/json"),
            (text("7"), "json"),
            (text("{}"), "json")
        ]
    );
    // {"data": {"k": 1}} in MessagePack.
    let packed = decode_messages(Format::MsgPack, &unhex("81a46461746181a16b01")).unwrap();
    assert_eq!(
        (packed[0].data.clone(), packed[0].encoding.as_deref()),
        (Some(text(r#"{"k":1}"#)), Some("json"))
    );
}

#[test]
fn presence_is_read_as_clients_write_it() {
    let packed = msgpack_frame(CLIENT_FRAMES[4].0);
    let expected = PresenceMessage {
        action: Some(PresenceAction::Enter),
        data: Some(Data::Text("hi".into())),
        ..PresenceMessage::default()
    };
    assert_eq!(packed.presence, [expected]);
    // An older client enters again, with the id of another connection.
    let old = json_frame(
        r#"{"action":14,"channel":"c","presence":[{"id":"conn1:3:0","clientId":"me","action":2.0,"data":null,"new":1}],"msgSerial":0}"#,
    );
    let expected = PresenceMessage {
        id: Some("conn1:3:0".into()),
        action: Some(PresenceAction::Enter),
        client_id: Some("me".into()),
        ..PresenceMessage::default()
    };
    assert_eq!(old.presence, [expected]);
    let values = json_frame(
        r#"{"action":14,"presence":[{"data":{"k":1}},{"data":"/wA","encoding":"base64"},{"data":"*","encoding":"base64"},{"action":9}]}"#,
    );
    let [value, binary, garbled, unknown] = &values.presence[..] else {
        panic!("{values:?}")
    };
    assert_eq!(value.data, Some(Data::Text(r#"{"k":1}"#.into())));
    assert_eq!(value.encoding.as_deref(), Some("json"));
    assert_eq!((binary.size(), binary.encoding.as_deref()), (2, None));
    assert!(garbled.has_invalid_base64() && !binary.has_invalid_base64());
    assert_eq!(unknown.action, Some(PresenceAction::Unknown(9)));
    for bad in [
        r#"{"presence":{}}"#,
        r#"{"presence":[{"action":"enter"}]}"#,
        r#"{"presence":[[2]]}"#,
        r#"{"presence":[{"extras":[]}]}"#,
    ] {
        assert!(decode(Format::Json, bad.as_bytes()).is_err(), "{bad}");
    }
    let page = encode_presence(Format::Json, &values.presence[1..2]);
    assert_eq!(page, r#"[{"data":"/wA=","encoding":"base64"}]"#);
}

#[test]
fn a_rest_body_in_msgpack_as_captured() {
    let hex = "9285a46e616d65a178a464617461a131a26964ae7464425577614f766b572b6c3a30a6616374696f6e00a473697a650286a46e616d65a179a464617461a77b226b223a317da26964ae7464425577614f766b572b6c3a31a6616374696f6e00a8656e636f64696e67a46a736f6ea473697a6508";
    let read = decode_messages(Format::MsgPack, &unhex(hex)).unwrap();
    assert_eq!(read[0].id.as_deref(), Some("tdBUwaOvkW+l:0"));
    assert_eq!(read[1].encoding.as_deref(), Some("json"));
    let text = encode_messages(Format::Json, &read);
    let size = b"size";
    assert!(
        !text.windows(4).any(|w| w == size),
        "size is a client's private business"
    );
}

#[test]
fn a_connection_key_is_never_written() {
    let read = decode_messages(Format::Json, br#"{"connectionKey":"secret","data":"x"}"#).unwrap();
    assert_eq!(read[0].connection_key.as_deref(), Some("secret"));
    for format in [Format::Json, Format::MsgPack] {
        let written = encode_messages(format, &read);
        assert!(!written.windows(6).any(|w| w == b"secret"));
    }
}

#[test]
fn numbers_of_any_width_are_one_number() {
    // action and msgSerial as fixint, uint8, uint64, int64, float32, float64.
    for seven in [
        "07",
        "cc07",
        "cf0000000000000007",
        "d30000000000000007",
        "ca40e00000",
        "cb401c000000000000",
    ] {
        let hex = format!("82a6616374696f6e{seven}a96d736753657269616c{seven}");
        let frame = msgpack_frame(&hex);
        assert_eq!(
            (frame.action, frame.msg_serial),
            (Action::Close, Some(7)),
            "{seven}"
        );
    }
    assert_eq!(
        json_frame(r#"{"action":7.0,"msgSerial":7e0}"#).msg_serial,
        Some(7)
    );
    assert_eq!(json_frame(r#"{"action":99}"#).action, Action::Unknown(99));
    assert_eq!(json_frame(r#"{"action":-1}"#).action.number(), -1);
    assert_eq!(json_frame("{}").action, Action::Unknown(-1));
    for bad in [
        r#"{"action":1.5}"#,
        r#"{"action":"1"}"#,
        r#"{"action":1,"msgSerial":-1}"#,
        r#"{"action":1e300}"#,
    ] {
        assert!(decode(Format::Json, bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn unknown_fields_and_nulls_are_skipped_and_other_shapes_refused() {
    let frame = json_frame(
        r#"{"action":15,"new":{"a":[{}]},"id":null,"params":{"a":1,"b":true,"c":"x"},"messages":[{"x":1,"name":null}]}"#,
    );
    assert_eq!((frame.id, frame.messages), (None, vec![Message::default()]));
    assert_eq!(frame.params["a"], "1");
    assert_eq!(frame.params["b"], "true");
    for bad in [
        "",
        "[]",
        "[15]",
        "null",
        "7",
        r#"{"action":7}x"#,
        r#"{"action":15,"messages":{}}"#,
        r#"{"action":15,"messages":[["n"]]}"#,
        r#"{"messages":[{"extras":[]}]}"#,
    ] {
        assert!(decode(Format::Json, bad.as_bytes()).is_err(), "{bad}");
    }
    for bad in [
        "",
        "90",
        "81a6616374696f6e07c0",
        "dfffffffff",
        "81a6616374696f6e",
        "8107a0",
    ] {
        assert!(decode(Format::MsgPack, &unhex(bad)).is_err(), "{bad}");
    }
}

/// Each nest opens half a mebibyte of arrays or maps: where a known field, an unknown field, data, extras or
/// the top level is expected.
#[test]
fn depth_bombs_cost_an_error_not_the_stack() {
    let deep = 256 * 1024;
    for prefix in [
        "",
        r#"{"x":"#,
        r#"{"params":{"x":"#,
        r#"{"messages":[{"data":"#,
        r#"{"presence":[{"data":"#,
        r#"{"messages":[{"extras":{"a":"#,
    ] {
        for open in ["[", r#"{"a":"#] {
            let bomb = format!("{prefix}{}", open.repeat(deep));
            assert!(decode(Format::Json, bomb.as_bytes()).is_err(), "{prefix}");
            assert!(decode_messages(Format::Json, bomb.as_bytes()).is_err());
        }
    }
    // {"x": …}, {"messages": [{"data": …}]}, {"messages": [{"extras": {"a": …}}]}
    for prefix in [
        "",
        "81a178",
        "81a86d657373616765739181a464617461",
        "81a86d657373616765739181a665787472617381a161",
    ] {
        for open in [&[0x91_u8][..], &[0x81, 0xa1, 0x61]] {
            let mut bomb = unhex(prefix);
            bomb.extend(open.repeat(deep));
            assert!(decode(Format::MsgPack, &bomb).is_err(), "{prefix}");
            assert!(decode_messages(Format::MsgPack, &bomb).is_err());
        }
    }
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z0-9:!-]{0,12}", "\\PC{0,12}"]
}

fn extras() -> impl Strategy<Value = serde_json::Map<String, serde_json::Value>> {
    let leaf = prop_oneof![
        Just(json!(null)),
        any::<bool>().prop_map(|v| json!(v)),
        any::<i64>().prop_map(|v| json!(v)),
        any::<u64>().prop_map(|v| json!(v)),
        text().prop_map(|v| json!(v)),
    ];
    let value = leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(|v| json!(v)),
            btree_map(text(), inner, 0..4).prop_map(|v| json!(v)),
        ]
    });
    btree_map(text(), value, 0..4).prop_map(|map| map.into_iter().collect())
}

pub(crate) fn message() -> impl Strategy<Value = Message> {
    let data = option::of(prop_oneof![
        text().prop_map(Data::Text),
        vec(any::<u8>(), 0..40).prop_map(|bytes| Data::Binary(bytes.into())),
    ]);
    let encoding =
        option::of("(utf-8|json|cipher\\+aes-128-cbc|utf-8/cipher\\+aes-256-cbc|vcdiff)");
    let version = option::of((option::of(text()), option::of(0..u64::MAX / 2)));
    let names = (
        option::of(text()),
        option::of(text()),
        option::of(text()),
        option::of(text()),
        option::of(text()),
    );
    (
        names,
        data,
        encoding,
        option::of(extras()),
        option::of(0..u64::MAX / 2),
        option::of(0..8_i64),
        version,
    )
        .prop_map(
            |(
                (id, name, client_id, connection_id, serial),
                data,
                encoding,
                extras,
                timestamp,
                action,
                version,
            )| Message {
                id,
                name,
                data,
                encoding,
                client_id,
                connection_id,
                connection_key: None,
                extras,
                timestamp,
                action: action.map(MessageAction::from_number),
                serial,
                version: version.map(|(serial, timestamp)| Version { serial, timestamp }),
            },
        )
}

pub(crate) fn presence() -> impl Strategy<Value = PresenceMessage> {
    (message(), option::of(0..6_i64)).prop_map(|(message, action)| PresenceMessage {
        id: message.id,
        action: action.map(PresenceAction::from_number),
        client_id: message.client_id,
        connection_id: message.connection_id,
        data: message.data,
        encoding: message.encoding,
        extras: message.extras,
        timestamp: message.timestamp,
    })
}

fn frame() -> impl Strategy<Value = Frame> {
    let texts = (
        option::of(text()),
        option::of(text()),
        option::of(text()),
        option::of(text()),
    );
    let number = || option::of(0..u64::MAX / 2);
    let error = option::of((number(), number(), option::of(text())).prop_map(
        |(code, status_code, message)| ErrorBody {
            code,
            status_code,
            message,
            href: None,
        },
    ));
    let details = option::of((option::of(text()), option::of(text()), number()).prop_map(
        |(client_id, connection_key, max_idle_interval)| ConnectionDetails {
            client_id,
            connection_key,
            max_idle_interval,
            ..ConnectionDetails::default()
        },
    ));
    let res = vec(
        vec(option::of(text()), 0..3).prop_map(|serials| PublishResult { serials }),
        0..3,
    );
    let auth = option::of(option::of(text()).prop_map(|access_token| Auth { access_token }));
    let lists = (
        btree_map(text(), text(), 0..3),
        (vec(message(), 0..4), vec(presence(), 0..4)),
        res,
        auth,
    );
    let action = prop_oneof![0..30_i64, any::<i64>()];
    (
        action,
        texts,
        (number(), number(), number(), number()),
        error,
        details,
        lists,
    )
        .prop_map(
            |(
                action,
                (id, connection_id, channel, channel_serial),
                numbers,
                error,
                connection_details,
                lists,
            )| Frame {
                action: Action::from_number(action),
                id,
                connection_id,
                connection_details,
                channel,
                channel_serial,
                msg_serial: numbers.0,
                count: numbers.1,
                timestamp: numbers.2,
                flags: numbers.3,
                error,
                params: lists.0,
                messages: lists.1.0,
                presence: lists.1.1,
                res: lists.2,
                auth: lists.3,
            },
        )
}

proptest! {
    #[test]
    fn frames_round_trip(frame in frame()) {
        for format in [Format::Json, Format::MsgPack] {
            let bytes = encode(format, &frame);
            prop_assert_eq!(decode(format, &bytes).unwrap(), frame.clone());
        }
        let json: serde_json::Value = serde_json::from_slice(&encode(Format::Json, &frame)).unwrap();
        prop_assert!(json.as_object().unwrap().values().all(|value| !value.is_null()));
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        for format in [Format::Json, Format::MsgPack] {
            drop(decode(format, &bytes));
            drop(decode_messages(format, &bytes));
        }
    }

    /// Real frames with one byte changed or cut reach deeper than random bytes.
    #[test]
    fn damaged_frames_are_decoded_or_refused(frame in frame(), at in any::<prop::sample::Index>(), byte: u8, cut: bool) {
        for format in [Format::Json, Format::MsgPack] {
            let mut bytes = encode(format, &frame).to_vec();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] = byte }
            drop(decode(format, &bytes));
        }
    }
}
