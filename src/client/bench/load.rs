//! The load itself: publishers with a window, subscribers that check every message.
//!
//! Each message's name says who sent it, which of that publisher's messages on the channel it is, and when; so a
//! subscriber needs nothing else to see losses, repeats and disorder.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;
use hdrhistogram::Histogram;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::client::bench::counters::{Counters, histogram};
use crate::client::bench::publisher::Publisher;
use crate::client::bench::subscriber::Subscriber;
use crate::client::{Connection, Error, Event, Options};
use crate::tasks::{OnError, Tasks};

/// Connections opened or closed at one time.
const CONNECTING: usize = 64;
/// How long answers are awaited after an interrupt.
pub(super) const AFTER_INTERRUPT: Duration = Duration::from_secs(5);
/// What to do.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) bench: &'static str,
    pub(super) options: Options,
    pub(super) channels: usize,
    pub(super) publishers: usize,
    pub(super) subscribers_per_channel: usize,
    /// In all.
    pub(super) messages: u64,
    pub(super) size: usize,
    /// Messages per second in all.
    pub(super) rate: Option<f64>,
    pub(super) prefix: String,
    pub(super) settle: Duration,
}

impl Plan {
    pub(super) fn deliveries(&self) -> u64 {
        self.messages
            .saturating_mul(self.subscribers_per_channel as u64)
    }

    pub(super) fn subscribers(&self) -> usize {
        self.channels * self.subscribers_per_channel
    }

    /// Options of connection `index`: they begin at different nodes.
    fn options_of(&self, index: usize) -> Options {
        let mut options = self.options.clone();
        let nodes = options.urls.len().max(1);
        options.urls.rotate_left(index % nodes);
        options
    }

    /// How many of the messages publisher `index` sends.
    pub(super) fn share(&self, index: usize) -> u64 {
        let (index, publishers) = (index as u64, self.publishers as u64);
        self.messages / publishers + u64::from(index < self.messages % publishers)
    }
}

/// What came of it, beside the counters.
pub(super) struct Measured {
    pub(super) publishing: Duration,
    /// Until the last delivery, if there are subscribers.
    pub(super) elapsed: Duration,
    pub(super) partial: bool,
    pub(super) sent: u64,
    pub(super) refused: u64,
    pub(super) unanswered: u64,
    /// Answers whose serial does not follow the one before it in the channel.
    pub(super) serials_disordered: u64,
    pub(super) first_error: Option<String>,
    /// Deliveries there should have been for what was acknowledged.
    pub(super) expected: u64,
    /// Publish to answer, in microseconds.
    pub(super) ack: Histogram<u64>,
}

/// Puts the load on; `None` when interrupted before it began.
///
/// # Errors
/// When a connection or an attachment cannot be made.
pub(super) async fn run(
    plan: &Plan,
    counters: &Arc<Counters>,
    tasks: &Tasks,
    stop: &CancellationToken,
) -> Result<Option<Measured>, Error> {
    let channels = channel_names(plan)?;
    let connected = tokio::select! {
        connected = connect_all(plan, &channels, counters, tasks) => connected?,
        () = stop.cancelled() => return Ok(None),
    };
    let began = Instant::now();
    let (outcomes_tx, mut outcomes) = mpsc::channel(plan.publishers);
    for (index, connection) in connected.publishers.into_iter().enumerate() {
        let publisher = Publisher::new(plan, index, channels.clone(), counters.clone(), began);
        let (outcomes_tx, stop) = (outcomes_tx.clone(), stop.clone());
        tasks.spawn("client.publisher", OnError::Log, |_| async move {
            let outcome = publisher.run(&connection, &stop).await;
            connection.close().await;
            // Fails only when the run was given up.
            let _ = outcomes_tx.send(outcome).await;
            Ok(())
        });
    }
    drop(outcomes_tx);
    let mut measured = Measured {
        publishing: Duration::ZERO,
        elapsed: Duration::ZERO,
        partial: false,
        sent: 0,
        refused: 0,
        unanswered: 0,
        serials_disordered: 0,
        first_error: None,
        expected: 0,
        ack: histogram(),
    };
    while let Some(outcome) = outcomes.recv().await {
        measured.publishing = measured.publishing.max(outcome.ended - began);
        measured.sent += outcome.sent;
        measured.refused += outcome.refused;
        measured.unanswered += outcome.pending.len() as u64;
        measured.serials_disordered += outcome.serials_disordered;
        measured.first_error = measured.first_error.or(outcome.first_error);
        measured.ack.add(&outcome.ack).expect("all are made alike");
    }
    measured.expected = counters.acked.now() * plan.subscribers_per_channel as u64;
    settle(plan, counters, measured.expected, stop).await;
    measured.elapsed = measured.publishing.max(counters.delivering(began));
    measured.partial = stop.is_cancelled();
    let close = stream::iter(connected.subscribers).map(Connection::close);
    close.buffer_unordered(CONNECTING).collect::<()>().await;
    Ok(Some(measured))
}

