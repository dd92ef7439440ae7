//! The mailbox: what waits, who takes it, and when the client counts as gone.

use std::pin::pin;

use axum::body::to_bytes;
use futures_util::FutureExt as _;
use futures_util::StreamExt as _;
use futures_util::future::join;
use tokio::time::advance;

use super::*;

fn opened(streams: bool) -> (Comets, CometWire, Ends) {
    let comets = Comets::new(2);
    let (wire, ends) = comets.open("key", streams).unwrap();
    (comets, wire, ends)
}

async fn put(wire: &mut CometWire, text: &'static str) {
    let sent = wire.send_bytes(Bytes::from_static(text.as_bytes())).await;
    sent.unwrap();
    wire.flush().await.unwrap();
}

async fn polled(ends: &Ends) -> Result<String, ErrorInfo> {
    let body = ends.receive().await?.into_body();
    let bytes = to_bytes(body, usize::MAX).await.unwrap();
    Ok(String::from_utf8(bytes.to_vec()).unwrap())
}

#[tokio::test]
async fn what_waits_is_one_array_in_order_and_taken_once() {
    let (_comets, mut wire, ends) = opened(false);
    assert!(polled(&ends).now_or_never().is_none());
    put(&mut wire, "{\"a\":1}").await;
    put(&mut wire, "{\"a\":2}").await;
    assert_eq!(polled(&ends).await.unwrap(), "[{\"a\":1},{\"a\":2}]");
    assert!(polled(&ends).now_or_never().is_none());
}

#[tokio::test]
async fn a_request_that_waits_is_answered_when_something_comes() {
    let (_comets, mut wire, ends) = opened(false);
    let (answer, ()) = join(polled(&ends), put(&mut wire, "1")).await;
    assert_eq!(answer.unwrap(), "[1]");
}

#[tokio::test]
async fn a_newer_request_takes_the_place_of_an_older_one() {
    let (_comets, mut wire, ends) = opened(false);
    let mut older = pin!(polled(&ends));
    assert!((&mut older).now_or_never().is_none());
    let mut newer = pin!(polled(&ends));
    assert!((&mut newer).now_or_never().is_none());
    assert_eq!(older.await.unwrap(), "[]");
    put(&mut wire, "1").await;
    assert_eq!(newer.await.unwrap(), "[1]");
}

#[tokio::test]
async fn a_stream_has_a_line_for_each_array_and_ends_with_the_conversation() {
    let (comets, mut wire, ends) = opened(true);
    put(&mut wire, "1").await;
    let mut lines = ends.receive().await.unwrap().into_body().into_data_stream();
    assert_eq!(lines.next().await.unwrap().unwrap(), "[1]\n");
    put(&mut wire, "2").await;
    assert_eq!(lines.next().await.unwrap().unwrap(), "[2]\n");
    drop(wire);
    assert!(lines.next().await.is_none());
    assert_eq!(
        ends.receive().await.unwrap_err().code,
        ErrorCode::Disconnected
    );
    assert_eq!(
        comets.find("key").unwrap_err().code,
        ErrorCode::Disconnected
    );
}

#[tokio::test]
async fn the_last_words_are_still_taken_after_the_end() {
    let (_comets, mut wire, ends) = opened(false);
    put(&mut wire, "1").await;
    drop(wire);
    assert_eq!(polled(&ends).await.unwrap(), "[1]");
    assert_eq!(
        polled(&ends).await.unwrap_err().code,
        ErrorCode::Disconnected
    );
    assert_eq!(
        ends.send(b"[{\"action\":0}]").await.unwrap_err().code,
        ErrorCode::Disconnected
    );
}

#[tokio::test(start_paused = true)]
async fn who_does_not_come_back_to_receive_is_gone() {
    let (_comets, mut wire, ends) = opened(false);
    let request = ends.mailbox.receive();
    // While a request waits, nobody is gone.
    let waited = timeout(4 * RECEIVE_PATIENCE, wire.receive()).await;
    assert!(waited.is_err());
    drop(request);
    let began = Instant::now();
    assert!(matches!(wire.receive().await, Received::Gone));
    assert!(began.elapsed() >= RECEIVE_PATIENCE, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_in_time_is_not() {
    let (_comets, mut wire, ends) = opened(false);
    drop(ends.mailbox.receive());
    for _ in 0..4 {
        let waited = timeout(RECEIVE_PATIENCE / 2, wire.receive()).await;
        assert!(waited.is_err());
        drop(ends.mailbox.receive());
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_takes_what_fills_the_mailbox() {
    let (_comets, mut wire, ends) = opened(false);
    let big = Bytes::from(vec![b'1'; WAITING_BYTES_MAX]);
    let sent = async {
        wire.send_bytes(big.clone()).await.unwrap();
        // Not flushed in between: the second one waits for the request that is there already.
        timeout(
            WRITE_PATIENCE / 2,
            wire.send_bytes(Bytes::from_static(b"2")),
        )
        .await
    };
    let (answer, sent) = join(polled(&ends), sent).await;
    assert_eq!(answer.unwrap().len(), WAITING_BYTES_MAX + 2);
    sent.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_full_mailbox_slows_the_conversation_down() {
    let (_comets, mut wire, ends) = opened(false);
    let big = Bytes::from(vec![b'1'; WAITING_BYTES_MAX]);
    wire.send_bytes(big.clone()).await.unwrap();
    {
        let more = wire.send_bytes(big.clone());
        tokio::pin!(more);
        assert!(more.as_mut().now_or_never().is_none());
        advance(WRITE_PATIENCE / 2).await;
        polled(&ends).await.unwrap();
        more.await.unwrap();
    }
    // Nobody takes it for too long.
    assert!(wire.send_bytes(big).await.is_err());
}

#[tokio::test]
async fn frames_reach_the_conversation_in_order() {
    let (_comets, mut wire, ends) = opened(false);
    let received = async {
        for wanted in [Action::Message, Action::Attach] {
            match wire.receive().await {
                Received::Frame(frame) => assert_eq!(frame.action, wanted),
                other => panic!("{other:?}"),
            }
        }
    };
    let (sent, ()) = join(ends.send(b"[{\"action\":15},{\"action\":10}]"), received).await;
    sent.unwrap();
    ends.say(Action::Close).await.unwrap();
    assert!(
        matches!(wire.receive().await, Received::Frame(frame) if frame.action == Action::Close)
    );
    for bad in [&b"{}"[..], b"[1]", b"", b"[{}"] {
        assert_eq!(
            ends.send(bad).await.unwrap_err().code,
            ErrorCode::InvalidBody,
            "{bad:?}"
        );
    }
}

#[tokio::test]
async fn a_resumed_conversation_keeps_its_place_when_the_older_one_ends() {
    let (comets, old, _ends) = opened(false);
    let (mut new, _) = comets.open("key", false).unwrap();
    assert_eq!(
        comets.open("another", false).unwrap_err().code,
        ErrorCode::Busy
    );
    drop(old);
    put(&mut new, "1").await;
    assert_eq!(polled(&comets.find("key").unwrap()).await.unwrap(), "[1]");
    assert!(comets.open("another", false).is_ok());
}
