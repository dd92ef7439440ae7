//! How many do what on a channel, over all nodes. Nothing of it is stored: every node counts its own clients and tells the
//! leader of each channel's shard, which adds them up for as long as it hears of them.
//!
//! Invariants: of each node the leader has what the node's present process told last, in the order of its telling; a leader
//! that does not know a node asks it for everything; a node that fell silent counts for nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::types::{
    AppId, ChannelKey, ChannelName, Counts, Leadership, Metrics, NodeId, OccupancyChange,
};

/// A node that was not heard for so long counts for nothing. Longer than a few of its tellings.
const SILENT_AFTER: Duration = Duration::from_secs(5);
/// A leader that led for less has not heard of everybody: what it hears of first is not new for that.
const SETTLING: Duration = Duration::from_secs(3);
/// Channels that one telling may be about.
pub(super) const TOLD_MAX: usize = 4096;

/// This node's part in one shard: what its clients do, and which channels somebody here wants to hear of.
#[derive(Debug, Default)]
pub(super) struct Own {
    counts: HashMap<ChannelKey, Counts>,
    changed: BTreeSet<ChannelKey>,
    /// Who has all but what changed.
    told: Option<Leadership>,
    /// Something told did not arrive: what the leader has may be wrong.
    unsure: bool,
    numbered: u64,
    watched: BTreeMap<ChannelKey, watch::Sender<Option<Metrics>>>,
}

/// What a node has to say to a leader, and asks of it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Telling {
    /// Of a process each is greater than the one before: what arrives late is not heard.
    pub(super) number: u64,
    /// Whether the node says what it has, if only that nothing changed; else it only asks.
    pub(super) speaks: bool,
    /// Everything before this is void.
    pub(super) whole: bool,
    pub(super) counts: Vec<(ChannelKey, Counts)>,
    pub(super) asked: Vec<ChannelKey>,
}

impl Own {
    /// An attachment was this and is that.
    pub(super) fn change(&mut self, key: &ChannelKey, from: Counts, to: Counts) {
        let counts = self.counts.get(key).copied().unwrap_or_default();
        let counts = counts.minus(from).plus(to);
        match counts.is_nothing() {
            true => self.counts.remove(key),
            false => self.counts.insert(key.clone(), counts),
        };
        self.changed.insert(key.clone());
    }

    pub(super) fn watch(&mut self, key: &ChannelKey) -> watch::Receiver<Option<Metrics>> {
        let sender = self.watched.entry(key.clone());
        sender.or_insert_with(|| watch::channel(None).0).subscribe()
    }

    /// What to tell this leader now, in parts; none when there is nothing, not even that this node is alive.
    pub(super) fn tell(&mut self, leader: Leadership) -> Vec<Telling> {
        self.watched.retain(|_, sender| sender.receiver_count() > 0);
        let whole = self.told != Some(leader);
        let changed = std::mem::take(&mut self.changed);
        let counts: Vec<(ChannelKey, Counts)> = match whole {
            true => self
                .counts
                .iter()
                .map(|(key, it)| (key.clone(), *it))
                .collect(),
            false => {
                let now = |key: &ChannelKey| self.counts.get(key).copied().unwrap_or_default();
                let pair = |key: ChannelKey| {
                    let counts = now(&key);
                    (key, counts)
                };
                changed.into_iter().map(pair).collect()
            }
        };
        let asked: Vec<ChannelKey> = self.watched.keys().cloned().collect();
        // A leader that was elected again has what it was told in its former term.
        let told_elsewhere = whole && self.told.is_some();
        let nothing = counts.is_empty() && asked.is_empty() && self.counts.is_empty();
        if nothing && !self.unsure && !told_elsewhere {
            self.told = None;
            return vec![];
        }
        self.told = Some(leader);
        self.unsure = false;
        let nothing = || Telling {
            speaks: true,
            ..Telling::default()
        };
        let mut tellings = parts(counts, |counts| Telling {
            counts,
            ..nothing()
        });
        tellings.extend(parts(asked, |asked| Telling { asked, ..nothing() }));
        if tellings.is_empty() {
            tellings.push(nothing());
        }
        tellings[0].whole = whole;
        for telling in &mut tellings {
            self.numbered += 1;
            telling.number = self.numbered;
        }
        tellings
    }

    /// There is nobody to tell: the next leader is told everything.
    pub(super) fn nobody_leads(&mut self) {
        self.watched.retain(|_, sender| sender.receiver_count() > 0);
        self.changed.clear();
        self.told = None;
    }

    /// A telling did not arrive, or the leader knows nothing of this node.
    pub(super) fn forget_told(&mut self) {
        self.told = None;
        self.unsure = true;
    }

    /// What a telling asked for.
    pub(super) fn answered(&self, key: &ChannelKey, metrics: Metrics) {
        if let Some(sender) = self.watched.get(key) {
            sender.send_if_modified(|known| {
                let changed = *known != Some(metrics);
                *known = Some(metrics);
                changed
            });
        }
    }
}

fn parts<T>(all: Vec<T>, part: impl Fn(Vec<T>) -> Telling) -> Vec<Telling> {
    let mut all = all.into_iter().peekable();
    let mut tellings = Vec::new();
    while all.peek().is_some() {
        tellings.push(part(all.by_ref().take(TOLD_MAX).collect()));
    }
    tellings
}

