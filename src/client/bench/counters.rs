//! What publishers and subscribers of a run count together.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use tokio::time::Instant;

/// Histograms that subscribers share: one each would cost 160 KB per subscriber.
const SHARDS: usize = 16;
/// Longest latency that is told apart.
const MICROS_MAX: u64 = 600_000_000;

/// A number that only grows.
#[derive(Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts over all connections of a run.
pub(super) struct Counters {
    /// What times in messages count from.
    pub(super) begin: Instant,
    pub(super) acked: Count,
    /// Messages that arrived for the first time, over all subscribers.
    pub(super) received: Count,
    pub(super) duplicates: Count,
    /// Messages that came after later ones, or before earlier ones that never came.
    pub(super) disordered: Count,
    /// Messages that this run did not publish.
    pub(super) foreign: Count,
    pub(super) reconnects: Count,
    /// Times that the server gave up continuity.
    pub(super) discontinuities: Count,
    delivery: Vec<Mutex<Histogram<u64>>>,
    last_delivery: Mutex<Option<Instant>>,
}

impl Counters {
    pub(super) fn start() -> Arc<Self> {
        Arc::new(Self {
            begin: Instant::now(),
            acked: Count::default(),
            received: Count::default(),
            duplicates: Count::default(),
            disordered: Count::default(),
            foreign: Count::default(),
            reconnects: Count::default(),
            discontinuities: Count::default(),
            delivery: (0..SHARDS).map(|_| Mutex::new(histogram())).collect(),
            last_delivery: Mutex::default(),
        })
    }

    /// Counts a message that subscriber `index` had not had before.
    pub(super) fn on_received(&self, index: usize, latency: Duration) {
        lock(&self.delivery[index % SHARDS]).saturating_record(micros(latency));
        self.received.add();
    }

    pub(super) fn on_delivery(&self, at: Instant) {
        let mut last = lock(&self.last_delivery);
        *last = (*last).max(Some(at));
    }

    /// From `began` to the last delivery.
    pub(super) fn delivering(&self, began: Instant) -> Duration {
        let last = *lock(&self.last_delivery);
        last.map_or(Duration::ZERO, |last| last.saturating_duration_since(began))
    }

    /// Publish to delivery, in microseconds.
    pub(super) fn delivery(&self) -> Histogram<u64> {
        let mut all = histogram();
        for shard in &self.delivery {
            all.add(&*lock(shard)).expect("all are made alike");
        }
        all
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(MICROS_MAX, 3).expect("the bounds are in the allowed range")
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros())
        .unwrap_or(MICROS_MAX)
        .min(MICROS_MAX)
}
