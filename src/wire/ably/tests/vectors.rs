//! The golden bytes in `proto/vectors`: one frame of every kind and shape, in both formats.
//!
//! Other codecs are held against the same file (`tests/sdk/vectors.test.mjs`), so a change of these bytes is a change of
//! what clients see. `cargo test --lib print_vectors -- --ignored --nocapture` prints the file anew.

use serde_json::{Value, json};

use crate::wire::ably::tests::unhex;
use crate::wire::ably::{Action, Format, Frame, decode, encode};

const FILE: &str = include_str!("../../../../proto/vectors/frames.json");

#[derive(serde::Deserialize)]
struct Vector {
    name: String,
    /// Who sends such frames: `client`, `server` or `both`.
    sender: String,
    json: String,
    msgpack: String,
}

fn vectors() -> Vec<Vector> {
    serde_json::from_str(FILE).unwrap()
}

#[test]
fn golden_bytes_are_read_and_written_as_they_are() {
    for vector in vectors() {
        let name = &vector.name;
        let frame = decode(Format::Json, vector.json.as_bytes()).unwrap();
        let packed = unhex(&vector.msgpack);
        assert_eq!(decode(Format::MsgPack, &packed).unwrap(), frame, "{name}");
        assert_eq!(encode(Format::Json, &frame), vector.json, "{name}");
        assert_eq!(encode(Format::MsgPack, &frame), packed, "{name}");
    }
}

#[test]
fn every_kind_of_frame_has_golden_bytes() {
    let frames: Vec<Frame> = vectors()
        .iter()
        .map(|vector| decode(Format::Json, vector.json.as_bytes()).unwrap())
        .collect();
    for action in Action::ALL {
        assert!(
            frames.iter().any(|frame| frame.action == *action),
            "{action:?}"
        );
    }
    let has = |what: &str, has: fn(&Frame) -> bool| assert!(frames.iter().any(has), "no {what}");
    has("connection details", |f| f.connection_details.is_some());
    has("error", |f| f.error.is_some());
    has("params", |f| !f.params.is_empty());
    has("messages", |f| !f.messages.is_empty());
    has("presence", |f| !f.presence.is_empty());
    has("serials", |f| !f.res.is_empty());
    has("token", |f| f.auth.is_some());
    has("timestamp", |f| f.timestamp.is_some());
    assert!(
        vectors()
            .iter()
            .all(|v| ["client", "server", "both"].contains(&v.sender.as_str()))
    );
}

#[test]
fn the_file_holds_the_frames_that_this_table_gives() {
    assert_eq!(FILE, printed());
}

#[test]
#[ignore = "prints the file of vectors"]
fn print_vectors() {
    println!("{}", printed());
}

fn printed() -> String {
    let lines = table().into_iter().map(|(name, sender, value)| {
        let frame = decode(Format::Json, value.to_string().as_bytes()).unwrap();
        let text = String::from_utf8(encode(Format::Json, &frame).to_vec()).unwrap();
        let written: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(written, value, "{name}: not all of it is understood");
        let packed = encode(Format::MsgPack, &frame);
        let hex: String = packed.iter().map(|byte| format!("{byte:02x}")).collect();
        let (name, text) = (json!(name), json!(text));
        format!("  {{\"name\":{name},\"sender\":\"{sender}\",\n   \"json\":{text},\n   \"msgpack\":\"{hex}\"}}")
    });
    format!("[\n{}\n]\n", lines.collect::<Vec<_>>().join(",\n"))
}

const SERIAL: &str = "3f2a-0000000000000084-0000";
const MESSAGE_SERIAL: &str = "3f2a-0000000000000084-0000:000";

fn table() -> Vec<(&'static str, &'static str, Value)> {
    let mut table = connection_frames();
    table.extend(channel_frames());
    table.extend(message_frames());
    table.extend(presence_frames());
    table
}

