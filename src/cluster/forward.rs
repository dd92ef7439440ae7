//! Publishes on their way to a leader on another node: one ordered stream per shard and sender.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use prost::Message as _;

use crate::channel::Outcome;
use crate::cluster::proposer::{Answer, Broken, Proposer};
use crate::transport::{CallError, FrameRx, FrameTx, Lane, Service, StreamHandler, Transport};
use crate::types::{GroupId, NodeId, Serial, ShardId};
use crate::wire::{entry, peer};

/// Service number on the wire, for ever.
const FORWARD: Service = Service(16);

/// Opens a stream to a leader.
pub(super) async fn open(
    transport: &Transport,
    leader: NodeId,
    group: GroupId,
) -> Result<(Outward, Inward), CallError> {
    let (frame_tx, frame_rx) = transport.open(leader, Lane::Bulk, FORWARD, group).await?;
    let outward = Outward {
        frame_tx,
        packed: 0,
    };
    let inward = Inward {
        frame_rx,
        answered: 0,
    };
    Ok((outward, inward))
}

/// The sending half of a stream to a leader.
pub(super) struct Outward {
    frame_tx: FrameTx,
    packed: u64,
}

impl Outward {
    /// Makes the stream's next frame. Frames must be sent in the order they were packed.
    pub(super) fn pack(&mut self, publishes: &[entry::Publish]) -> Bytes {
        let frame = request(self.packed, publishes);
        self.packed += publishes.len() as u64;
        frame
    }

    /// Cancel-safe: the frame is queued whole or not at all.
    pub(super) async fn send(&mut self, frame: Bytes) -> Result<(), Broken> {
        self.frame_tx.send(frame).await.map_err(|_| Broken)
    }
}

/// The receiving half of a stream to a leader.
pub(super) struct Inward {
    frame_rx: FrameRx,
    answered: u64,
}

impl Inward {
    /// The next outcomes, in the order sent. Cancel-safe.
    pub(super) async fn answer(&mut self) -> Answer {
        let frame = self.frame_rx.next().await;
        let frame = frame.and_then(Result::ok).ok_or(Broken)?;
        let outcomes = answers_in(frame, self.answered).ok_or(Broken)?;
        self.answered += outcomes.len() as u64;
        Ok(outcomes)
    }
}

/// Publishes as a frame; `first` is the number of the first of them on this stream.
fn request(first: u64, publishes: &[entry::Publish]) -> Bytes {
    let publishes = publishes
        .iter()
        .map(|publish| publish.encode_to_vec().into());
    let publishes = publishes.collect();
    peer::Forward { first, publishes }.encode_to_vec().into()
}

/// The leader's end of the streams.
pub(super) struct Door {
    pub(super) proposers: Vec<Proposer>,
}

impl Door {
    pub(super) fn register(self, transport: &Transport) {
        transport.register_stream(FORWARD, Arc::new(self));
    }
}

impl StreamHandler for Door {
    fn handle(
        &self,
        _: NodeId,
        group: GroupId,
        frame_tx: FrameTx,
        frame_rx: FrameRx,
    ) -> BoxFuture<'static, ()> {
        let shard = group
            .shard()
            .and_then(|ShardId(shard)| usize::try_from(shard).ok());
        let proposer = shard.and_then(|shard| self.proposers.get(shard)).cloned();
        Box::pin(async move {
            // An unknown shard: the stream's end tells the sender.
            if let Some(proposer) = proposer {
                serve(proposer, frame_tx, frame_rx).await;
            }
        })
    }
}

