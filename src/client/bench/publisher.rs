//! One connection that publishes and measures the answers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::client::bench::counters::{Counters, histogram, micros};
use crate::client::bench::load::{AFTER_INTERRUPT, Plan};
use crate::client::{Answer, Connection, Error, Pending};
use crate::wire::ably::{Data, Message};

/// Tokio's timer is this coarse. A publish that is later than that behind its schedule is measured from when it
/// should have been sent, so that a stalled server cannot hide its stall by stopping the load.
const TIMER: Duration = Duration::from_millis(2);

/// One connection that publishes, to all channels in turn.
pub(super) struct Publisher {
    index: usize,
    channels: Arc<[String]>,
    counters: Arc<Counters>,
    began: Instant,
    share: u64,
    /// How long to wait for an answer while none comes.
    patience: Duration,
    /// Time from one message to the next.
    interval: Option<Duration>,
    filler: String,
    /// Messages sent to each channel.
    sent_to: Vec<u64>,
    /// Last serial given in each channel.
    serials: Vec<Option<String>>,
}

pub(super) struct Sent {
    at: Instant,
    channel: usize,
    pending: Pending,
}

pub(super) struct Outcome {
    pub(super) ended: Instant,
    pub(super) sent: u64,
    pub(super) refused: u64,
    pub(super) serials_disordered: u64,
    pub(super) first_error: Option<String>,
    pub(super) ack: Histogram<u64>,
    pub(super) pending: VecDeque<Sent>,
}

impl Publisher {
    pub(super) fn new(
        plan: &Plan,
        index: usize,
        channels: Arc<[String]>,
        counters: Arc<Counters>,
        began: Instant,
    ) -> Self {
        let each = |rate: f64| Duration::from_secs_f64((plan.publishers as f64 / rate).min(1e6));
        Self {
            index,
            share: plan.share(index),
            patience: plan.settle,
            interval: plan.rate.map(each),
            filler: (0_u8..89)
                .map(filler_char)
                .cycle()
                .take(plan.size)
                .collect(),
            sent_to: vec![0; channels.len()],
            serials: vec![None; channels.len()],
            channels,
            counters,
            began,
        }
    }

    pub(super) async fn run(
        mut self,
        connection: &Connection,
        stop: &CancellationToken,
    ) -> Outcome {
        let mut outcome = Outcome {
            ended: self.began,
            sent: 0,
            refused: 0,
            serials_disordered: 0,
            first_error: None,
            ack: histogram(),
            pending: VecDeque::new(),
        };
        for n in 0..self.share {
            let sent = tokio::select! {
                sent = self.send(connection, n) => sent,
                () = stop.cancelled() => break,
            };
            match sent {
                Ok(sent) => outcome.pending.push_back(sent),
                Err(err) => {
                    outcome.first_error.get_or_insert(err.to_string());
                    break;
                }
            }
            outcome.sent += 1;
            self.take_answers(&mut outcome);
        }
        while let Some(front) = outcome.pending.front_mut() {
            // The answer stays where it is if this is given up.
            let answered = timeout(self.patience, front.pending.answer());
            let answer = tokio::select! {
                answer = answered => answer,
                () = after(stop) => break,
            };
            let Ok(answer) = answer else { break };
            let Some(Sent { at, channel, .. }) = outcome.pending.pop_front() else {
                break;
            };
            self.on_answer(&mut outcome, at, channel, answer);
        }
        outcome
    }

    /// Sends message `n` of this publisher when its time has come.
    async fn send(&mut self, connection: &Connection, n: u64) -> Result<Sent, Error> {
        let mut at = Instant::now();
        if let Some(interval) = self.interval {
            let due = self.began + interval.mul_f64(n as f64);
            sleep_until(due).await;
            at = Instant::now();
            if at - due > TIMER {
                at = due;
            }
        }
        let turn = (n + self.index as u64) % self.channels.len() as u64;
        let channel = usize::try_from(turn).expect("a remainder of the number of channels");
        let nanos = at.saturating_duration_since(self.counters.begin).as_nanos();
        let message = Message {
            name: Some(format!("{}.{}.{nanos}", self.index, self.sent_to[channel])),
            data: Some(Data::Text(self.filler.clone())),
            ..Message::default()
        };
        let published = connection.publish(&self.channels[channel], vec![message]);
        let published = timeout(self.patience, published).await;
        let pending = published.map_err(|_| Error::NoAnswer("a publish"))??;
        self.sent_to[channel] += 1;
        Ok(Sent {
            at,
            channel,
            pending,
        })
    }

    fn take_answers(&mut self, outcome: &mut Outcome) {
        while let Some(front) = outcome.pending.front_mut() {
            let (at, channel) = (front.at, front.channel);
            let answer = match front.pending.try_answer() {
                Ok(None) => return,
                Ok(Some(answer)) => Ok(answer),
                Err(err) => Err(err),
            };
            outcome.pending.pop_front();
            self.on_answer(outcome, at, channel, answer);
        }
    }

    fn on_answer(
        &mut self,
        outcome: &mut Outcome,
        at: Instant,
        channel: usize,
        answer: Result<Answer, Error>,
    ) {
        let answer = match answer {
            Ok(answer) => answer,
            Err(err) => {
                outcome.refused += 1;
                outcome.first_error.get_or_insert(err.to_string());
                return;
            }
        };
        outcome.ended = outcome.ended.max(answer.received);
        let serials = match answer.outcome {
            Ok(serials) => serials,
            Err(error) => {
                outcome.refused += 1;
                outcome.first_error.get_or_insert(error.to_string());
                return;
            }
        };
        self.counters.acked.add();
        outcome
            .ack
            .saturating_record(micros(answer.received.saturating_duration_since(at)));
        let serial = serials.into_iter().next().flatten();
        if serial <= self.serials[channel] {
            outcome.serials_disordered += 1;
        }
        self.serials[channel] = serial;
    }
}

/// Varied enough that nothing on the way can compress it to nothing, and plain in JSON.
fn filler_char(n: u8) -> char {
    const CHARS: &[u8] = b"etaoinshrdlcumwfgypbvkjxqz0123456789ETAOINSHRDLCUMWFGYPBVKJXQZ-_.,";
    let n = usize::from(n);
    char::from(CHARS[(n * n + n / 7) % CHARS.len()])
}

/// Resolves some time after an interrupt.
async fn after(stop: &CancellationToken) {
    stop.cancelled().await;
    sleep(AFTER_INTERRUPT).await;
}
