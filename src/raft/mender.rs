//! Replaces what this node's log has lost by what other nodes have.
//!
//! Only committed entries are taken over, and only where their ids are the ones this node knows for them: a committed
//! entry is the same everywhere. While a group's log has a hole here, the replica neither votes nor leads: it could
//! not prove what it says it has.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message as _;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::raft::log_store::{completion, entry_out};
use crate::raft::server::Server;
use crate::raft::{Group, codec, network};
use crate::storage::{GroupLog, Log};
use crate::transport::{Lane, Transport};
use crate::types::GroupId;
use crate::wire::peer;

/// Pause between attempts while something is missing.
const AGAIN: Duration = Duration::from_millis(200);
/// How long another node may take to answer.
const ASK: Duration = Duration::from_secs(10);

/// Whether a replica can prove its log. Clones share it.
pub(super) type Health = Arc<AtomicBool>;

/// The health of every group on this node.
#[derive(Clone, Debug, Default)]
pub(super) struct Healths(Arc<Mutex<BTreeMap<GroupId, Health>>>);

impl Healths {
    pub(super) fn of(&self, group: GroupId) -> Health {
        let mut healths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let sound = || Health::new(true.into());
        healths.entry(group).or_insert_with(sound).clone()
    }
}

pub(super) struct Mender {
    log: Log,
    transport: Transport,
    server: Server,
    healths: Healths,
    damaged_rx: mpsc::UnboundedReceiver<GroupId>,
}

impl Mender {
    /// Hears of damage in the log from now on, and notes what is missing already.
    pub(super) fn new(log: Log, transport: Transport, server: Server, healths: Healths) -> Self {
        let (damaged_tx, damaged_rx) = mpsc::unbounded_channel();
        let known = healths.clone();
        // Each entry is told of once.
        log.on_damage(Box::new(move |group, range| {
            tracing::error!(%group, ?range, "entries of the log are damaged; other nodes are asked for them");
            known.of(group).store(false, Ordering::Release);
            // Nobody listens any more when the node stops.
            let _ = damaged_tx.send(group);
        }));
        for group in log.groups() {
            let holes = log.group(group).holes();
            if !holes.is_empty() {
                tracing::error!(%group, ?holes, "entries of the log are missing; other nodes are asked for them");
                healths.of(group).store(false, Ordering::Release);
            }
        }
        Self {
            log,
            transport,
            server,
            healths,
            damaged_rx,
        }
    }

    pub(super) async fn run(mut self, token: CancellationToken) -> anyhow::Result<()> {
        loop {
            let unsound = self.mend_all(&token).await;
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                damaged = self.damaged_rx.recv() => if damaged.is_none() {
                    return Ok(());
                },
                () = tokio::time::sleep(AGAIN), if unsound => {}
            }
        }
    }

    /// Whether something is still missing.
    async fn mend_all(&self, token: &CancellationToken) -> bool {
        let mut unsound = false;
        for group in self.log.groups() {
            let health = self.healths.of(group);
            if health.load(Ordering::Acquire) {
                continue;
            }
            let log = self.log.group(group);
            if let Some(group) = self.server.group(group) {
                group.step_back().await;
            }
            for hole in log.holes() {
                tokio::select! {
                    () = token.cancelled() => return false,
                    () = self.mend(group, &log, hole) => {}
                }
            }
            if !log.holes().is_empty() {
                unsound = true;
                continue;
            }
            tracing::warn!(%group, "the log is whole again");
            health.store(true, Ordering::Release);
            if let Some(group) = self.server.group(group) {
                group.raft().runtime_config().elect(true);
            }
        }
        unsound
    }

    async fn mend(&self, group: GroupId, log: &GroupLog, hole: std::ops::Range<u64>) {
        let mut next = hole.start;
        let nodes = self.transport.reachable().borrow().clone();
        for node in nodes {
            while next < hole.end {
                let request = peer::FetchRequest {
                    first: next,
                    last: hole.end - 1,
                };
                let body = request.encode_to_vec().into();
                let answer =
                    self.transport
                        .call(node, Lane::Bulk, network::FETCH, group, body, ASK);
                let response = answer.await.map_err(std::io::Error::other);
                let response = response.and_then(codec::decode::<peer::FetchResponse>);
                let entries = response.and_then(|response| {
                    let entries = response.entries.into_iter().map(codec::entry_in);
                    entries.collect::<std::io::Result<Vec<_>>>()
                });
                let entries = match entries {
                    Ok(entries) => entries.into_iter().map(entry_out),
                    Err(err) => {
                        tracing::info!(%group, from = %node, error = %err, "no entries were had");
                        break;
                    }
                };
                let ours = |entry: &crate::storage::Entry| {
                    let known = log.id(entry.id.index).is_none_or(|known| known == entry.id);
                    known && (next..hole.end).contains(&entry.id.index)
                };
                let entries: Vec<_> = entries.filter(ours).collect();
                let Some(last) = entries.last().map(|entry| entry.id.index) else {
                    break;
                };
                let (done, repaired) = completion();
                log.repair(entries, done);
                if let Err(err) = repaired.await {
                    tracing::error!(%group, error = %err, "fetched entries cannot be stored");
                    break;
                }
                next = last + 1;
            }
        }
    }
}

impl Group {
    /// Leaves the leadership to a replica that has a whole log, and does not campaign.
    async fn step_back(&self) {
        self.raft().runtime_config().elect(false);
        if !self.leads() {
            return;
        }
        let (voters, _) = self.members();
        let heir = voters
            .into_iter()
            .find(|node| self.is_caught_up(*node) && !self.is_me(*node));
        if let Some(heir) = heir {
            self.transfer_to(heir).await;
        }
    }
}