fn connection_frames() -> Vec<(&'static str, &'static str, Value)> {
    let error = |code: u32, status: u16, text: &str| json!({"code": code, "statusCode": status, "message": text});
    vec![
        ("heartbeat: unasked", "server", json!({"action": 0})),
        (
            "heartbeat: ping and its echo",
            "both",
            json!({"action": 0, "id": "7144197435999764"}),
        ),
        ("connect", "client", json!({"action": 3})),
        (
            "connected",
            "server",
            json!({"action": 4, "connectionId": "conn1", "connectionDetails": {
            "clientId": "me", "connectionKey": "conn1!key", "maxMessageSize": 65536, "maxFrameSize": 524_288,
            "maxInboundRate": 250, "maxOutboundRate": 250, "connectionStateTtl": 120_000, "maxIdleInterval": 15_000,
            "serverId": "2"}}),
        ),
        (
            "connected: anonymous, not the connection that was asked for",
            "server",
            json!({"action": 4,
            "connectionId": "conn2", "connectionDetails": {"connectionKey": "conn2!key"},
            "error": error(80018, 400, "connection cannot be resumed")}),
        ),
        ("disconnect", "client", json!({"action": 5})),
        (
            "disconnected",
            "server",
            json!({"action": 6, "error": error(50310, 503, "node is shutting down")}),
        ),
        ("close", "client", json!({"action": 7})),
        ("closed", "server", json!({"action": 8})),
        (
            "error: of the connection",
            "server",
            json!({"action": 9, "error": {"code": 40101, "statusCode": 401,
            "message": "invalid credentials", "href": "https://firth.example/errors/40101"}}),
        ),
        (
            "auth: a token",
            "client",
            json!({"action": 17, "auth": {"accessToken": "app.TOKENSTRING"}}),
        ),
        ("auth: asked for", "server", json!({"action": 17})),
        ("activate", "client", json!({"action": 18})),
    ]
}

fn channel_frames() -> Vec<(&'static str, &'static str, Value)> {
    let channel = "ns:ch/1";
    vec![
        (
            "error: of a channel",
            "server",
            json!({"action": 9, "channel": channel,
            "error": {"code": 40160, "statusCode": 401, "message": "operation not permitted"}}),
        ),
        (
            "attach",
            "client",
            json!({"action": 10, "channel": channel, "flags": 983_040, "params": {"rewind": "1"}}),
        ),
        (
            "attach: again, after a serial",
            "client",
            json!({"action": 10, "channel": channel,
            "channelSerial": SERIAL, "flags": 983_072}),
        ),
        (
            "attach: with a qualifier",
            "client",
            json!({"action": 10, "channel": "[?rewind=1]é"}),
        ),
        (
            "attached",
            "server",
            json!({"action": 11, "channel": channel, "channelSerial": SERIAL,
            "flags": 983_043, "params": {"modes": "publish,subscribe", "rewind": "1"}}),
        ),
        (
            "attached: continuity is lost",
            "server",
            json!({"action": 11, "channel": channel, "channelSerial": SERIAL,
            "error": {"code": 90003, "statusCode": 404, "message": "no longer retained"}, "flags": 983_040}),
        ),
        (
            "detach",
            "client",
            json!({"action": 12, "channel": channel}),
        ),
        (
            "detached",
            "server",
            json!({"action": 13, "channel": channel}),
        ),
        (
            "object",
            "both",
            json!({"action": 19, "channel": channel, "msgSerial": 0}),
        ),
        (
            "object sync",
            "server",
            json!({"action": 20, "channel": channel, "channelSerial": "s1:"}),
        ),
        (
            "annotation",
            "both",
            json!({"action": 21, "channel": channel, "msgSerial": 1}),
        ),
    ]
}

