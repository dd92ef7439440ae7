//! Bringing back a node that lost its data: out of every group, then in again as a learner, then as a voter.
//!
//! The control group's leader does it step by step from what the registry says; each step can be repeated, so a new
//! leader goes on where the former one was.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Cluster, CommandError, Registry, admission};
use crate::tasks::{OnError, Tasks};
use crate::transport::{Lane, Service};
use crate::types::{GroupId, NodeId};
use crate::wire::{control as wire, peer};

const MEMBER: Service = Service(22);

/// Pause between two rounds of steps.
const PERIOD: Duration = Duration::from_millis(500);
/// How long one step may take at one group.
const STEP: Duration = Duration::from_secs(5);

/// Why a node is not readmitted.
#[derive(Debug, thiserror::Error)]
pub enum ReadmitError {
    #[error("{0} is not a node of this cluster")]
    Unknown(NodeId),
    #[error("{0} does not answer: start it first, with an empty data directory")]
    Silent(NodeId),
    #[error("{0} has the data the cluster knows; nothing is to be readmitted")]
    HasItsData(NodeId),
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// How a node stands in the cluster.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Its data directory, as the registry knows it.
    pub directory: String,
    /// It lost its data and is on its way back.
    pub readmitting: bool,
    /// Groups there are, and in how many of them it votes.
    pub groups: usize,
    pub votes_in: usize,
}

pub(super) fn start(cluster: &Cluster, tasks: &Tasks) {
    let this = cluster.clone();
    let handler = move |_: NodeId, group: GroupId, body: Bytes| {
        let this = this.clone();
        async move {
            let request = peer::MemberRequest::decode(body).map_err(|err| err.to_string())?;
            let response = this.step_here(group, &request).await;
            Ok(response.encode_to_vec().into())
        }
    };
    cluster.0.transport.register(MEMBER, Arc::new(handler));
    let this = cluster.clone();
    tasks.spawn("cluster.readmit", OnError::StopNode, |token| {
        this.readmit_all(token)
    });
}

impl Cluster {
    /// Lets a node take part again that lost its data and runs with an empty directory. Returns when that is decided;
    /// the registry tells when it is done.
    ///
    /// # Errors
    /// When there is no such node, it does not answer, or it has its data.
    pub async fn readmit(&self, node: NodeId) -> Result<(), ReadmitError> {
        if !self.nodes().contains_key(&node) {
            return Err(ReadmitError::Unknown(node));
        }
        let registry = self.registry().borrow().clone();
        if node == self.node() {
            return Err(ReadmitError::HasItsData(node));
        }
        let answer = admission::ask_one(&self.0.transport, node, "").await;
        let directory = answer.ok_or(ReadmitError::Silent(node))?.directory;
        if registry.directories.get(&node) == Some(&directory) {
            return match registry.readmitting.contains_key(&node) {
                true => Ok(()),
                false => Err(ReadmitError::HasItsData(node)),
            };
        }
        let command = wire::entry::Command::Readmit(wire::Readmit {
            node: node.0,
            directory: directory.clone(),
        });
        self.command(command).await?;
        // Whoever asks this node next must not be told how things stood before.
        let decided = |registry: &Arc<Registry>| {
            registry.readmitting.contains_key(&node)
                || registry.directories.get(&node) == Some(&directory)
        };
        let mut registry = self.registry();
        let seen = tokio::time::timeout(STEP, registry.wait_for(decided)).await;
        match seen {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(CommandError::Indeterminate.into()),
        }
    }

    /// How a node stands in the cluster, as this node knows it; `None` for a node that is not configured.
    #[must_use]
    pub fn standing(&self, node: NodeId) -> Option<Standing> {
        self.nodes().get(&node)?;
        let registry = self.registry().borrow().clone();
        let groups = self.shards().map(GroupId::of_shard);
        let groups: Vec<GroupId> = groups.chain([GroupId::CONTROL]).collect();
        let votes = |group: &&GroupId| {
            let group = self.known_group(**group);
            group.is_some_and(|group| group.members().0.contains(&node))
        };
        Some(Standing {
            directory: registry.directories.get(&node).cloned().unwrap_or_default(),
            readmitting: registry.readmitting.contains_key(&node),
            groups: groups.len(),
            votes_in: groups.iter().filter(votes).count(),
        })
    }

    async fn readmit_all(self, token: CancellationToken) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(PERIOD);
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                _ = tick.tick() => {}
            }
            if self.control_leadership().borrow().leader != Some(self.node()) {
                continue;
            }
            let registry = self.registry().borrow().clone();
            for (node, directory) in &registry.readmitting {
                let known = registry.directories.get(node).cloned().unwrap_or_default();
                let back = known == *directory;
                let round = self.step_everywhere(*node, back);
                let done = tokio::select! {
                    () = token.cancelled() => return Ok(()),
                    done = round => done,
                };
                if !done {
                    continue;
                }
                let command = match back {
                    false => wire::entry::Command::RegisterDirectory(wire::RegisterDirectory {
                        node: node.0,
                        directory: directory.clone(),
                        instead_of: known,
                    }),
                    true => wire::entry::Command::Readmitted(wire::Readmitted { node: node.0 }),
                };
                let what = if back {
                    "votes again"
                } else {
                    "is out of every group"
                };
                tracing::info!(%node, "readmission: {what}");
                self.command_or_warn(command).await;
            }
        }
    }

    /// One step at every group's leader; whether all are through.
    async fn step_everywhere(&self, node: NodeId, admit: bool) -> bool {
        let groups = self.shards().map(GroupId::of_shard);
        let groups = groups.chain([GroupId::CONTROL]);
        let request = peer::MemberRequest {
            node: node.0,
            admit,
        };
        let steps = groups.map(|group| self.step(group, &request));
        let done = futures_util::future::join_all(steps).await;
        done.into_iter().all(|done| done)
    }

    async fn step(&self, group: GroupId, request: &peer::MemberRequest) -> bool {
        let leader = self.group(group).leadership().borrow().leader;
        let response = match leader {
            None => return false,
            Some(leader) if leader == self.node() => {
                let here = tokio::time::timeout(STEP, self.step_here(group, request)).await;
                here.ok()
            }
            Some(leader) => {
                let body = request.encode_to_vec().into();
                let transport = &self.0.transport;
                let answer = transport.call(leader, Lane::Bulk, MEMBER, group, body, STEP);
                let answer = answer.await.ok();
                answer.and_then(|answer| peer::MemberResponse::decode(answer).ok())
            }
        };
        let Some(response) = response else {
            return false;
        };
        if !response.failed.is_empty() {
            tracing::info!(%group, reason = response.failed, "a step of a readmission is to be repeated");
        }
        response.done
    }

    async fn step_here(
        &self,
        group: GroupId,
        request: &peer::MemberRequest,
    ) -> peer::MemberResponse {
        let Some(group) = self.known_group(group) else {
            return peer::MemberResponse::default();
        };
        let node = NodeId(request.node);
        let step = match request.admit {
            true => group.admit(node).await,
            false => group.remove(node).await.map(|()| true),
        };
        match step {
            Ok(done) => peer::MemberResponse {
                done,
                failed: String::new(),
            },
            Err(failed) => peer::MemberResponse {
                done: false,
                failed,
            },
        }
    }
}
