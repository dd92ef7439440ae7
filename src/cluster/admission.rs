//! Who may take part: a node whose data directory the cluster knows, or that founds it with the others.
//!
//! A node that voted, lost its disk and votes again could vote away what it had acknowledged. So a node with an
//! empty directory asks **every** other node before it starts a group: only when all are as empty as it is does it help
//! to found a cluster, and only when the registry has its directory does it join one. Otherwise it waits to be
//! readmitted: it is taken out of every group by the others, and comes back into each as a learner that votes once it
//! has everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::cluster::{Error, Registry};
use crate::raft::Host;
use crate::transport::{Lane, Service, Transport};
use crate::types::{GroupId, NodeId};
use crate::wire::peer;

pub(super) const ADMISSION: Service = Service(21);

/// How long one node may take to answer, and the pause before everybody is asked again.
const ASK: Duration = Duration::from_secs(1);
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// How long others may be behind that know this node with another directory.
const CONFIRM: Duration = Duration::from_secs(10);
/// How often a node that waits says so.
const REPORT: Duration = Duration::from_secs(10);

/// How a node with an empty directory begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// Every node is empty: a cluster is founded.
    Found,
    /// There is a cluster, and it expects this node with this directory.
    Join,
}

/// This node's side of the question.
pub(super) struct Admission {
    pub(super) node: NodeId,
    pub(super) others: BTreeSet<NodeId>,
    pub(super) directory: String,
    pub(super) transport: Transport,
    pub(super) registry: watch::Receiver<Arc<Registry>>,
    /// Tells operators what the node waits for.
    pub(super) phase: watch::Sender<String>,
}

impl Admission {
    /// Answers the others from now on. Returns whether nothing was ever decided in this node's control log.
    pub(super) fn answer(&self, host: &Host) -> std::io::Result<bool> {
        let unborn = host.is_unborn(GroupId::CONTROL)?;
        let was_unborn = AtomicBool::new(unborn);
        let (registry, directory) = (self.registry.clone(), self.directory.clone());
        let handler = move |from: NodeId, _: GroupId, _: Bytes| {
            let registry = registry.borrow().clone();
            let told = registry.bootstrap.is_some();
            if told {
                was_unborn.store(false, Ordering::Relaxed);
            }
            let response = peer::AdmissionResponse {
                unborn: was_unborn.load(Ordering::Relaxed),
                told,
                founded: registry.founded,
                registered: registry.directories.get(&from).cloned().unwrap_or_default(),
                directory: directory.clone(),
            };
            async move { Ok(response.encode_to_vec().into()) }
        };
        self.transport.register(ADMISSION, Arc::new(handler));
        Ok(unborn)
    }

