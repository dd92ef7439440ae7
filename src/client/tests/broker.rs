//! A toy of a server: channels in memory, resume with deduplication, and faults on demand.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::mpsc;
use tokio::task::spawn;

use crate::client::tests::{Peer, Server, attached, connected};
use crate::wire::ably::{Action, Frame, PublishResult};

/// What goes wrong, each at every so-many-th publish; 0 is never.
#[derive(Clone, Copy, Default)]
pub(in crate::client) struct Faults {
    /// The publish is stored, but its connection ends instead of the answer.
    pub(in crate::client) cut_after: usize,
    /// The publish is answered but reaches nobody.
    pub(in crate::client) lose: usize,
    /// The publish is delivered twice.
    pub(in crate::client) double: usize,
    /// The publish is refused.
    pub(in crate::client) refuse: usize,
    /// From this publish on, none is answered, stored or delivered; 0 is never.
    pub(in crate::client) mute_from: usize,
}

#[derive(Default)]
struct State {
    connections: usize,
    publishes: usize,
    /// Serials by connection and its `msgSerial`.
    stored: HashMap<(String, u64), String>,
    attached: HashMap<String, Vec<mpsc::UnboundedSender<Frame>>>,
}

/// Starts the toy; it ends with the test's runtime. Returns its URL.
pub(in crate::client) async fn start(faults: Faults) -> String {
    let (server, url) = Server::bind().await;
    let state = Arc::new(Mutex::new(State::default()));
    spawn(async move {
        loop {
            let peer = server.accept().await;
            spawn(serve(peer, state.clone(), faults));
        }
    });
    url
}

async fn serve(mut peer: Peer, state: Arc<Mutex<State>>, faults: Faults) {
    let id = match peer.resumed() {
        Some(key) => key,
        None => {
            let mut state = state.lock().unwrap();
            state.connections += 1;
            format!("c{}", state.connections)
        }
    };
    peer.send(connected(&id, &id)).await;
    let (tx, mut rx) = mpsc::unbounded_channel();
    loop {
        let frame = tokio::select! {
            frame = peer.receive() => frame,
            Some(frame) = rx.recv() => {
                peer.send(frame).await;
                continue;
            }
        };
        let Some(frame) = frame else { return };
        match frame.action {
            Action::Attach => {
                let channel = frame.channel.unwrap();
                let tx = tx.clone();
                state
                    .lock()
                    .unwrap()
                    .attached
                    .entry(channel.clone())
                    .or_default()
                    .push(tx);
                peer.send(attached(&channel, "s0", false)).await;
            }
            Action::Message => match on_message(&id, frame, &state, faults) {
                Some(answer) => peer.send(answer).await,
                None if is_mute(&state, faults) => {}
                None => return,
            },
            Action::Close => {
                peer.send(Frame::new(Action::Closed)).await;
                return;
            }
            _ => {}
        }
    }
}

/// The answer, or none when the connection is to be cut instead.
fn on_message(id: &str, mut frame: Frame, state: &Mutex<State>, faults: Faults) -> Option<Frame> {
    let mut state = state.lock().unwrap();
    let msg_serial = frame.msg_serial.take().unwrap();
    let answer = |action| Frame {
        msg_serial: Some(msg_serial),
        count: Some(1),
        ..Frame::new(action)
    };
    let ack = |serial: &str| Frame {
        res: vec![PublishResult {
            serials: vec![Some(serial.to_owned())],
        }],
        ..answer(Action::Ack)
    };
    if let Some(serial) = state.stored.get(&(id.to_owned(), msg_serial)) {
        return Some(ack(serial));
    }
    state.publishes += 1;
    let publishes = state.publishes;
    let is = |every: usize| every != 0 && publishes.is_multiple_of(every);
    if faults.mute_from != 0 && publishes >= faults.mute_from {
        return None;
    }
    if is(faults.refuse) {
        return Some(answer(Action::Nack));
    }
    let serial = format!("s{publishes:08}");
    state
        .stored
        .insert((id.to_owned(), msg_serial), serial.clone());
    frame.channel_serial = Some(serial.clone());
    let copies = if is(faults.lose) {
        0
    } else {
        1 + usize::from(is(faults.double))
    };
    for tx in state
        .attached
        .entry(frame.channel.clone().unwrap())
        .or_default()
    {
        for _ in 0..copies {
            // A subscriber may be gone.
            let _ = tx.send(frame.clone());
        }
    }
    (!is(faults.cut_after)).then(|| ack(&serial))
}

fn is_mute(state: &Mutex<State>, faults: Faults) -> bool {
    faults.mute_from != 0 && state.lock().unwrap().publishes >= faults.mute_from
}
