//! The load itself: publishers with a window, subscribers that check every message.
//!
//! Each message's name says who sent it, which of that publisher's messages on the channel it is, and when; so a
//! subscriber needs nothing else to see losses, repeats and disorder.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;
use hdrhistogram::Histogram;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::client::{Connection, Error, Event, Events, Options, Pending};
use crate::tasks::{OnError, Tasks};
use crate::wire::ably::{Data, Message};

/// Connections opened or closed at one time.
const CONNECTING: usize = 64;
/// Histograms that subscribers share: one each would cost 160 KB per subscriber.
const SHARDS: usize = 16;
/// Longest latency that is told apart.
const MICROS_MAX: u64 = 600_000_000;
/// How long answers are awaited after an interrupt.
const AFTER_INTERRUPT: Duration = Duration::from_secs(5);
/// Tokio's timer is this coarse. A publish that is later than that behind its schedule is measured from when it
/// should have been sent, so that a stalled server cannot hide its stall by stopping the load.
const TIMER: Duration = Duration::from_millis(2);

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
    fn share(&self, index: usize) -> u64 {
        let (index, publishers) = (index as u64, self.publishers as u64);
        self.messages / publishers + u64::from(index < self.messages % publishers)
    }
}

/// What everybody counts together. Clones share.
#[derive(Clone)]
pub(super) struct Counters(Arc<Shared>);

struct Shared {
    begin: Instant,
    acked: AtomicU64,
    received: AtomicU64,
    duplicates: AtomicU64,
    disordered: AtomicU64,
    foreign: AtomicU64,
    reconnects: AtomicU64,
    discontinuities: AtomicU64,
    delivery: Vec<Mutex<Histogram<u64>>>,
}

impl Counters {
    pub(super) fn start() -> Self {
        let zero = AtomicU64::default;
        Self(Arc::new(Shared {
            begin: Instant::now(),
            acked: zero(),
            received: zero(),
            duplicates: zero(),
            disordered: zero(),
            foreign: zero(),
            reconnects: zero(),
            discontinuities: zero(),
            delivery: (0..SHARDS).map(|_| Mutex::new(histogram())).collect(),
        }))
    }

    pub(super) fn acked(&self) -> u64 {
        self.0.acked.load(Ordering::Relaxed)
    }

    /// Messages that arrived for the first time, over all subscribers.
    pub(super) fn received(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }

    pub(super) fn duplicates(&self) -> u64 {
        self.0.duplicates.load(Ordering::Relaxed)
    }

    /// Messages that came after later ones, or before earlier ones that never came.
    pub(super) fn disordered(&self) -> u64 {
        self.0.disordered.load(Ordering::Relaxed)
    }

    /// Messages that this run did not publish.
    pub(super) fn foreign(&self) -> u64 {
        self.0.foreign.load(Ordering::Relaxed)
    }

    pub(super) fn reconnects(&self) -> u64 {
        self.0.reconnects.load(Ordering::Relaxed)
    }

    pub(super) fn discontinuities(&self) -> u64 {
        self.0.discontinuities.load(Ordering::Relaxed)
    }

    /// Publish to delivery, in microseconds.
    pub(super) fn delivery(&self) -> Histogram<u64> {
        let mut all = histogram();
        for shard in &self.0.delivery {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            all.add(&*shard).expect("all are made alike");
        }
        all
    }
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(MICROS_MAX, 3).expect("the bounds are in the allowed range")
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros())
        .unwrap_or(MICROS_MAX)
        .min(MICROS_MAX)
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
    counters: &Counters,
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
    measured.expected = counters.acked() * plan.subscribers_per_channel as u64;
    settle(plan, counters, measured.expected, stop).await;
    measured.elapsed = measured.publishing.max(connected.last.get(began));
    measured.partial = stop.is_cancelled();
    let close = stream::iter(connected.subscribers).map(Connection::close);
    close.buffer_unordered(CONNECTING).collect::<()>().await;
    Ok(Some(measured))
}

/// Waits until every expected delivery has come, or none comes any more.
async fn settle(plan: &Plan, counters: &Counters, expected: u64, stop: &CancellationToken) {
    let (mut seen, mut since) = (counters.received(), Instant::now());
    let patience = |stop: &CancellationToken| match stop.is_cancelled() {
        true => plan.settle.min(AFTER_INTERRUPT),
        false => plan.settle,
    };
    while counters.received() < expected && since.elapsed() < patience(stop) {
        sleep(Duration::from_millis(10)).await;
        let now = counters.received();
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
    last: LastDelivery,
}

/// When the last delivery came.
#[derive(Clone, Default)]
struct LastDelivery(Arc<Mutex<Option<Instant>>>);

impl LastDelivery {
    fn set(&self, at: Instant) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *last = (*last).max(Some(at));
    }

    fn get(&self, began: Instant) -> Duration {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.map_or(Duration::ZERO, |last| last.saturating_duration_since(began))
    }
}

async fn connect_all(
    plan: &Plan,
    channels: &Arc<[String]>,
    counters: &Counters,
    tasks: &Tasks,
) -> Result<Connected, Error> {
    let last = LastDelivery::default();
    let subscribe = |index: usize| {
        let channel = &channels[index % channels.len()];
        let subscriber = Subscriber {
            channel: channel.clone(),
            next: vec![0; plan.publishers],
            gaps: vec![Vec::new(); plan.publishers],
            shard: index % SHARDS,
            counters: counters.clone(),
            attached: false,
            last: last.clone(),
        };
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
                    add(&counters.0.reconnects);
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
        last,
    })
}

