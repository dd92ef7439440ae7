//! Tells who leads a group as it changes, and what becomes of a group that fails.

use std::time::Duration;

use openraft::ServerState;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::Fatal;
use openraft::metrics::RaftMetrics;
use prost::Message as _;
use tokio::sync::watch;

use crate::raft::codec::{log_id_out, vote_out};
use crate::raft::{LogId, Raft, TypeConfig, Vote, network};
use crate::tasks::{OnError, Tasks};
use crate::transport::{Lane, Transport};
use crate::types::{GroupId, Leadership, NodeId};
use crate::wire::peer;

/// How long offering a leadership to one node may take.
const OFFER: Duration = Duration::from_millis(300);

/// Stops the node when the group has failed: a replica that cannot write its log keeps no promise.
pub(super) fn follow(
    id: GroupId,
    raft: &Raft,
    transport: Transport,
    tasks: &Tasks,
) -> watch::Receiver<Leadership> {
    let (leadership_tx, leadership) = watch::channel(Leadership::default());
    let mut metrics = raft.metrics();
    tasks.spawn(
        "raft.leadership",
        OnError::StopNode,
        move |token| async move {
            let mut led = None;
            loop {
                let (now, state, leading) = look(&metrics.borrow_watched());
                match state {
                    Ok(()) => led = leading,
                    Err(Fatal::Stopped) => return Ok(()),
                    Err(err) => {
                        if let Some(led) = led {
                            led.give_away(id, &transport).await;
                        }
                        return Err(anyhow::anyhow!("{id}: {err}"));
                    }
                }
                leadership_tx.send_if_modified(|known| {
                    let changed = *known != now;
                    *known = now;
                    changed
                });
                tokio::select! {
                    () = token.cancelled() => return Ok(()),
                    changed = metrics.changed() => if changed.is_err() {
                        // A stopped group says so before it goes; one that panicked does not.
                        return match metrics.borrow_watched().running_state {
                            Err(Fatal::Stopped) => Ok(()),
                            _ => Err(anyhow::anyhow!("{id}: its task ended unexpectedly")),
                        };
                    },
                }
            }
        },
    );
    leadership
}

fn look(
    seen: &RaftMetrics<TypeConfig>,
) -> (Leadership, Result<(), Fatal<TypeConfig>>, Option<Leading>) {
    let leads = seen.state == ServerState::Leader;
    let known = !leads || seen.current_leader == Some(seen.id);
    let now = Leadership {
        leader: seen.current_leader.filter(|_| known).map(NodeId),
        term: seen.current_term,
    };
    let leading = leads.then(|| {
        let others = seen.replication.iter().flatten();
        let others = others.filter(|(node, _)| **node != seen.id);
        let mut heirs: Vec<_> = others.map(|(node, has)| (*has, NodeId(*node))).collect();
        heirs.sort_unstable();
        Leading {
            vote: seen.vote,
            heirs,
        }
    });
    (now, seen.running_state.clone(), leading)
}

/// What is left of a leadership when the group fails under it.
struct Leading {
    vote: Vote,
    /// The others and how far they are known to have the log, furthest last.
    heirs: Vec<(Option<LogId>, NodeId)>,
}

impl Leading {
    /// Tells the others that the leader is gone, and one of them to take over, so that nobody waits for an election
    /// timeout. Whether it may lead is decided by the votes of a majority, as ever.
    async fn give_away(self, group: GroupId, transport: &Transport) {
        let Some((last, to)) = self.heirs.last().copied() else {
            return;
        };
        let request = peer::TransferRequest {
            from: Some(vote_out(&self.vote)),
            to: to.0,
            last: last.as_ref().map(log_id_out),
        };
        tracing::warn!(%group, %to, "the group failed here; its leadership is offered to another node");
        // The heir last: by then the others no longer keep to the lost leader's lease.
        for (_, node) in self.heirs {
            let body = request.encode_to_vec().into();
            let offered = transport.call(node, Lane::Raft, network::TRANSFER, group, body, OFFER);
            // Who does not hear it elects a leader after its timeout.
            let _ = offered.await;
        }
    }
}
