//! Connections that have a socket on this node, so that a resumed one takes its socket's place.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio_util::sync::CancellationToken;

#[derive(Clone, Debug, Default)]
pub(crate) struct Live(Arc<Mutex<HashMap<String, CancellationToken>>>);

/// A connection's place among the live ones, for as long as its socket has it.
#[derive(Debug)]
pub(crate) struct Seat {
    live: Live,
    connection_id: String,
    superseded: CancellationToken,
}

impl Live {
    /// Takes the connection's place. Who had it before learns that it was superseded.
    pub(crate) fn take(&self, connection_id: &str) -> Seat {
        let superseded = CancellationToken::new();
        let former = self
            .lock()
            .insert(connection_id.to_owned(), superseded.clone());
        if let Some(former) = former {
            former.cancel();
        }
        Seat {
            live: self.clone(),
            connection_id: connection_id.to_owned(),
            superseded,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, CancellationToken>> {
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
        if !self.superseded.is_cancelled() {
            self.live.lock().remove(&self.connection_id);
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
        assert_eq!(live.lock().len(), 1);
        drop(second);
        assert!(live.lock().is_empty());
    }
}