/// What the leader of a shard has heard, while it leads.
#[derive(Debug, Default)]
pub(super) struct Heard {
    term: Option<(u64, Instant)>,
    nodes: BTreeMap<NodeId, Speaker>,
    channels: BTreeMap<ChannelKey, BTreeMap<NodeId, Counts>>,
}

#[derive(Debug)]
struct Speaker {
    boot: u64,
    /// Of the last telling that was heard.
    number: u64,
    last: Instant,
}

impl Heard {
    /// Hears a node out. `None`: the node is not known, and is to tell everything.
    pub(super) fn hear(
        &mut self,
        term: u64,
        (node, boot): (NodeId, u64),
        (number, whole): (u64, bool),
        counts: impl IntoIterator<Item = (ChannelKey, Counts)>,
        now: Instant,
    ) -> Option<Vec<OccupancyChange>> {
        let mut changes = self.enter(term, now);
        let known = self.nodes.get(&node).filter(|it| it.boot == boot);
        if known.is_some_and(|it| it.number >= number) {
            return Some(changes);
        }
        if known.is_none() && !whole {
            return None;
        }
        // Unlike a node that went, one that tells everything anew has most of it again.
        let mut again: BTreeMap<ChannelKey, Counts> = BTreeMap::new();
        if whole {
            let had = self
                .channels
                .iter()
                .filter(|(_, nodes)| nodes.contains_key(&node));
            again = had
                .map(|(key, _)| (key.clone(), Counts::default()))
                .collect();
        }
        let last = now;
        self.nodes.insert(node, Speaker { boot, number, last });
        again.extend(counts);
        let settled = self.is_settled(now);
        for (key, counts) in again {
            changes.extend(self.set(key, node, counts).filter(|_| settled));
        }
        Some(changes)
    }

    /// Nodes that fell silent count for nothing.
    pub(super) fn expire(&mut self, term: u64, now: Instant) -> Vec<OccupancyChange> {
        let mut changes = self.enter(term, now);
        let silent = |it: &Speaker| now.duration_since(it.last) >= SILENT_AFTER;
        let silent = self.nodes.iter().filter(|(_, it)| silent(it));
        let silent: Vec<NodeId> = silent.map(|(node, _)| *node).collect();
        for node in silent {
            self.nodes.remove(&node);
            let had = self
                .channels
                .iter()
                .filter(|(_, nodes)| nodes.contains_key(&node));
            let had: Vec<ChannelKey> = had.map(|(key, _)| key.clone()).collect();
            for key in had {
                changes.extend(self.set(key, node, Counts::default()));
            }
        }
        changes
    }

    /// Another term knows nothing yet.
    fn enter(&mut self, term: u64, now: Instant) -> Vec<OccupancyChange> {
        if self.term.is_none_or(|(known, _)| known != term) {
            *self = Self {
                term: Some((term, now)),
                ..Self::default()
            };
        }
        vec![]
    }

    fn is_settled(&self, now: Instant) -> bool {
        self.term
            .is_some_and(|(_, since)| now.duration_since(since) >= SETTLING)
    }

    fn set(&mut self, key: ChannelKey, node: NodeId, counts: Counts) -> Option<OccupancyChange> {
        let nodes = self.channels.entry(key.clone()).or_default();
        let was_open = !nodes.is_empty();
        match counts.is_nothing() {
            true => nodes.remove(&node),
            false => nodes.insert(node, counts),
        };
        let is_open = !nodes.is_empty();
        if !is_open {
            self.channels.remove(&key);
        }
        match (was_open, is_open) {
            (false, true) => Some(OccupancyChange::Opened(key)),
            (true, false) => Some(OccupancyChange::Closed(key)),
            _ => None,
        }
    }

    pub(super) fn counts(&self, key: &ChannelKey) -> Counts {
        let nodes = self.channels.get(key).into_iter().flatten();
        nodes.fold(Counts::default(), |all, (_, counts)| all.plus(*counts))
    }

    /// Up to `limit` channels of the app that somebody is attached to, in order: those whose names begin with `prefix` and come
    /// after `after`.
    pub(super) fn channels(
        &self,
        app: &AppId,
        prefix: &str,
        after: Option<&ChannelName>,
        limit: usize,
    ) -> Vec<ChannelName> {
        let start = match after {
            Some(name) => Bound::Excluded(ChannelKey {
                app: app.clone(),
                name: name.clone(),
            }),
            None => match ChannelName::parse(prefix) {
                Ok(name) => Bound::Included(ChannelKey {
                    app: app.clone(),
                    name,
                }),
                Err(_) => Bound::Unbounded,
            },
        };
        let channels = self.channels.range((start, Bound::Unbounded));
        let of_app = channels
            .map(|(key, _)| key)
            .skip_while(|key| key.app < *app);
        let of_app = of_app.take_while(|key| key.app == *app);
        let begins = of_app.filter(|key| key.name.as_str().starts_with(prefix));
        begins.take(limit).map(|key| key.name.clone()).collect()
    }
}

#[cfg(test)]
mod tests;
