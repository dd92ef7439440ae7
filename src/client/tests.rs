//! A connection against a server that plays a script.

pub(super) mod broker;

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message as Packet;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};

use super::*;
use crate::types::ErrorCode;
use crate::wire::ably::{
    self, Action, ConnectionDetails, Data, ErrorBody, Frame, Message, PublishResult, flags,
};

const SOON: Duration = Duration::from_secs(10);

pub(super) struct Server(TcpListener);

impl Server {
    pub(super) async fn bind() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        (Self(listener), url)
    }

    pub(super) async fn accept(&self) -> Peer {
        let (stream, _) = self.0.accept().await.unwrap();
        let mut query = String::new();
        #[allow(clippy::result_large_err, reason = "the callback's type is given")]
        let look = |request: &Request, response: Response| {
            query = request.uri().query().unwrap().to_owned();
            Ok(response)
        };
        let socket = tokio_tungstenite::accept_hdr_async(stream, look)
            .await
            .unwrap();
        let msgpack = query.contains("format=msgpack");
        let format = if msgpack {
            Format::MsgPack
        } else {
            Format::Json
        };
        Peer {
            socket,
            query,
            format,
        }
    }

    /// Accepts the next socket, which must come soon, and greets it.
    async fn greet(&self, id: &str, key: &str) -> Peer {
        let mut peer = timeout(SOON, self.accept()).await.unwrap();
        peer.send(connected(id, key)).await;
        peer
    }
}

/// The server's side of one socket. Dropped, it cuts the connection.
pub(super) struct Peer {
    socket: WebSocketStream<TcpStream>,
    query: String,
    format: Format,
}

impl Peer {
    pub(super) fn resumed(&self) -> Option<String> {
        let value = self
            .query
            .split('&')
            .find_map(|pair| pair.strip_prefix("resume="))?;
        Some(
            percent_encoding::percent_decode_str(value)
                .decode_utf8()
                .unwrap()
                .into_owned(),
        )
    }

    pub(super) async fn send(&mut self, frame: Frame) {
        let bytes = ably::encode(self.format, &frame);
        let packet = match self.format {
            Format::Json => Packet::Text(bytes.try_into().unwrap()),
            Format::MsgPack => Packet::Binary(bytes),
        };
        // The client may be gone.
        let _ = self.socket.send(packet).await;
    }

    pub(super) async fn receive(&mut self) -> Option<Frame> {
        loop {
            let bytes: Bytes = match self.socket.next().await?.ok()? {
                Packet::Text(text) => text.into(),
                Packet::Binary(bytes) => bytes,
                Packet::Close(_) => return None,
                _ => continue,
            };
            return Some(ably::decode(self.format, &bytes).unwrap());
        }
    }

    async fn expect(&mut self, action: Action) -> Frame {
        let frame = timeout(SOON, self.receive()).await.unwrap().unwrap();
        assert_eq!(frame.action, action, "{frame:?}");
        frame
    }

    async fn expect_publish(&mut self, msg_serial: u64, text: &str) {
        let frame = self.expect(Action::Message).await;
        assert_eq!(frame.msg_serial, Some(msg_serial));
        assert_eq!(frame.messages[0].data, Some(Data::Text(text.to_owned())));
    }

    async fn ack(&mut self, msg_serial: u64, count: u64) {
        let result = |n: u64| PublishResult {
            serials: vec![Some(format!("s{n}"))],
        };
        let frame = Frame {
            msg_serial: Some(msg_serial),
            count: Some(count),
            res: (msg_serial..msg_serial + count).map(result).collect(),
            ..Frame::new(Action::Ack)
        };
        self.send(frame).await;
    }
}

pub(super) fn connected(id: &str, key: &str) -> Frame {
    Frame {
        connection_id: Some(id.to_owned()),
        connection_details: Some(ConnectionDetails {
            connection_key: Some(key.to_owned()),
            max_idle_interval: Some(15_000),
            ..ConnectionDetails::default()
        }),
        ..Frame::new(Action::Connected)
    }
}

