//! Connections that have a socket on this node, so that a resumed one takes its socket's place.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::types::NodeId;

/// How long it takes to send all clients elsewhere, when they are many; the nodes that take them in must bear it.
const DRAIN_LONGEST: Duration = Duration::from_secs(5);
/// And how long for each, when they are few.
const DRAIN_EACH: Duration = Duration::from_millis(2);

#[derive(Clone, Debug, Default)]
pub(crate) struct Live(Arc<Mutex<Seats>>);

#[derive(Debug, Default)]
struct Seats {
    taken: HashMap<String, Place>,
    next: u64,
}

#[derive(Debug)]
struct Place {
    number: u64,
    /// When the socket came, and the node it came to: of two sockets the greater one has the connection.
    since: (u64, NodeId),
    superseded: CancellationToken,
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
    /// Takes the connection's place, for a socket that came to this `node` at `at_ms`. Who had it before learns that it was
    /// superseded.
    pub(crate) fn take(&self, connection_id: &str, at_ms: u64, node: NodeId) -> Seat {
        let superseded = CancellationToken::new();
        let (number, former) = {
            let mut seats = self.lock();
            seats.next += 1;
            let number = seats.next;
            let place = Place {
                number,
                since: (at_ms, node),
                superseded: superseded.clone(),
            };
            (number, seats.taken.insert(connection_id.to_owned(), place))
        };
        if let Some(former) = former {
            former.superseded.cancel();
        }
        Seat {
            live: self.clone(),
            connection_id: connection_id.to_owned(),
            number,
            superseded,
        }
    }

    /// The client came back to another node at `at_ms`: an older socket here is superseded.
    pub(crate) fn taken_elsewhere(&self, connection_id: &str, at_ms: u64, by: NodeId) {
        let superseded = {
            let seats = self.lock();
            let place = seats.taken.get(connection_id);
            let older = place.filter(|place| place.since < (at_ms, by));
            older.map(|place| place.superseded.clone())
        };
        if let Some(superseded) = superseded {
            superseded.cancel();
        }
    }

    /// Whether the connection has a socket here.
    pub(crate) fn has(&self, connection_id: &str) -> bool {
        self.lock().taken.contains_key(connection_id)
    }

    /// How long a client may stay when the node is to stop: a random part of the time in which all are sent away, so that
    /// they come to other nodes one after another.
    pub(crate) fn pause_before_leaving(&self) -> Duration {
        let mut random = [0; 4];
        getrandom::fill(&mut random).expect("the system has randomness once it has booted");
        pause(self.lock().taken.len(), u32::from_le_bytes(random))
    }

    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.0.lock().unwrap_or_else(|err| err.into_inner())
    }
}

/// The part of the time for this many clients that `random`, of all numbers it could be, stands for.
fn pause(clients: usize, random: u32) -> Duration {
    let clients = u32::try_from(clients).unwrap_or(u32::MAX);
    let all = DRAIN_EACH.saturating_mul(clients).min(DRAIN_LONGEST);
    all.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

impl Seat {
    /// Waits until another socket has taken the connection over.
    pub(crate) async fn superseded(&self) {
        self.superseded.cancelled().await;
    }

    /// Whether one has.
    pub(crate) fn is_superseded(&self) -> bool {
        self.superseded.is_cancelled()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        // Whoever superseded this one keeps the place.
        let mut seats = self.live.lock();
        let holder = seats.taken.get(&self.connection_id);
        if holder.is_some_and(|place| place.number == self.number) {
            seats.taken.remove(&self.connection_id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_clients_leave_at_once_and_many_spread_out() {
        assert_eq!(pause(0, u32::MAX), Duration::ZERO);
        assert!(pause(10, u32::MAX) <= Duration::from_millis(20));
        assert_eq!(pause(1_000_000, 0), Duration::ZERO);
        assert_eq!(pause(1_000_000, u32::MAX), DRAIN_LONGEST);
        let half = pause(usize::MAX, u32::MAX / 2);
        assert!(
            half.abs_diff(DRAIN_LONGEST / 2) < Duration::from_millis(1),
            "{half:?}"
        );
    }

    #[test]
    fn the_newest_socket_has_the_connection() {
        let live = Live::default();
        let first = live.take("c", 2, NodeId(1));
        let second = live.take("c", 1, NodeId(1));
        assert!(first.superseded.is_cancelled());
        drop(first);
        assert_eq!(live.lock().taken.len(), 1);
        drop(second);
        assert!(live.lock().taken.is_empty());
    }

    #[test]
    fn of_sockets_on_several_nodes_the_latest_has_the_connection() {
        let live = Live::default();
        let seat = live.take("c", 5, NodeId(2));
        for (at_ms, node) in [(4, 3), (5, 1), (5, 2)] {
            live.taken_elsewhere("c", at_ms, NodeId(node));
            assert!(!seat.superseded.is_cancelled(), "{at_ms} {node}");
        }
        live.taken_elsewhere("d", 6, NodeId(3));
        assert!(!seat.superseded.is_cancelled());
        live.taken_elsewhere("c", 5, NodeId(3));
        assert!(seat.superseded.is_cancelled());
    }
}
