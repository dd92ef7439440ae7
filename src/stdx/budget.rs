//! A limit on bytes held at one time, shared by whoever holds them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that may be held at one time. Clones share the limit.
#[derive(Clone, Debug)]
pub struct ByteBudget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: usize,
    held: AtomicUsize,
}

/// The right to hold some bytes; given back when dropped.
#[derive(Debug)]
pub struct ByteGrant {
    bytes: usize,
    budget: ByteBudget,
}

impl ByteBudget {
    #[must_use]
    pub fn new(limit: usize) -> Self {
        let held = AtomicUsize::new(0);
        Self(Arc::new(Inner { limit, held }))
    }

    /// Takes `bytes`, or `None` when that would pass the limit. A single request above the limit is granted
    /// when nothing else is held, so that it cannot wait for ever.
    #[must_use]
    pub fn try_take(&self, bytes: usize) -> Option<ByteGrant> {
        let fits =
            |held: usize| (held == 0 || held + bytes <= self.0.limit).then_some(held + bytes);
        (self.0.held)
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, fits)
            .ok()?;
        Some(ByteGrant {
            bytes,
            budget: self.clone(),
        })
    }

    /// Bytes held now.
    #[must_use]
    pub fn held(&self) -> usize {
        self.0.held.load(Ordering::Acquire)
    }
}

impl Drop for ByteGrant {
    fn drop(&mut self) {
        self.budget.0.held.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_beyond_the_limit_until_given_back() {
        let budget = ByteBudget::new(10);
        let first = budget.try_take(8).unwrap();
        assert!(budget.try_take(3).is_none());
        let second = budget.try_take(2).unwrap();
        drop(first);
        assert_eq!(budget.held(), 2);
        drop(second);
        assert!(
            budget.try_take(11).is_some(),
            "alone, even beyond the limit"
        );
    }
}