pub(super) fn attached(channel: &str, serial: &str, resumed: bool) -> Frame {
    Frame {
        channel_serial: Some(serial.to_owned()),
        flags: resumed.then_some(flags::RESUMED),
        ..Frame::of_channel(Action::Attached, channel)
    }
}

fn message(channel: &str, serial: &str, text: &str) -> Frame {
    Frame {
        id: Some("other:0".to_owned()),
        channel_serial: Some(serial.to_owned()),
        messages: texts(text),
        ..Frame::of_channel(Action::Message, channel)
    }
}

fn error(code: ErrorCode) -> Option<ErrorBody> {
    Some(ErrorInfo::from(code).into())
}

fn texts(text: &str) -> Vec<Message> {
    vec![Message {
        data: Some(Data::Text(text.to_owned())),
        ..Message::default()
    }]
}

fn options(url: &str) -> Options {
    Options {
        retry_first: Duration::from_millis(1),
        ..Options::new(vec![url.to_owned()], "app.key:secret")
    }
}

/// A client that has connected to a server that has greeted it.
async fn pair(change: impl FnOnce(&mut Options)) -> (Server, Peer, Connection, Events, Tasks) {
    let (server, url) = Server::bind().await;
    let mut options = options(&url);
    change(&mut options);
    let tasks = Tasks::root().0;
    let (peer, connection) = tokio::join!(
        server.greet("c1", "c1!k"),
        Connection::connect(options, &tasks)
    );
    let (connection, events) = connection.unwrap();
    (server, peer, connection, events, tasks)
}

async fn next(events: &mut Events) -> Event {
    timeout(SOON, events.next()).await.unwrap().unwrap()
}

async fn next_messages(events: &mut Events) -> Messages {
    loop {
        if let Event::Messages(messages) = next(events).await {
            return messages;
        }
    }
}

async fn serials(pending: &mut Pending) -> Result<Vec<Option<String>>, ErrorInfo> {
    timeout(SOON, pending.answer())
        .await
        .unwrap()
        .unwrap()
        .outcome
}

async fn serial(pending: &mut Pending) -> String {
    serials(pending).await.unwrap().remove(0).unwrap()
}

#[tokio::test]
async fn publishes_and_attaches_in_both_formats() {
    for format in [Format::Json, Format::MsgPack] {
        let (_server, mut peer, connection, mut events, _tasks) = pair(|o| o.format = format).await;
        assert!(
            peer.query.contains("key=app%2Ekey%3Asecret"),
            "{}",
            peer.query
        );
        assert_eq!(peer.resumed(), None);
        let attach = connection.attach("a", Some("s5".to_owned()), [].into());
        let script = async {
            let frame = peer.expect(Action::Attach).await;
            assert_eq!(frame.channel_serial.as_deref(), Some("s5"));
            peer.send(attached("a", "s5", true)).await;
        };
        tokio::join!(async { attach.await.unwrap() }, script);
        let mut pending = connection.publish("a", texts("hi")).await.unwrap();
        peer.expect_publish(0, "hi").await;
        peer.ack(0, 1).await;
        assert_eq!(serial(&mut pending).await, "s0");
        peer.send(message("a", "s6", "news")).await;
        let messages = next_messages(&mut events).await;
        assert_eq!(
            (messages.channel.as_str(), messages.serial.as_deref()),
            ("a", Some("s6"))
        );
        assert_eq!(
            messages.messages[0].id.as_deref(),
            Some("other:0:0"),
            "inherited"
        );
        let script = async {
            peer.expect(Action::Close).await;
            peer.send(Frame::new(Action::Closed)).await;
        };
        tokio::join!(connection.close(), script);
        let ended = async { while events.next().await.is_some() {} };
        timeout(SOON, ended).await.unwrap();
    }
}

