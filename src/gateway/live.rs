//! Connections that have a socket on this node, so that a resumed one takes its socket's place.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio_util::sync::CancellationToken;

#[derive(Clone, Debug, Default)]
pub(crate) struct Live(Arc<Mutex<Seats>>);

#[derive(Debug, Default)]
struct Seats {
    taken: HashMap<String, (u64, CancellationToken)>,
    next: u64,
}

/// A connection's place among the live ones, for as long as its socket has it.
#[derive(Debug)]
pub(crate) struct Seat {
    live: Live,
    connection_id: String,
    number: u64,
    superseded: CancellationToken,
}

impl Live {
    /// Takes the connection's place. Who had it before learns that it was superseded.
    pub(crate) fn take(&self, connection_id: &str) -> Seat {
        let superseded = CancellationToken::new();
        let (number, former) = {
            let mut seats = self.lock();
            seats.next += 1;
            let number = seats.next;
            let seat = (number, superseded.clone());
            (number, seats.taken.insert(connection_id.to_owned(), seat))
        };
        if let Some((_, former)) = former {
            former.cancel();
        }
        Seat {
            live: self.clone(),
            connection_id: connection_id.to_owned(),
            number,
            superseded,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.0.lock().unwrap_or_else(|err| err.into_inner())
    }
}

impl Seat {
    /// Waits until another socket has taken the connection over.
    pub(crate) async fn superseded(&self) {
        self.superseded.cancelled().await;
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // Whoever superseded this one keeps the place.
        let mut seats = self.live.lock();
        let holder = seats.taken.get(&self.connection_id);
        if holder.is_some_and(|(number, _)| *number == self.number) {
            seats.taken.remove(&self.connection_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_socket_has_the_connection() {
        let live = Live::default();
        let first = live.take("c");
        let second = live.take("c");
        assert!(first.superseded.is_cancelled());
        drop(first);
        assert_eq!(live.lock().taken.len(), 1);
        drop(second);
        assert!(live.lock().taken.is_empty());
    }
}