/// One connection that publishes, to all channels in turn.
struct Publisher {
    index: usize,
    channels: Arc<[String]>,
    counters: Counters,
    began: Instant,
    share: u64,
    /// Time from one message to the next.
    interval: Option<Duration>,
    filler: String,
    /// Messages sent to each channel.
    sent_to: Vec<u64>,
    /// Last serial given in each channel.
    serials: Vec<Option<String>>,
}

struct Sent {
    at: Instant,
    channel: usize,
    pending: Pending,
}

struct Outcome {
    ended: Instant,
    sent: u64,
    refused: u64,
    serials_disordered: u64,
    first_error: Option<String>,
    ack: Histogram<u64>,
    pending: VecDeque<Sent>,
}

impl Publisher {
    fn new(
        plan: &Plan,
        index: usize,
        channels: Arc<[String]>,
        counters: Counters,
        began: Instant,
    ) -> Self {
        let each = |rate: f64| Duration::from_secs_f64((plan.publishers as f64 / rate).min(1e6));
        Self {
            index,
            share: plan.share(index),
            interval: plan.rate.map(each),
            // Varied enough that nothing on the way can compress it to nothing.
            filler: (0..plan.size)
                .map(|n| char::from(b'!' + (n * n % 89) as u8))
                .collect(),
            sent_to: vec![0; channels.len()],
            serials: vec![None; channels.len()],
            channels,
            counters,
            began,
        }
    }

    async fn run(mut self, connection: &Connection, stop: &CancellationToken) -> Outcome {
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
            let answered = async { front.pending.answer().await };
            let answer = tokio::select! {
                answer = answered => answer,
                () = after(stop) => break,
            };
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
        let nanos = at
            .saturating_duration_since(self.counters.0.begin)
            .as_nanos();
        let message = Message {
            name: Some(format!("{}.{}.{nanos}", self.index, self.sent_to[channel])),
            data: Some(Data::Text(self.filler.clone())),
            ..Message::default()
        };
        let pending = connection
            .publish(&self.channels[channel], vec![message])
            .await?;
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
        answer: Result<crate::client::Answer, Error>,
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
        add(&self.counters.0.acked);
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

/// Resolves some time after an interrupt.
async fn after(stop: &CancellationToken) {
    stop.cancelled().await;
    sleep(AFTER_INTERRUPT).await;
}

/// One connection attached to one channel.
struct Subscriber {
    channel: String,
    /// The next message expected of each publisher.
    next: Vec<u64>,
    /// Numbers that were jumped over, of each publisher.
    gaps: Vec<Vec<u64>>,
    shard: usize,
    counters: Counters,
    attached: bool,
    last: LastDelivery,
}

impl Subscriber {
    async fn run(mut self, mut events: Events) -> anyhow::Result<()> {
        let counters = self.counters.clone();
        while let Some(event) = events.next().await {
            match event {
                Event::Messages(messages) => {
                    let since = messages
                        .received
                        .saturating_duration_since(counters.0.begin);
                    for message in &messages.messages {
                        self.on_message(message, since);
                    }
                    self.last.set(messages.received);
                }
                Event::Disconnected { .. } => add(&counters.0.reconnects),
                Event::Attached { resumed, .. } => {
                    if std::mem::replace(&mut self.attached, true) && !resumed {
                        add(&counters.0.discontinuities);
                    }
                }
                Event::ChannelFailed { error, .. } => {
                    anyhow::bail!("channel {}: {error}", self.channel)
                }
                Event::Failed(error) => return Err(error.into()),
                Event::Connected { .. } => {}
            }
        }
        Ok(())
    }

    fn on_message(&mut self, message: &Message, since: Duration) {
        let shared = &self.counters.0;
        let parsed = message.name.as_deref().and_then(parse_name);
        let Some((publisher, number, sent)) = parsed.filter(|(p, ..)| *p < self.next.len()) else {
            add(&shared.foreign);
            return;
        };
        let (next, gaps) = (&mut self.next[publisher], &mut self.gaps[publisher]);
        if number < *next {
            match gaps.iter().position(|gap| *gap == number) {
                Some(gap) => {
                    gaps.swap_remove(gap);
                    add(&shared.disordered);
                }
                None => {
                    add(&shared.duplicates);
                    return;
                }
            }
        } else {
            if number > *next {
                add(&shared.disordered);
                // A malformed number must not fill the memory.
                gaps.extend((*next..number).take(10_000));
            }
            *next = number + 1;
        }
        let latency = micros(since.saturating_sub(sent));
        let mut shard = shared.delivery[self.shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        shard.saturating_record(latency);
        drop(shard);
        add(&shared.received);
    }
}

/// Publisher, number in the channel, and time since the begin.
fn parse_name(name: &str) -> Option<(usize, u64, Duration)> {
    let mut parts = name.split('.');
    let publisher = parts.next()?.parse().ok()?;
    let number = parts.next()?.parse().ok()?;
    let sent = Duration::from_nanos(parts.next()?.parse().ok()?);
    parts.next().is_none().then_some((publisher, number, sent))
}