fn message_frames() -> Vec<(&'static str, &'static str, Value)> {
    let channel = "ns:ch/1";
    vec![
        (
            "ack",
            "server",
            json!({"action": 1, "msgSerial": 0, "count": 1, "res": [{"serials": [MESSAGE_SERIAL]}]}),
        ),
        (
            "ack: of two publishes, one without a record",
            "server",
            json!({"action": 1, "msgSerial": 70_000, "count": 2,
            "res": [{"serials": [MESSAGE_SERIAL, MESSAGE_SERIAL]}, {"serials": [null]}]}),
        ),
        (
            "nack",
            "server",
            json!({"action": 2, "msgSerial": 5, "count": 3,
            "error": {"code": 40160, "statusCode": 401, "message": "operation not permitted"}}),
        ),
        (
            "message: published",
            "client",
            json!({"action": 15, "channel": channel, "msgSerial": 0,
            "messages": [{"name": "ev", "data": "{\"a\":1}", "encoding": "json", "action": 0}]}),
        ),
        (
            "message: published, binary, with a param",
            "client",
            json!({"action": 15, "channel": channel,
            "msgSerial": 1, "params": {"_forceNack": "true"},
            "messages": [{"name": "bin", "data": "AQID", "encoding": "base64"}]}),
        ),
        (
            "message: published, two with ids of their own",
            "client",
            json!({"action": 15, "channel": channel,
            "msgSerial": 4_294_967_296_u64, "messages": [{"id": "itJWNvG8Hw8R:0"}, {"id": "itJWNvG8Hw8R:1", "clientId": "me",
            "extras": {"ephemeral": true, "headers": {"h": "1", "n": -1.5, "x": null}}}]}),
        ),
        (
            "message: delivered",
            "server",
            json!({"action": 15, "id": "conn1:0", "connectionId": "conn1",
            "channel": channel, "channelSerial": SERIAL, "timestamp": 1_795_309_503_104_u64, "messages": [
            {"name": "ev", "data": "é", "clientId": "me", "action": 0, "serial": MESSAGE_SERIAL,
             "version": {"serial": MESSAGE_SERIAL, "timestamp": 1_795_309_503_104_u64}}]}),
        ),
        (
            "message: delivered, encrypted",
            "server",
            json!({"action": 15, "id": "conn1:1", "channel": channel,
            "messages": [{"data": "/wA=", "encoding": "utf-8/cipher+aes-256-cbc/base64"}]}),
        ),
    ]
}

fn presence_frames() -> Vec<(&'static str, &'static str, Value)> {
    let channel = "ns:ch/1";
    let stamp = 1_795_309_503_110_u64;
    vec![
        (
            "presence: entered",
            "client",
            json!({"action": 14, "channel": channel, "msgSerial": 3,
            "presence": [{"action": 2, "data": "hi"}]}),
        ),
        (
            "presence: entered again",
            "client",
            json!({"action": 14, "channel": channel, "msgSerial": 0,
            "presence": [{"id": "conn1:3:0", "action": 2, "clientId": "me", "data": "hi"}]}),
        ),
        (
            "presence: delivered",
            "server",
            json!({"action": 14, "id": "conn1:3", "connectionId": "conn1",
            "channel": channel, "channelSerial": SERIAL, "timestamp": stamp, "presence": [
            {"action": 4, "clientId": "me", "data": "AQID", "encoding": "base64", "extras": {"headers": {"k": "v"}}},
            {"action": 3, "clientId": "you"}]}),
        ),
        (
            "presence: a member that was left for",
            "server",
            json!({"action": 14, "id": "left-x", "channel": channel,
            "channelSerial": SERIAL, "timestamp": stamp, "presence": [
            {"id": "left-x:0", "action": 3, "clientId": "me", "connectionId": "conn1", "data": "hi"}]}),
        ),
        (
            "sync: a page",
            "server",
            json!({"action": 16, "channel": channel, "channelSerial": "19a2-1:100",
            "presence": [{"id": "conn1:3:0", "action": 1, "clientId": "me", "connectionId": "conn1", "data": "hi",
            "timestamp": stamp}]}),
        ),
        (
            "sync: the last page, empty",
            "server",
            json!({"action": 16, "channel": channel, "channelSerial": "19a2-1:"}),
        ),
        (
            "sync: asked for",
            "client",
            json!({"action": 16, "channel": channel}),
        ),
    ]
}
