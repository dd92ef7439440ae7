//! Requests of clients that came to a node which does not hold their conversation: carried to the one that does.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::Semaphore;

use crate::cluster::Cluster;
use crate::transport::{CallError, Lane, Service};
use crate::types::{ErrorCode, ErrorInfo, GroupId, NodeId};
use crate::wire::peer;

const RELAY: Service = Service(28);

/// Counted apart from every group of Raft: clients' requests take no place of theirs.
const PLACES: GroupId = GroupId(u32::MAX);
/// How long the other node may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Requests on their way to other nodes. Each takes one of the streams that nodes allow each other.
const RELAYED_MAX: usize = 1024;

/// What is to come of a relayed request.
pub type Answer = Pin<Box<dyn Future<Output = Result<Bytes, ErrorInfo>> + Send>>;
type Listener = Box<dyn Fn(peer::Relayed) -> Answer + Send + Sync>;

/// Who carries out what other nodes relay, and how many may be relayed from here.
pub(super) struct Relay {
    listener: OnceLock<Listener>,
    places: Semaphore,
}

impl Default for Relay {
    fn default() -> Self {
        Self {
            listener: OnceLock::new(),
            places: Semaphore::new(RELAYED_MAX),
        }
    }
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Relay").finish_non_exhaustive()
    }
}

pub(super) fn start(cluster: &Cluster) {
    let this = cluster.clone();
    let handler = move |_: NodeId, _: GroupId, body: Bytes| {
        let asked = peer::Relayed::decode(body).map_err(|err| err.to_string());
        let answer = asked.map(|asked| {
            let listener = this.0.relay.listener.get();
            listener.map(|listener| listener(asked))
        });
        async move {
            let answer = match answer? {
                Some(answer) => answer.await,
                None => Err(ErrorCode::Busy.into()),
            };
            let answer = match answer {
                Ok(body) => peer::RelayedResponse {
                    body,
                    ..peer::RelayedResponse::default()
                },
                Err(error) => peer::RelayedResponse {
                    error_code: error.code.code(),
                    error_message: error.message,
                    body: Bytes::new(),
                },
            };
            Ok(answer.encode_to_vec().into())
        }
    };
    cluster.0.transport.register(RELAY, Arc::new(handler));
}

impl Cluster {
    /// Has what other nodes relay carried out by `listener`. The first one counts.
    pub fn on_relayed(&self, listener: impl Fn(peer::Relayed) -> Answer + Send + Sync + 'static) {
        // Who came first stays: there is one door.
        let _ = self.0.relay.listener.set(Box::new(listener));
    }

    /// What `node` answers to a request that it is relayed.
    ///
    /// # Errors
    /// The other node's. `Busy` when too many are on their way already; `Disconnected` when the node is not reached, or not
    /// heard from: the request may have been carried out.
    pub async fn relay(&self, node: NodeId, asked: &peer::Relayed) -> Result<Bytes, ErrorInfo> {
        let place = self.0.relay.places.try_acquire();
        let _place = place.map_err(|_| ErrorInfo::from(ErrorCode::Busy))?;
        let body = asked.encode_to_vec().into();
        let transport = &self.0.transport;
        let answer = transport.call(node, Lane::Bulk, RELAY, PLACES, body, PATIENCE);
        let answer = answer.await.map_err(|err: CallError| gone(&err))?;
        let answer = peer::RelayedResponse::decode(answer).map_err(|err| gone(&err))?;
        match answer.error_code {
            0 => Ok(answer.body),
            code => {
                let code = ErrorCode::from_code(code).unwrap_or(ErrorCode::Internal);
                Err(ErrorInfo::new(code, answer.error_message))
            }
        }
    }
}

fn gone(err: &dyn fmt::Display) -> ErrorInfo {
    let what = format!("the node that holds the connection does not answer: {err}");
    ErrorInfo::new(ErrorCode::Disconnected, what)
}
