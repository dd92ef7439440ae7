//! Who belongs to a group: taking nodes out and letting them in again, one safe step at a time.

use std::collections::BTreeSet;

use openraft::async_runtime::WatchReceiver as _;
use openraft::{ChangeMembers, EmptyNode};

use crate::raft::Group;
use crate::types::NodeId;

impl Group {
    /// Who votes, and who only learns, as far as this replica knows.
    #[must_use]
    pub fn members(&self) -> (BTreeSet<NodeId>, BTreeSet<NodeId>) {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let voters = membership.voter_ids().map(NodeId).collect();
        (voters, membership.learner_ids().map(NodeId).collect())
    }

    /// Takes a node out of the group, as voter and as learner. Repeatable. Only the leader can.
    ///
    /// # Errors
    /// Why it was not done.
    pub async fn remove(&self, node: NodeId) -> Result<(), String> {
        let (voters, learners) = self.members();
        if voters.contains(&node) || self.is_changing() {
            let change = ChangeMembers::RemoveVoters(BTreeSet::from([node.0]));
            let changed = self.raft.change_membership(change, false).await;
            changed.map_err(|err| err.to_string())?;
        } else if learners.contains(&node) {
            let change = ChangeMembers::RemoveNodes(BTreeSet::from([node.0]));
            let changed = self.raft.change_membership(change, false).await;
            changed.map_err(|err| err.to_string())?;
        }
        Ok(())
    }

    /// Lets a node follow the group, and vote once it has everything. `Ok(true)` when it votes. Repeatable. Only the
    /// leader can.
    ///
    /// # Errors
    /// Why it was not done.
    pub async fn admit(&self, node: NodeId) -> Result<bool, String> {
        let (voters, learners) = self.members();
        let half = self.is_changing();
        if voters.contains(&node) && !half {
            return Ok(true);
        }
        if !half && !learners.contains(&node) {
            let added = self.raft.add_learner(node.0, EmptyNode::new(), false).await;
            added.map_err(|err| err.to_string())?;
        }
        if !half && !self.is_nearly_caught_up(node) {
            return Ok(false);
        }
        let change = ChangeMembers::AddVoterIds(BTreeSet::from([node.0]));
        let changed = self.raft.change_membership(change, true).await;
        changed.map_err(|err| err.to_string())?;
        Ok(true)
    }

    /// A change of voters was begun and is not through: old and new voters must agree on everything until it is. A leader
    /// that is lost meanwhile leaves it so, and the next one has to end it.
    pub(super) fn is_changing(&self) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics
            .membership_config
            .membership()
            .get_joint_config()
            .len()
            > 1
    }

    /// Near enough that the rest arrives within an election's time.
    fn is_nearly_caught_up(&self, node: NodeId) -> bool {
        const NEAR: u64 = 64;
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let replication = metrics.replication.as_ref();
        let matching = replication.and_then(|all| all.get(&node.0)?.as_ref());
        matching.map(|id| id.index + NEAR) >= metrics.last_log_index
    }
}