    /// Asks until it is clear how this node begins.
    pub(super) async fn ask(&self) -> Begin {
        let mut said: Option<(String, Instant)> = None;
        loop {
            let mut answers = BTreeMap::new();
            let asked = (self.others.iter()).map(|node| async {
                (
                    *node,
                    ask_one(&self.transport, *node, &self.directory).await,
                )
            });
            for (node, answer) in futures_util::future::join_all(asked).await {
                answers.extend(answer.map(|answer| (node, answer)));
            }
            let why = match decide(&self.others, &answers, &self.directory) {
                Ok(begin) => return begin,
                Err(why) => why,
            };
            let due = said
                .as_ref()
                .is_none_or(|(text, at)| *text != why || at.elapsed() > REPORT);
            if due {
                tracing::warn!(node = %self.node, "this node does not take part yet: {why}");
                self.phase.send_replace(why.clone());
                said = Some((why, Instant::now()));
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

impl Admission {
    /// Makes sure that nobody took this node's place while it was away: a directory that was readmitted since. Who does not
    /// answer at once is not waited for; who knows another directory may only be behind, for a while.
    ///
    /// # Errors
    /// When the others know this node with another directory.
    pub(super) async fn confirm(&self) -> Result<(), Error> {
        let until = Instant::now() + CONFIRM;
        loop {
            let asked =
                (self.others.iter()).map(|node| ask_one(&self.transport, *node, &self.directory));
            let answers = futures_util::future::join_all(asked).await;
            let registered = answers
                .into_iter()
                .flatten()
                .map(|answer| answer.registered);
            let registered: BTreeSet<String> =
                registered.filter(|known| !known.is_empty()).collect();
            let other = registered.first().cloned();
            let Some(other) = other.filter(|_| !registered.contains(&self.directory)) else {
                return Ok(());
            };
            if Instant::now() > until {
                return Err(Error::OtherDirectory {
                    node: self.node,
                    registered: other,
                    found: self.directory.clone(),
                });
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

/// What the answers mean; `Err` says what is waited for.
fn decide(
    others: &BTreeSet<NodeId>,
    answers: &BTreeMap<NodeId, peer::AdmissionResponse>,
    directory: &str,
) -> Result<Begin, String> {
    let known = |answer: &&peer::AdmissionResponse| answer.told && !answer.registered.is_empty();
    if let Some(answer) = answers.values().find(known) {
        // The answer that knows more wins: a directory is registered once it is readmitted, never before.
        return match answers
            .values()
            .any(|answer| answer.registered == directory)
        {
            true => Ok(Begin::Join),
            false => Err(format!(
                "the cluster knows this node with other data (directory {}), which is gone; it needs to be \
                 readmitted: firth admin node readmit",
                answer.registered
            )),
        };
    }
    let silent: Vec<String> = others
        .iter()
        .filter(|node| !answers.contains_key(node))
        .map(ToString::to_string)
        .collect();
    if !silent.is_empty() {
        let silent = silent.join(", ");
        return Err(format!(
            "its directory is empty, and only {silent} can tell whether the cluster holds data in its name"
        ));
    }
    if answers.values().all(|answer| answer.unborn) {
        return Ok(Begin::Found);
    }
    let founding = |answer: &peer::AdmissionResponse| answer.told && !answer.founded;
    if answers.values().any(founding) && !answers.values().any(|answer| answer.founded) {
        return Ok(Begin::Join);
    }
    Err("its directory is empty, and the others do not know their registry yet".to_owned())
}

/// What `node` says; `None` when it does not answer in time.
pub(super) async fn ask_one(
    transport: &Transport,
    node: NodeId,
    directory: &str,
) -> Option<peer::AdmissionResponse> {
    let request = peer::AdmissionRequest {
        directory: directory.to_owned(),
    };
    let body = request.encode_to_vec().into();
    let answer = transport
        .call(node, Lane::Raft, ADMISSION, GroupId::CONTROL, body, ASK)
        .await;
    peer::AdmissionResponse::decode(answer.ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(
        unborn: bool,
        told: bool,
        founded: bool,
        registered: &str,
    ) -> peer::AdmissionResponse {
        peer::AdmissionResponse {
            unborn,
            told,
            founded,
            registered: registered.to_owned(),
            directory: "theirs".to_owned(),
        }
    }

    fn decide_on(answers: &[peer::AdmissionResponse]) -> Option<Begin> {
        let others = [NodeId(2), NodeId(3)].into();
        let answers = (2..).map(NodeId).zip(answers.iter().cloned()).collect();
        decide(&others, &answers, "mine").ok()
    }

    #[test]
    fn a_cluster_is_founded_only_by_all_nodes_together() {
        let empty = answer(true, false, false, "");
        assert_eq!(decide_on(&[]), None);
        assert_eq!(decide_on(std::slice::from_ref(&empty)), None);
        assert_eq!(
            decide_on(&[empty.clone(), empty.clone()]),
            Some(Begin::Found)
        );
        let untold = answer(false, false, false, "");
        assert_eq!(
            decide_on(&[empty, untold]),
            None,
            "it may know what was lost"
        );
    }

    #[test]
    fn who_comes_late_to_the_founding_joins_it() {
        let founding = answer(false, true, false, "");
        let empty = answer(true, false, false, "");
        assert_eq!(decide_on(&[founding.clone(), empty]), Some(Begin::Join));
        let founded = answer(false, true, true, "");
        assert_eq!(decide_on(&[founding, founded]), None);
    }

    #[test]
    fn lost_data_keeps_a_node_out_until_its_new_directory_is_known() {
        let other = answer(false, true, true, "old");
        let empty = answer(true, false, false, "");
        assert_eq!(decide_on(&[other.clone(), empty]), None);
        let mine = answer(false, true, true, "mine");
        assert_eq!(decide_on(&[other, mine.clone()]), Some(Begin::Join));
        assert_eq!(decide_on(&[mine]), Some(Begin::Join));
    }
}
