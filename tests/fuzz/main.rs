//! Decoders and conversations under bytes that nobody meant: what is read is written back the same, the rest is refused,
//! and nothing panics.
//!
//! Each test runs for `FIRTH_FUZZ_SECONDS` (1) and prints its seed; `FIRTH_FUZZ_SEED` repeats one.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use firth::auth::{
    AppKeys, Capability, ClientId, Credential, Identity, Key, Keyring, Presented, Revocations,
    Secret, TokenRequest,
};
use firth::session::{AttachOutcome, ConnectParams, Continuity, Effect, Limits, Opening, Session};
use firth::types::{AppId, ErrorCode, NodeId, Serial};
use firth::wire::ably::{
    Format, Frame, decode, decode_frames, decode_messages, encode, encode_messages,
};

const NOW: u64 = 1_795_309_503_000;
const VECTORS: &str = include_str!("../../proto/vectors/frames.json");

/// xorshift64*: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Less than `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).unwrap();
        usize::try_from(self.next() % end).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[7]
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// A sample with a few bytes changed, cut out, repeated or taken from another sample; sometimes none of it.
    fn damaged(&mut self, samples: &[Vec<u8>]) -> Vec<u8> {
        if self.below(20) == 0 {
            let length = self.below(64);
            return (0..length).map(|_| self.byte()).collect();
        }
        let mut bytes = self.pick(samples).clone();
        for _ in 0..self.below(4) {
            if bytes.is_empty() {
                break;
            }
            let (one, other) = (self.below(bytes.len()), self.below(bytes.len()));
            let part = one.min(other)..one.max(other);
            match self.below(5) {
                0 => bytes[one] = self.byte(),
                1 => bytes.truncate(one),
                2 => drop(bytes.drain(part)),
                3 => {
                    let part = bytes[part].to_vec();
                    bytes.splice(one..one, part);
                }
                _ => {
                    let donor = self.pick(samples).clone();
                    let from = self.below(donor.len());
                    bytes.splice(one.., donor[from..].iter().copied());
                }
            }
        }
        bytes
    }
}

