//! A load of publishers who never give up, and the books that are kept of what they were told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use firth::cluster::Submitted;
use firth::types::Serial;
use tokio::task::JoinHandle;

use crate::net::{LONG, Net, Outcome, RETENTION, SOON, Stored, outcome, until};

/// How long a publisher waits for a node before it tries another.
const ACK_PATIENCE: Duration = Duration::from_secs(2);

/// What a load is made of.
#[derive(Clone, Debug)]
pub(crate) struct Mix {
    /// What the channels' names begin with.
    pub(crate) prefix: &'static str,
    pub(crate) channels: usize,
    /// Publishers of each channel; each has an order of its own to keep.
    pub(crate) publishers: usize,
    /// Publishes that one has under way at a time.
    pub(crate) burst: usize,
    /// Between bursts, so that a test machine can do something else.
    pub(crate) pause: Duration,
    /// Largest body in bytes.
    pub(crate) body_max: usize,
    pub(crate) retention: Duration,
}

impl Default for Mix {
    fn default() -> Self {
        Self {
            prefix: "c",
            channels: 4,
            publishers: 1,
            burst: 8,
            pause: Duration::from_millis(30),
            body_max: 2000,
            retention: LONG,
        }
    }
}

impl Mix {
    /// One of which nothing is kept for long: the log can go.
    pub(crate) fn passing() -> Self {
        Self {
            retention: RETENTION,
            ..Self::default()
        }
    }
}

/// Publishers at work.
pub(crate) struct Load {
    stopped: Arc<AtomicBool>,
    counts: Vec<Arc<AtomicUsize>>,
    tasks: Vec<JoinHandle<Publisher>>,
    mix: Mix,
}

/// One publisher and its books. It goes on with the next burst when all of the last one is acknowledged.
struct Publisher {
    net: Arc<Net>,
    mix: Mix,
    stopped: Arc<AtomicBool>,
    count: Arc<AtomicUsize>,
    channel: String,
    name: String,
    at: usize,
    /// Each with the cluster's time before it was first handed in: its record is no older.
    sent: Vec<(String, u64)>,
    /// In the order in which they must be found. What was sent behind one that had to be repeated is left out: it may
    /// have been stored before that.
    ordered: Vec<String>,
    /// By place in `sent`.
    acked: BTreeMap<usize, Serial>,
}

/// The books, closed.
pub(crate) struct Ledger {
    publishers: Vec<Publisher>,
    retention: Duration,
}

/// The one body that a publish of this id can have.
pub(crate) fn body(id: &str, max: usize) -> Bytes {
    let sum = id.bytes().fold(0_usize, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(usize::from(byte))
    });
    id.bytes().cycle().take(20 + sum % max).collect()
}

async fn in_time(until: tokio::time::Instant, submitted: Option<Submitted>) -> Outcome {
    let answered = tokio::time::timeout_at(until, outcome(submitted)).await;
    answered.unwrap_or(Outcome::Unknown)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Load {
    /// Starts to publish through all nodes.
    pub(crate) fn start(net: &Arc<Net>, mix: &Mix) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        let mut load = Self {
            stopped: stopped.clone(),
            counts: Vec::new(),
            tasks: Vec::new(),
            mix: mix.clone(),
        };
        for n in 0..mix.channels * mix.publishers {
            let count = Arc::new(AtomicUsize::new(0));
            load.counts.push(count.clone());
            let publisher = Publisher {
                net: net.clone(),
                mix: mix.clone(),
                stopped: stopped.clone(),
                count,
                channel: format!("{}-{}", mix.prefix, n % mix.channels),
                name: format!("p{n}"),
                at: n,
                sent: Vec::new(),
                ordered: Vec::new(),
                acked: BTreeMap::new(),
            };
            load.tasks.push(tokio::spawn(publisher.run()));
        }
        load
    }

    /// Waits until each publisher was told of `more` acknowledgements: nobody is left behind.
    pub(crate) async fn progress(&self, more: usize) {
        let load = |count: &Arc<AtomicUsize>| count.load(Ordering::Relaxed);
        let goals: Vec<usize> = self.counts.iter().map(|count| load(count) + more).collect();
        let what = format!("{more} more acknowledgements for each publisher");
        until(&what, SOON, async || {
            let mut counts = self.counts.iter().zip(&goals);
            counts
                .all(|(count, goal)| load(count) >= *goal)
                .then_some(())
        })
        .await;
    }

    /// Ends it. What has no answer by now is left open.
    pub(crate) async fn finish(self) -> Ledger {
        self.stopped.store(true, Ordering::Relaxed);
        let mut publishers = Vec::new();
        for task in self.tasks {
            let ended = tokio::time::timeout(SOON, task).await;
            publishers.push(ended.expect("publishers stop when told to").unwrap());
        }
        Ledger {
            publishers,
            retention: self.mix.retention,
        }
    }
}

impl Publisher {
    async fn run(mut self) -> Self {
        while !self.stopped.load(Ordering::Relaxed) {
            self.burst().await;
            tokio::time::sleep(self.mix.pause).await;
        }
        self
    }

