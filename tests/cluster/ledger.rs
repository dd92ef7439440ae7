//! A load of publishers who never give up, and the books that are kept of what they were told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use firth::types::Serial;
use tokio::task::JoinHandle;

use crate::net::{Net, RETENTION, SOON, Stored, outcome, until};

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
            retention: RETENTION,
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
    sent: Vec<String>,
    /// In the order in which they must be found. What was sent behind one that had to be repeated is left out: it may
    /// have been stored before that.
    ordered: Vec<String>,
    acked: BTreeMap<String, (Serial, Instant)>,
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
            submitted.push(self.submit(node, &id));
            self.sent.push(id);
        }
        let mut again = Vec::new();
        for (n, submitted) in (first..).zip(submitted) {
            match outcome(submitted).await.serial() {
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
            let submitted = self.submit(self.node(), &self.sent[n]);
            if let Some(serial) = outcome(submitted).await.serial() {
                return self.on_ack(n, serial, in_order);
            }
            self.at += 1;
            tokio::time::sleep(self.mix.pause).await;
        }
    }

    fn submit(&self, node: u64, id: &str) -> Option<firth::cluster::Submitted> {
        let body = body(id, self.mix.body_max);
        let retention = self.mix.retention;
        self.net.submit(node, &self.channel, id, body, retention)
    }

    fn on_ack(&mut self, n: usize, serial: Serial, in_order: bool) {
        let id = &self.sent[n];
        self.acked.insert(id.clone(), (serial, Instant::now()));
        if in_order {
            self.ordered.push(id.clone());
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
                let asked = Instant::now();
                let stored = net.history(live.id, channel).await;
                self.check(live.id, channel, &stored, asked);
                let (other, known) = first.get_or_insert_with(|| (live.id, stored.clone()));
                // Retention may have taken the oldest meanwhile.
                let kept = known.len().saturating_sub(stored.len());
                assert!(
                    known[kept..] == stored && (kept == 0 || self.may_expire()),
                    "{channel}: nodes {other} and {} show different histories",
                    live.id
                );
            }
        }
    }

    fn may_expire(&self) -> bool {
        let acks = self.publishers.iter().flat_map(|each| each.acked.values());
        acks.map(|(_, at)| at.elapsed()).max() >= Some(self.kept_surely())
    }

    /// A little is left for the difference between an acknowledgement and its entry's stamp.
    fn kept_surely(&self) -> Duration {
        self.retention.saturating_sub(Duration::from_secs(15))
    }

    fn check(&self, node: u64, channel: &str, stored: &[Stored], asked: Instant) {
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
            .flat_map(|publisher| publisher.sent.iter().map(String::as_str))
            .collect();
        for record in stored {
            assert!(
                sent.contains(record.id.as_str()),
                "{at}: nobody sent {}",
                record.id
            );
        }
        for publisher in self.of(channel) {
            publisher.check(&at, stored, &places, asked, self.kept_surely());
        }
    }
}

impl Publisher {
    fn check(
        &self,
        at: &str,
        stored: &[Stored],
        places: &BTreeMap<&str, usize>,
        asked: Instant,
        kept: Duration,
    ) {
        for (id, (serial, acked)) in &self.acked {
            let Some(place) = places.get(id.as_str()) else {
                let old = asked.saturating_duration_since(*acked) >= kept;
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