#[tokio::test]
async fn the_window_holds_publishes_back() {
    let (_server, mut peer, connection, _events, _tasks) = pair(|o| o.window = 2).await;
    for text in ["0", "1"] {
        drop(connection.publish("a", texts(text)).await.unwrap());
    }
    let mut third = std::pin::pin!(connection.publish("a", texts("2")));
    assert!(futures_util::poll!(&mut third).is_pending());
    peer.expect_publish(0, "0").await;
    peer.ack(0, 1).await;
    timeout(SOON, third).await.unwrap().unwrap();
    peer.expect_publish(1, "1").await;
    peer.expect_publish(2, "2").await;
}

#[tokio::test]
async fn a_refusal_concerns_its_own_publish_only() {
    let (_server, mut peer, connection, _events, _tasks) = pair(|_| ()).await;
    let mut pending = Vec::new();
    for text in ["0", "1", "2", "3", "4", "5"] {
        pending.push(connection.publish("a", texts(text)).await.unwrap());
    }
    peer.ack(0, 2).await;
    let nack = Frame {
        msg_serial: Some(2),
        count: Some(1),
        error: error(ErrorCode::CapabilityDenied),
        ..Frame::new(Action::Nack)
    };
    peer.send(nack).await;
    // Number 3 is skipped, so it was not taken.
    peer.ack(4, 2).await;
    let mut outcomes = Vec::new();
    for pending in &mut pending {
        outcomes.push(serials(pending).await.map_err(|err| err.code));
    }
    let stored = |serial: &str| Ok(vec![Some(serial.to_owned())]);
    let expected = [
        stored("s0"),
        stored("s1"),
        Err(ErrorCode::CapabilityDenied),
        Err(ErrorCode::Internal),
        stored("s4"),
        stored("s5"),
    ];
    assert_eq!(outcomes, expected);
}

#[tokio::test]
async fn an_answer_to_what_was_never_sent_ends_the_connection() {
    let (_server, mut peer, connection, mut events, _tasks) = pair(|_| ()).await;
    let mut pending = connection.publish("a", texts("0")).await.unwrap();
    peer.expect_publish(0, "0").await;
    peer.ack(0, 5).await;
    assert!(serials(&mut pending).await.is_err());
    assert!(matches!(next(&mut events).await, Event::Connected { .. }));
    assert!(matches!(
        next(&mut events).await,
        Event::Failed(Error::Protocol(_))
    ));
}

#[tokio::test]
async fn after_a_cut_it_resumes_where_it_was() {
    let (server, mut peer, connection, mut events, _tasks) = pair(|_| ()).await;
    let attach = connection.attach("a", None, [].into());
    let script = async {
        peer.expect(Action::Attach).await;
        peer.send(attached("a", "s1", false)).await;
        peer.send(message("a", "s2", "before")).await;
    };
    tokio::join!(async { attach.await.unwrap() }, script);
    assert_eq!(
        next_messages(&mut events).await.serial.as_deref(),
        Some("s2")
    );
    let mut pending = Vec::new();
    for text in ["0", "1", "2"] {
        pending.push(connection.publish("a", texts(text)).await.unwrap());
    }
    for n in 0..3 {
        peer.expect_publish(n, &n.to_string()).await;
    }
    peer.ack(0, 1).await;
    assert_eq!(serial(&mut pending[0]).await, "s0");
    // Cut while 1 and 2 have no answer; 3 is published meanwhile.
    drop(peer);
    pending.push(connection.publish("a", texts("3")).await.unwrap());
    let mut peer = server.greet("c1", "c1!k2").await;
    assert_eq!(peer.resumed().as_deref(), Some("c1!k"));
    let attach = peer.expect(Action::Attach).await;
    assert_eq!(attach.channel_serial.as_deref(), Some("s2"));
    for n in 1..4 {
        peer.expect_publish(n, &n.to_string()).await;
    }
    peer.send(attached("a", "s2", true)).await;
    peer.ack(1, 3).await;
    for (n, pending) in pending.iter_mut().enumerate().skip(1) {
        assert_eq!(serial(pending).await, format!("s{n}"));
    }
    assert!(matches!(
        next(&mut events).await,
        Event::Disconnected { .. }
    ));
    assert!(matches!(
        next(&mut events).await,
        Event::Connected { resumed: true }
    ));
    assert!(matches!(
        next(&mut events).await,
        Event::Attached { resumed: true, .. }
    ));
    // The new key is the one to use from now on.
    drop(peer);
    let peer = timeout(SOON, server.accept()).await.unwrap();
    assert_eq!(peer.resumed().as_deref(), Some("c1!k2"));
}

