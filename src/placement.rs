//! Where things belong: channel → shard, shard → preferred leader, bridge slot → node. Pure and deterministic, so
//! that every node comes to the same answer.

use std::collections::{BTreeMap, BTreeSet};

use crate::stdx::stable_hash;
use crate::types::{ChannelKey, NodeId, ShardId};

/// The shard a channel belongs to, for ever: `shards` is fixed at the cluster's creation and at least 1.
#[must_use]
pub fn shard_of(key: &ChannelKey, shards: u32) -> ShardId {
    let hash = stable_hash(&[key.app.as_str().as_bytes(), key.name.as_str().as_bytes()]);
    let shard = hash % u64::from(shards.max(1));
    ShardId(u32::try_from(shard).expect("a remainder of a u32 fits a u32"))
}

/// The node that should lead a shard when all is well, so that leaders spread evenly. `None` without voters.
#[must_use]
pub fn preferred_leader(shard: ShardId, voters: &BTreeSet<NodeId>) -> Option<NodeId> {
    let at = usize::try_from(shard.0).ok()?.checked_rem(voters.len())?;
    voters.iter().nth(at).copied()
}

/// Who owns a slot, and how often its owner has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Assignment {
    pub node: NodeId,
    pub epoch: u64,
}

/// The slots that must change hands so that each is owned by a living node and none owns two more than another.
/// Slots move only when they must. Each change carries the slot's next epoch.
#[must_use]
pub fn reassign(
    slots: u32,
    now: &BTreeMap<u32, Assignment>,
    alive: &BTreeSet<NodeId>,
) -> BTreeMap<u32, Assignment> {
    let mut owned: BTreeMap<NodeId, BTreeSet<u32>> =
        alive.iter().map(|node| (*node, BTreeSet::new())).collect();
    let mut homeless = Vec::new();
    for slot in 0..slots {
        let owner = now.get(&slot).and_then(|at| owned.get_mut(&at.node));
        match owner {
            Some(slots) => drop(slots.insert(slot)),
            None => homeless.push(slot),
        }
    }
    let mut changes = BTreeMap::new();
    let give = |owned: &mut BTreeMap<NodeId, BTreeSet<u32>>, slot: u32| {
        let (node, slots) = owned
            .iter_mut()
            .min_by_key(|(node, slots)| (slots.len(), **node))?;
        slots.insert(slot);
        let epoch = now.get(&slot).map_or(1, |at| at.epoch + 1);
        Some((slot, Assignment { node: *node, epoch }))
    };
    changes.extend(
        homeless
            .into_iter()
            .filter_map(|slot| give(&mut owned, slot)),
    );
    loop {
        let fewest = owned.values().map(BTreeSet::len).min().unwrap_or(0);
        let richest = owned.values_mut().max_by_key(|slots| slots.len());
        let Some(richest) = richest.filter(|slots| slots.len() > fewest + 1) else {
            return changes;
        };
        let slot = richest.pop_last().expect("it has at least two");
        changes.extend(give(&mut owned, slot));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ChannelName;
    use proptest::prelude::*;

    #[test]
    fn a_channels_shard_is_frozen() {
        let key = |name: &str| ChannelKey {
            app: "app".parse().unwrap(),
            name: ChannelName::parse(name).unwrap(),
        };
        assert_eq!(
            shard_of(&key("channel"), 16),
            ShardId(6),
            "or every cluster loses its channels"
        );
        let used: BTreeSet<ShardId> = (0..400)
            .map(|n| shard_of(&key(&format!("c{n}")), 16))
            .collect();
        assert_eq!(used.len(), 16);
    }

    #[test]
    fn leaders_spread() {
        let voters: BTreeSet<NodeId> = [1, 2, 3].map(NodeId).into();
        let led = |node| {
            (0..16)
                .filter(|s| preferred_leader(ShardId(*s), &voters) == Some(NodeId(node)))
                .count()
        };
        assert_eq!([led(1), led(2), led(3)], [6, 5, 5]);
        assert_eq!(preferred_leader(ShardId(0), &BTreeSet::new()), None);
    }

    proptest! {
        #[test]
        fn slots_end_up_spread_over_the_living_with_few_moves(
            before in prop::collection::btree_set(1..6_u64, 1..5),
            after in prop::collection::btree_set(1..6_u64, 1..5),
        ) {
            let nodes = |set: &BTreeSet<u64>| set.iter().map(|n| NodeId(*n)).collect::<BTreeSet<_>>();
            let first = reassign(16, &BTreeMap::new(), &nodes(&before));
            prop_assert!(first.values().all(|at| at.epoch == 1));
            let changes = reassign(16, &first, &nodes(&after));
            let mut now = first.clone();
            now.extend(changes.clone());
            for (slot, at) in &changes {
                prop_assert_eq!(at.epoch, first[slot].epoch + 1);
                prop_assert_ne!(at.node, first[slot].node, "a move that changes nothing");
            }
            let counts: Vec<usize> = nodes(&after).iter()
                .map(|n| now.values().filter(|at| at.node == *n).count()).collect();
            prop_assert_eq!(counts.iter().sum::<usize>(), 16);
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            prop_assert!(reassign(16, &now, &nodes(&after)).is_empty(), "stable once balanced");
        }
    }

    #[test]
    fn nobody_alive_owns_nothing() {
        assert!(reassign(4, &BTreeMap::new(), &BTreeSet::new()).is_empty());
    }
}