    async fn burst(&mut self) {
        let node = self.node();
        let first = self.sent.len();
        let mut submitted = Vec::new();
        for n in first..first + self.mix.burst {
            let id = format!("{}-{n}", self.name);
            let sent_ms = self.net.now_ms();
            submitted.push(self.submit(node, &id));
            self.sent.push((id, sent_ms));
        }
        let mut again = Vec::new();
        let until = tokio::time::Instant::now() + ACK_PATIENCE;
        for (n, submitted) in (first..).zip(submitted) {
            match in_time(until, submitted).await.serial() {
                Some(serial) => self.on_ack(n, serial, again.is_empty()),
                None => again.push(n),
            }
        }
        // Who was not answered here tries elsewhere.
        self.at += usize::from(!again.is_empty());
        for (nth, n) in again.into_iter().enumerate() {
            self.repeat(n, nth == 0).await;
        }
    }

    /// Publishes it through one node after the other until one acknowledges.
    async fn repeat(&mut self, n: usize, in_order: bool) {
        while !self.stopped.load(Ordering::Relaxed) {
            let submitted = self.submit(self.node(), &self.sent[n].0);
            let until = tokio::time::Instant::now() + ACK_PATIENCE;
            if let Some(serial) = in_time(until, submitted).await.serial() {
                return self.on_ack(n, serial, in_order);
            }
            self.at += 1;
            tokio::time::sleep(self.mix.pause).await;
        }
    }

    fn submit(&self, node: u64, id: &str) -> Option<Submitted> {
        let body = body(id, self.mix.body_max);
        let retention = self.mix.retention;
        self.net.submit(node, &self.channel, id, body, retention)
    }

    fn on_ack(&mut self, n: usize, serial: Serial, in_order: bool) {
        self.acked.insert(n, serial);
        if in_order {
            self.ordered.push(self.sent[n].0.clone());
        }
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    fn node(&self) -> u64 {
        let ids = self.net.ids();
        ids[self.at % ids.len()]
    }
}

impl Ledger {
    pub(crate) fn acked(&self) -> usize {
        let publishers = self.publishers.iter();
        publishers.map(|publisher| publisher.acked.len()).sum()
    }

    fn of(&self, channel: &str) -> impl Iterator<Item = &Publisher> {
        let publishers = self.publishers.iter();
        publishers.filter(move |publisher| publisher.channel == channel)
    }

    /// Every living node shows the same records: each acknowledged one once, at the serial that its publisher was told,
    /// with its own body, in its publisher's order; and none that nobody sent. What may have outlived its retention
    /// need not be there.
    pub(crate) async fn verify(&self, net: &Net) {
        let channels: BTreeSet<&str> = self
            .publishers
            .iter()
            .map(|publisher| publisher.channel.as_str())
            .collect();
        for channel in channels {
            let mut first: Option<(u64, Vec<Stored>)> = None;
            for live in net.living() {
                let stored = net.history(live.id, channel).await;
                let now_ms = net.now_ms();
                self.check(live.id, channel, &stored, now_ms);
                let (other, known) = first.get_or_insert_with(|| (live.id, stored.clone()));
                // Retention may have taken the oldest meanwhile.
                let gone = known.len().saturating_sub(stored.len());
                let young = known[..gone]
                    .iter()
                    .find(|at| self.is_kept(channel, &at.id, now_ms));
                assert!(
                    known[gone..] == stored && young.is_none(),
                    "{channel}: nodes {other} and {} show different histories",
                    live.id
                );
            }
        }
    }

    /// Whether the record is surely retained at this time.
    fn is_kept(&self, channel: &str, id: &str, now_ms: u64) -> bool {
        let mut sent = self.of(channel).flat_map(|publisher| &publisher.sent);
        let sent = sent.find(|(sent, _)| sent == id);
        sent.is_some_and(|(_, sent_ms)| now_ms.saturating_sub(*sent_ms) < millis(self.retention))
    }

    fn check(&self, node: u64, channel: &str, stored: &[Stored], now_ms: u64) {
        let at = format!("{channel} on node {node}");
        let ascend = stored.windows(2).find(|two| two[0].serial >= two[1].serial);
        assert!(ascend.is_none(), "{at}: {ascend:?} do not ascend");
        let mut places = BTreeMap::new();
        for (place, record) in stored.iter().enumerate() {
            let twice = places.insert(record.id.as_str(), place);
            assert!(twice.is_none(), "{at}: {} is there twice", record.id);
        }
        let sent: BTreeSet<&str> = self
            .of(channel)
            .flat_map(|publisher| publisher.sent.iter().map(|(id, _)| id.as_str()))
            .collect();
        for record in stored {
            assert!(
                sent.contains(record.id.as_str()),
                "{at}: nobody sent {}",
                record.id
            );
        }
        for publisher in self.of(channel) {
            publisher.check(&at, stored, &places, now_ms);
        }
    }
}

impl Publisher {
    fn check(&self, at: &str, stored: &[Stored], places: &BTreeMap<&str, usize>, now_ms: u64) {
        for (n, serial) in &self.acked {
            let (id, sent_ms) = &self.sent[*n];
            let Some(place) = places.get(id.as_str()) else {
                let old = now_ms.saturating_sub(*sent_ms) >= millis(self.mix.retention);
                assert!(
                    old,
                    "{at}: {id} was acknowledged as {serial} and is not there"
                );
                continue;
            };
            let found = &stored[*place];
            assert_eq!(
                found.serial, *serial,
                "{at}: the serial that {id} was acknowledged with"
            );
            assert!(
                found.body == body(id, self.mix.body_max),
                "{at}: the body of {id}"
            );
        }
        let ordered = self.ordered.iter();
        let places: Vec<usize> = ordered
            .filter_map(|id| places.get(id.as_str()).copied())
            .collect();
        assert!(
            places.is_sorted(),
            "{at}: what {} sent is out of order",
            self.name
        );
    }
}