#[tokio::test]
async fn on_a_new_connection_it_counts_from_zero() {
    let (server, mut peer, connection, mut events, _tasks) = pair(|_| ()).await;
    let mut first = connection.publish("a", texts("0")).await.unwrap();
    peer.expect_publish(0, "0").await;
    peer.ack(0, 1).await;
    assert_eq!(serial(&mut first).await, "s0");
    let mut second = connection.publish("a", texts("1")).await.unwrap();
    peer.expect_publish(1, "1").await;
    let goodbye = Frame {
        error: error(ErrorCode::Draining),
        ..Frame::new(Action::Disconnected)
    };
    peer.send(goodbye).await;
    let mut peer = server.greet("c2", "c2!k").await;
    peer.expect_publish(0, "1").await;
    peer.ack(0, 1).await;
    assert_eq!(serial(&mut second).await, "s0");
    let mut third = connection.publish("a", texts("2")).await.unwrap();
    peer.expect_publish(1, "2").await;
    peer.ack(1, 1).await;
    assert_eq!(serial(&mut third).await, "s1");
    assert!(matches!(next(&mut events).await, Event::Connected { .. }));
    let Event::Disconnected { reason } = next(&mut events).await else {
        panic!()
    };
    assert!(reason.contains("shutting down"), "{reason}");
    assert!(matches!(
        next(&mut events).await,
        Event::Connected { resumed: false }
    ));
}

#[tokio::test]
async fn refusals_are_told_in_the_servers_words() {
    let (server, url) = Server::bind().await;
    let tasks = Tasks::root().0;
    let script = async {
        let mut peer = server.accept().await;
        let refusal = Frame {
            error: error(ErrorCode::InvalidCredentials),
            ..Frame::new(Action::Error)
        };
        peer.send(refusal).await;
        peer.receive().await;
    };
    let (refused, ()) = tokio::join!(Connection::connect(options(&url), &tasks), script);
    let Err(Error::Refused(info)) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(info.code, ErrorCode::InvalidCredentials);

    let (_server, mut peer, connection, mut events, _tasks) = pair(|_| ()).await;
    let script = async {
        peer.expect(Action::Attach).await;
        let refusal = Frame {
            error: error(ErrorCode::CapabilityDenied),
            ..Frame::of_channel(Action::Error, "a")
        };
        peer.send(refusal).await;
    };
    let (refused, ()) = tokio::join!(connection.attach("a", None, [].into()), script);
    assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    assert!(matches!(next(&mut events).await, Event::Connected { .. }));
    assert!(matches!(
        next(&mut events).await,
        Event::ChannelFailed { .. }
    ));
    // The connection itself goes on.
    let mut pending = connection.publish("b", texts("0")).await.unwrap();
    peer.expect_publish(0, "0").await;
    peer.ack(0, 1).await;
    assert_eq!(serial(&mut pending).await, "s0");
}

#[tokio::test]
async fn a_silent_server_is_left() {
    let (server, url) = Server::bind().await;
    let tasks = Tasks::root().0;
    let options = Options {
        idle_grace: Duration::from_millis(50),
        ..options(&url)
    };
    let script = async {
        let mut peer = server.accept().await;
        let mut greeting = connected("c1", "c1!k");
        greeting
            .connection_details
            .as_mut()
            .unwrap()
            .max_idle_interval = Some(50);
        peer.send(greeting).await;
        peer
    };
    let (connection, _silent) = tokio::join!(Connection::connect(options, &tasks), script);
    let (_connection, mut events) = connection.unwrap();
    // The first socket stays open, and nothing comes on it.
    let peer = timeout(SOON, server.accept()).await.unwrap();
    assert_eq!(peer.resumed().as_deref(), Some("c1!k"));
    assert!(matches!(next(&mut events).await, Event::Connected { .. }));
    let Event::Disconnected { reason } = next(&mut events).await else {
        panic!()
    };
    assert!(reason.contains("silent"), "{reason}");
}

