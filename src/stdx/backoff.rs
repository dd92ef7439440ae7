//! Pauses that double up to a limit.

use std::time::Duration;

/// Pauses between tries: `first`, then twice as long each time, at most `longest`.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    #[must_use]
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            next: first,
        }
    }

    /// The pause before the coming try.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause
    }

    /// The last try worked.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_the_limit_and_starts_over() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(20), ms(50));
        assert_eq!([(); 3].map(|()| backoff.pause()), [ms(20), ms(40), ms(50)]);
        backoff.reset();
        assert_eq!(backoff.pause(), ms(20));
    }
}
