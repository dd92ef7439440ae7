//! Connections that came back to another node: it tells the others, and who has an older socket ends it.
//!
//! Told until it is heard, for a while: an older socket that does not hear of it then is one whose client has left it, and
//! ends when that shows.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;

use crate::cluster::Cluster;
use crate::tasks::{OnError, Tasks};
use crate::transport::{Lane, Service};
use crate::types::{GroupId, NodeId};
use crate::wire::peer;

const TAKEN: Service = Service(25);

/// How long telling a node may take.
const TELL: Duration = Duration::from_secs(2);
/// How often and for how long a node is told that did not hear.
const AGAIN: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(15);

/// A connection has a new socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    pub connection_id: String,
    /// Milliseconds since 1970, by the clock of `by`.
    pub at_ms: u64,
    pub by: NodeId,
}

type Listener = Box<dyn Fn(&Taken) + Send + Sync>;

/// Who wants to hear of it.
#[derive(Default)]
pub(super) struct OnTaken(OnceLock<Listener>);

impl fmt::Debug for OnTaken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OnTaken").finish_non_exhaustive()
    }
}

pub(super) fn start(cluster: &Cluster) {
    let this = cluster.clone();
    let handler = move |from: NodeId, _: GroupId, body: Bytes| {
        let heard = peer::Taken::decode(body).map_err(|err| err.to_string());
        let heard = heard.map(|taken| {
            let taken = Taken {
                connection_id: taken.connection_id,
                at_ms: taken.at_ms,
                by: from,
            };
            if let Some(listener) = this.0.on_taken.0.get() {
                listener(&taken);
            }
            peer::TakenResponse {}.encode_to_vec().into()
        });
        async { heard }
    };
    cluster.0.transport.register(TAKEN, Arc::new(handler));
}

impl Cluster {
    /// Has every connection that came back to another node told to `listener`. The first one counts.
    pub fn on_taken(&self, listener: impl Fn(&Taken) + Send + Sync + 'static) {
        // Who came first stays: there is one door.
        let _ = self.0.on_taken.0.set(Box::new(listener));
    }

    /// Tells all other nodes, in the background.
    pub fn say_taken(&self, taken: &Taken, tasks: &Tasks) {
        let this = self.clone();
        let body = peer::Taken {
            connection_id: taken.connection_id.clone(),
            at_ms: taken.at_ms,
        };
        let body = Bytes::from(body.encode_to_vec());
        tasks.spawn("cluster.taken", OnError::Log, |_| async move {
            let others = this.nodes().keys().filter(|node| **node != this.node());
            let told = others.map(|node| this.tell_taken(*node, &body));
            // Nobody waits for those that do not answer.
            let _ = tokio::time::timeout(PATIENCE, futures_util::future::join_all(told)).await;
            Ok(())
        });
    }

    async fn tell_taken(&self, node: NodeId, body: &Bytes) {
        let (transport, group) = (&self.0.transport, GroupId::CONTROL);
        let tell = || transport.call(node, Lane::Raft, TAKEN, group, body.clone().into(), TELL);
        while tell().await.is_err() {
            tokio::time::sleep(AGAIN).await;
        }
    }
}