/// Calls `round` until the time is over, at least once.
#[expect(clippy::print_stdout, reason = "the seed of a failed run is wanted")]
fn for_a_while(name: &str, mut round: impl FnMut(&mut Random)) {
    let number = |name| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let seconds: u64 = number("FIRTH_FUZZ_SECONDS").unwrap_or(1);
    let since_epoch = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let seed = number("FIRTH_FUZZ_SEED").unwrap_or(u64::from(since_epoch.subsec_nanos()) | 1);
    println!("{name}: FIRTH_FUZZ_SEED={seed}");
    let mut random = Random(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut rounds = 0_u64;
    while rounds == 0 || Instant::now() < end {
        round(&mut random);
        rounds += 1;
    }
    println!("{name}: {rounds} rounds");
}

/// The frames of `proto/vectors`, as JSON and as MessagePack.
fn samples() -> [(Format, Vec<Vec<u8>>); 2] {
    let vectors: Vec<serde_json::Value> = serde_json::from_str(VECTORS).unwrap();
    let of = |vector: &serde_json::Value, field: &str| vector[field].as_str().unwrap().to_owned();
    let json = vectors.iter().map(|v| of(v, "json").into_bytes()).collect();
    let unhex = |text: String| -> Vec<u8> {
        let places = (0..text.len()).step_by(2);
        places
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
            .collect()
    };
    let packed = vectors.iter().map(|v| unhex(of(v, "msgpack"))).collect();
    [(Format::Json, json), (Format::MsgPack, packed)]
}

#[test]
fn frames_are_read_and_written_alike_or_refused() {
    let samples = samples();
    for_a_while("frames", |random| {
        let (format, samples) = random.pick(&samples);
        let bytes = random.damaged(samples);
        if let Ok(frame) = decode(*format, &bytes) {
            // Once written it stays as it is: what was not understood is gone.
            let written = encode(*format, &frame);
            let again = decode(*format, &written).unwrap();
            assert_eq!(encode(*format, &again), written, "{bytes:?}");
        }
    });
}

#[test]
fn bodies_are_read_and_written_alike_or_refused() {
    let (json, packed): (&[&str], _) = (
        &[
            r#"{"name":"n","data":{"a":[1,2.5,null]},"extras":{"headers":{"h":1}}}"#,
            r#"[{"id":"x:0","data":"AQID","encoding":"base64"},{"id":"x:1","clientId":"me","connectionKey":"k"}]"#,
        ],
        samples()[1].1.clone(),
    );
    let json: Vec<Vec<u8>> = json.iter().map(|text| text.as_bytes().to_vec()).collect();
    let mut messages = packed;
    messages.extend(
        json.iter()
            .filter_map(|text| decode_messages(Format::Json, text).ok())
            .map(|read| encode_messages(Format::MsgPack, &read).to_vec()),
    );
    let samples = [(Format::Json, json), (Format::MsgPack, messages)];
    for_a_while("bodies", |random| {
        let (format, samples) = random.pick(&samples);
        let bytes = random.damaged(samples);
        drop(decode_frames(*format, &bytes));
        if let Ok(messages) = decode_messages(*format, &bytes) {
            let written = encode_messages(*format, &messages);
            let again = decode_messages(*format, &written).unwrap();
            assert_eq!(encode_messages(*format, &again), written, "{bytes:?}");
        }
    });
}

fn keyring() -> Keyring {
    let app: AppId = "app".parse().unwrap();
    let key = Key {
        app: app.clone(),
        id: "key".into(),
        secret: Secret::new("secret"),
        capability: Arc::new(Capability::parse(r#"{"*":["*"]}"#).unwrap()),
        revocable_tokens: false,
    };
    let mut keyring = Keyring::default();
    keyring.put(app, Arc::new(AppKeys::from_iter([key])));
    keyring
}

#[test]
fn credentials_that_nobody_issued_open_nothing() {
    let keyring = keyring();
    let revocations = Revocations::default();
    let samples: Vec<Vec<u8>> = [
        "Basic YXBwLmtleTp3cm9uZw==",
        "Bearer eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiIsImtpZCI6ImFwcC5rZXkifQ.eyJpYXQiOjE3OTUzMDk1MDB9.AAAA",
        r#"{"keyName":"app.key","ttl":60000,"timestamp":1795309503000,"nonce":"0123456789abcdef","mac":"AAAA"}"#,
        r#"{"a:*":["publish","subscribe"],"[*]*":["*"]}"#,
        "app.key:wrong",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    for_a_while("credentials", |random| {
        let bytes = random.damaged(&samples);
        let text = String::from_utf8_lossy(&bytes);
        for presented in [
            Presented::from_request(Some(&text), None, None),
            Presented::from_request(None, Some(&text), None),
            Ok(Presented::token(&*text)),
        ] {
            let entered =
                presented.and_then(|it| keyring.authenticate(&it, None, NOW, &revocations));
            assert!(entered.is_err(), "{text}");
        }
        drop(Credential::parse(&text));
        drop(Capability::parse(&text));
        if let Ok(request) = serde_json::from_slice::<TokenRequest>(&bytes) {
            let token = keyring.request_token("app.key", &request, None, NOW, [0; 16]);
            assert!(token.is_err(), "{text}");
        }
    });
}

fn session() -> Session {
    let opening = Opening {
        params: ConnectParams {
            version: Some(6.0),
            ..ConnectParams::default()
        },
        identity: Identity {
            app: "app".parse().unwrap(),
            key_id: "key".into(),
            secret: Secret::new("secret"),
            client_id: ClientId::Any,
            capability: Arc::new(Capability::parse(r#"{"*":["*"]}"#).unwrap()),
            token: None,
        },
        limits: Limits {
            max_channels: 5,
            max_inflight_publishes: 8,
            ..Limits::default()
        },
        connection_id: "conn1".into(),
        connection_key: "conn1!key".into(),
        resumed: false,
        resume_failed: None,
        node: NodeId(1),
    };
    Session::new(opening, NOW)
}

/// What the owner answers to an effect, or not.
fn answer(session: &mut Session, random: &mut Random, effect: Effect, now_ms: u64) {
    let serial = Serial {
        incarnation: 0,
        index: random.next() >> 1,
        position: 0,
    };
    let fails = random.below(8) == 0;
    match effect {
        Effect::Publish { ticket, .. } => {
            let outcome = if fails {
                Err(ErrorCode::Busy.into())
            } else {
                Ok(Some(serial))
            };
            session.handle_published(ticket, outcome, now_ms);
        }
        Effect::Attach { channel, .. } if fails => {
            session.handle_attachment_failed(&channel, &ErrorCode::NoLeader.into(), now_ms);
        }
        Effect::Attach { channel, .. } => {
            let outcome = AttachOutcome {
                at: serial,
                continuity: Continuity::Fresh { backlog: false },
                members: vec![],
            };
            session.handle_attached(&channel, outcome, now_ms);
        }
        Effect::Detach { channel } => session.handle_detached(&channel, now_ms),
        Effect::Members { channel } => session.handle_members(&channel, Ok(vec![]), now_ms),
        Effect::Authenticate { .. } => {
            let identity = session.identity().clone();
            session.handle_authenticated(Ok(identity), now_ms);
        }
        Effect::Send(_) | Effect::Attend { .. } | Effect::Depart { .. } | Effect::Close { .. } => {}
    }
}

#[test]
fn conversations_stay_within_their_bounds_whatever_is_said() {
    let samples = samples();
    for_a_while("conversations", |random| {
        let (mut session, mut now_ms) = (session(), NOW);
        for msg_serial in 0..u64::try_from(random.below(200)).unwrap() {
            let (format, samples) = random.pick(&samples);
            match decode(*format, &random.damaged(samples)) {
                Ok(frame) => {
                    // Mostly numbered as a client would: else it ends soon.
                    let number = frame.msg_serial.map(|own| {
                        if random.below(9) == 0 {
                            own
                        } else {
                            msg_serial
                        }
                    });
                    session.handle_frame(
                        Frame {
                            msg_serial: number,
                            ..frame
                        },
                        now_ms,
                    );
                }
                Err(error) if random.below(50) == 0 => session.handle_undecodable(error, now_ms),
                Err(_) => {
                    now_ms += random.next() % 20_000;
                    session.handle_tick(now_ms);
                }
            }
            let mut effects = 0;
            while let Some(effect) = session.poll_effect() {
                effects += 1;
                assert!(effects < 3000, "one input, effects without end");
                if random.below(4) > 0 {
                    answer(&mut session, random, effect, now_ms);
                }
            }
            session.check_invariants();
        }
        drop(session.handle_gone(now_ms));
        assert!(session.is_closed() && session.next_deadline().is_none());
    });
}