/// Carries publishes in and answers out until either side ends.
async fn serve(proposer: Proposer, mut frame_tx: FrameTx, mut frame_rx: FrameRx) {
    let (session, mut answer_rx) = proposer.open();
    let (mut received, mut answered) = (0, 0);
    let inward = async {
        while let Some(Ok(frame)) = frame_rx.next().await {
            let Some(publishes) = request_in(frame, received) else {
                tracing::warn!("a forwarded frame was malformed or out of order");
                return;
            };
            received += publishes.len() as u64;
            if session.send(publishes).await.is_err() {
                return;
            }
        }
    };
    let outward = async {
        while let Some(Ok(outcomes)) = answer_rx.recv().await {
            let first = answered;
            answered += outcomes.len() as u64;
            let outcomes = outcomes.into_iter().map(outcome_out).collect();
            let frame = peer::Forwarded { first, outcomes }.encode_to_vec();
            if frame_tx.send(frame.into()).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = inward => {}
        () = outward => {}
    }
}

fn request_in(frame: Bytes, expected: u64) -> Option<Vec<entry::Publish>> {
    let request = peer::Forward::decode(frame).ok()?;
    let publishes = request.publishes.into_iter().map(entry::Publish::decode);
    let publishes = publishes.collect::<Result<Vec<_>, _>>().ok()?;
    (request.first == expected).then_some(publishes)
}

fn answers_in(frame: Bytes, expected: u64) -> Option<Vec<Outcome>> {
    let answer = peer::Forwarded::decode(frame).ok()?;
    let outcomes = answer.outcomes.into_iter().map(outcome_in);
    let outcomes = outcomes.collect::<Option<Vec<_>>>()?;
    (answer.first == expected).then_some(outcomes)
}

fn outcome_out(outcome: Outcome) -> peer::Outcome {
    use peer::outcome::Kind;
    let (kind, serial) = match outcome {
        Outcome::Stored(serial) => (Kind::Stored, Some(serial)),
        Outcome::Duplicate(serial) => (Kind::Duplicate, serial),
        Outcome::Fenced => (Kind::Fenced, None),
        Outcome::Gap => (Kind::Gap, None),
        Outcome::Full => (Kind::Full, None),
        Outcome::Unchanged => (Kind::Unchanged, None),
        // No publisher's publish is a move.
        Outcome::Invalid | Outcome::Moved => (Kind::Invalid, None),
    };
    let known = serial.is_some();
    let serial = serial.unwrap_or_default();
    peer::Outcome {
        kind: kind.into(),
        known,
        incarnation: u32::from(serial.incarnation),
        index: serial.index,
        position: u32::from(serial.position),
    }
}

fn outcome_in(outcome: peer::Outcome) -> Option<Outcome> {
    use peer::outcome::Kind;
    let serial = Serial {
        incarnation: u16::try_from(outcome.incarnation).ok()?,
        index: outcome.index,
        position: u16::try_from(outcome.position).ok()?,
    };
    Some(match Kind::try_from(outcome.kind).ok()? {
        Kind::Stored => Outcome::Stored(serial),
        Kind::Duplicate => Outcome::Duplicate(outcome.known.then_some(serial)),
        Kind::Fenced => Outcome::Fenced,
        Kind::Gap => Outcome::Gap,
        Kind::Full => Outcome::Full,
        Kind::Unchanged => Outcome::Unchanged,
        Kind::Invalid => Outcome::Invalid,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_travel_unchanged() {
        let serial = Serial {
            incarnation: 1,
            index: 7,
            position: 3,
        };
        let all = [
            Outcome::Stored(serial),
            Outcome::Duplicate(Some(serial)),
            Outcome::Duplicate(None),
            Outcome::Fenced,
            Outcome::Gap,
            Outcome::Full,
            Outcome::Unchanged,
            Outcome::Invalid,
        ];
        for outcome in all {
            assert_eq!(outcome_in(outcome_out(outcome)), Some(outcome));
        }
    }

    #[test]
    fn a_frame_out_of_order_is_refused() {
        let frame = request(5, &[entry::Publish::default()]);
        assert!(request_in(frame.clone(), 4).is_none());
        assert_eq!(
            request_in(frame, 5).map(|publishes| publishes.len()),
            Some(1)
        );
    }
}