/// Waits until every expected delivery has come, or none comes any more.
async fn settle(plan: &Plan, counters: &Arc<Counters>, expected: u64, stop: &CancellationToken) {
    let (mut seen, mut since) = (counters.received.now(), Instant::now());
    let patience = |stop: &CancellationToken| match stop.is_cancelled() {
        true => plan.settle.min(AFTER_INTERRUPT),
        false => plan.settle,
    };
    while counters.received.now() < expected && since.elapsed() < patience(stop) {
        sleep(Duration::from_millis(10)).await;
        let now = counters.received.now();
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
    }
}

/// Names that no other run uses.
fn channel_names(plan: &Plan) -> Result<Arc<[String]>, Error> {
    let mut run = [0; 6];
    getrandom::fill(&mut run).map_err(|err| Error::Io {
        what: "no random numbers",
        reason: err.to_string(),
    })?;
    let run = run
        .iter()
        .fold(0_u64, |run, byte| run << 8 | u64::from(*byte));
    let name = |channel| format!("{}-{run:012x}-{channel}", plan.prefix);
    Ok((0..plan.channels).map(name).collect())
}

struct Connected {
    publishers: Vec<Connection>,
    subscribers: Vec<Connection>,
}

async fn connect_all(
    plan: &Plan,
    channels: &Arc<[String]>,
    counters: &Arc<Counters>,
    tasks: &Tasks,
) -> Result<Connected, Error> {
    let subscribe = |index: usize| {
        let channel = &channels[index % channels.len()];
        let subscriber = Subscriber::new(index, channel, plan.publishers, counters.clone());
        async move {
            let (connection, events) = Connection::connect(plan.options_of(index), tasks).await?;
            tasks.spawn("client.subscriber", OnError::Log, |_| {
                subscriber.run(events)
            });
            connection.attach(channel, None, [].into()).await?;
            Ok::<_, Error>(connection)
        }
    };
    let mut subscribers = Vec::with_capacity(plan.subscribers());
    let mut subscribing =
        stream::iter((0..plan.subscribers()).map(subscribe)).buffer_unordered(CONNECTING);
    while let Some(connection) = subscribing.next().await {
        subscribers.push(connection?);
    }
    drop(subscribing);
    let connect = |index| async move {
        let (connection, mut events) = Connection::connect(plan.options_of(index), tasks).await?;
        let counters = counters.clone();
        tasks.spawn("client.events", OnError::Log, |_| async move {
            while let Some(event) = events.next().await {
                if matches!(event, Event::Disconnected { .. }) {
                    counters.reconnects.add();
                }
            }
            Ok(())
        });
        Ok::<_, Error>(connection)
    };
    let mut publishers = Vec::with_capacity(plan.publishers);
    let mut connecting =
        stream::iter((0..plan.publishers).map(connect)).buffer_unordered(CONNECTING);
    while let Some(connection) = connecting.next().await {
        publishers.push(connection?);
    }
    drop(connecting);
    Ok(Connected {
        publishers,
        subscribers,
    })
}