#[tokio::test]
async fn another_node_is_tried_and_nobody_is_an_error() {
    let (dead, dead_url) = Server::bind().await;
    drop(dead);
    let (server, url) = Server::bind().await;
    let tasks = Tasks::root().0;
    let mut both = options(&dead_url);
    both.urls.push(url);
    let (_peer, connected) =
        tokio::join!(server.greet("c1", "k"), Connection::connect(both, &tasks));
    connected.unwrap();

    let mut nobody = options(&dead_url);
    nobody.connect_timeout = Duration::from_millis(50);
    let err = timeout(SOON, Connection::connect(nobody, &tasks))
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(err, Error::Unreachable { .. }), "{err}");
}

#[tokio::test]
async fn it_gives_up_in_the_end_and_tells_everybody() {
    let (server, mut peer, connection, mut events, _tasks) = pair(|o| {
        o.give_up = Some(Duration::from_millis(50));
    })
    .await;
    let mut pending = connection.publish("a", texts("0")).await.unwrap();
    peer.expect_publish(0, "0").await;
    drop((peer, server));
    assert!(serials(&mut pending).await.is_err());
    let mut last = next(&mut events).await;
    while let Some(event) = timeout(SOON, events.next()).await.unwrap() {
        last = event;
    }
    assert!(
        matches!(last, Event::Failed(Error::Unreachable { .. })),
        "{last:?}"
    );
    assert!(matches!(
        connection.publish("a", texts("1")).await,
        Err(Error::Closed)
    ));
}

#[tokio::test]
async fn it_can_be_closed_while_a_node_does_not_answer() {
    let (server, peer, connection, _events, _tasks) = pair(|o| o.connect_timeout = SOON * 10).await;
    drop(peer);
    // This socket is accepted by the kernel, and nobody answers on it.
    let (_silent, _) = timeout(SOON, server.0.accept()).await.unwrap().unwrap();
    timeout(SOON, connection.close()).await.unwrap();
}

#[tokio::test]
async fn a_slow_follower_gets_everything_later() {
    const MESSAGES: usize = 5000;
    let (_server, mut peer, connection, mut events, _tasks) = pair(|_| ()).await;
    let attach = connection.attach("a", None, [].into());
    let script = async {
        peer.expect(Action::Attach).await;
        peer.send(attached("a", "s", false)).await;
    };
    tokio::join!(async { attach.await.unwrap() }, script);
    let sender = tokio::task::spawn(async move {
        for n in 0..MESSAGES {
            peer.send(message("a", &format!("s{n:05}"), &"x".repeat(1000)))
                .await;
        }
        peer
    });
    // Publishes go out although nobody reads events.
    let _pending = connection.publish("a", texts("0")).await.unwrap();
    for n in 0..MESSAGES {
        assert_eq!(
            next_messages(&mut events).await.serial.unwrap(),
            format!("s{n:05}")
        );
    }
    sender.await.unwrap().expect_publish(0, "0").await;
}

#[tokio::test]
async fn the_commands_work_together() {
    use clap::Parser;
    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        command: Command,
    }
    let url = broker::start(broker::Faults::default()).await;
    let run = |line: &str| {
        let line = format!("firth {line} --url {url} --key a.b:c");
        run(Cli::try_parse_from(line.split(' ')).unwrap().command)
    };
    let success = format!("{:?}", ExitCode::SUCCESS);
    let mut sub = std::pin::pin!(run("sub ch --count 3 --json"));
    // The toy keeps nothing for those who attach later, so publish until the subscriber has enough.
    let publish = async {
        loop {
            let code = run("pub ch hello -q --count 2 --name n").await.unwrap();
            assert_eq!(format!("{code:?}"), success);
        }
    };
    let code = tokio::select! {
        code = &mut sub => code.unwrap(),
        never = publish => never,
    };
    assert_eq!(format!("{code:?}"), success);
}
