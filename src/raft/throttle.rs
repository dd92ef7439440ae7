//! Spreads bytes over time: what is sent beyond the rate waits.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Clones share the rate.
#[derive(Clone, Debug)]
pub(super) struct Throttle {
    bytes_per_second: u64,
    /// When everything taken so far will have been paid for.
    paid_at: Arc<Mutex<Instant>>,
}

/// What may be taken at once after a pause.
const BURST: Duration = Duration::from_millis(50);

impl Throttle {
    /// 0: no limit.
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            paid_at: Arc::new(Mutex::new(Instant::now())),
        }
    }

    /// Waits until `bytes` may be sent.
    pub(super) async fn take(&self, bytes: usize) {
        if self.bytes_per_second == 0 {
            return;
        }
        let price = Duration::from_micros(bytes as u64 * 1_000_000 / self.bytes_per_second);
        let until = {
            let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
            *paid_at = (*paid_at).max(Instant::now()) + price;
            *paid_at
        };
        if let Some(until) = until.checked_sub(BURST) {
            tokio::time::sleep_until(until).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_taken_beyond_the_rate_waits() {
        let throttle = Throttle::new(1 << 20);
        let start = Instant::now();
        for _ in 0..8 {
            throttle.clone().take(1 << 18).await;
        }
        let took = start.elapsed();
        assert!((1_900..=2_000).contains(&took.as_millis()), "{took:?}");
        Throttle::new(0).take(usize::MAX).await;
        assert_eq!(start.elapsed(), took);
    }
}
