//! Tells the leaders of shards what this node's clients do, hears what other nodes tell, and answers who asks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use prost::Message as _;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cluster::occupancy::{Heard, Own, Telling};
use crate::cluster::{Cluster, ReadError};
use crate::tasks::{OnError, Tasks};
use crate::transport::{Lane, Service};
use crate::types::{
    AppId, ChannelKey, ChannelName, Counts, GroupId, Leadership, Metrics, NodeId, OccupancyChange,
    ShardId,
};
use crate::wire::peer;

const OCCUPYING: Service = Service(26);
const ENUMERATE: Service = Service(27);

/// How often a node tells a leader that it is still there, and asks for what is watched here.
const PERIOD: Duration = Duration::from_secs(1);
/// Changes that come within this are told together.
const GATHER: Duration = Duration::from_millis(20);
/// How long telling or asking may take.
const TELL: Duration = Duration::from_secs(2);
/// How long somebody who asks waits for a leader.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(50);
/// Changes that may wait for who wants to hear of them; beyond it they are dropped.
const CHANGES_MAX: usize = 4096;

/// What this node tells and has heard, by shard.
#[derive(Debug)]
pub(super) struct Occupancy {
    shards: Vec<Part>,
    changes: mpsc::Sender<OccupancyChange>,
    /// Until somebody takes it.
    listener: Mutex<Option<mpsc::Receiver<OccupancyChange>>>,
}

#[derive(Debug, Default)]
struct Part {
    own: Mutex<Own>,
    heard: Mutex<Heard>,
    changed: Notify,
    /// Held while this node tells: what is told later must be heard later.
    telling: tokio::sync::Mutex<()>,
}

impl Occupancy {
    pub(super) fn new(shards: u32) -> Self {
        let (changes, listener) = mpsc::channel(CHANGES_MAX);
        Self {
            shards: (0..shards).map(|_| Part::default()).collect(),
            changes,
            listener: Mutex::new(Some(listener)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was to be told may not have arrived, unless the second says otherwise by then.
struct Untold<'a>(&'a Part, bool);

impl Drop for Untold<'_> {
    fn drop(&mut self) {
        if self.1 {
            lock(&self.0.own).forget_told();
        }
    }
}

/// One attachment, for as long as it is counted.
#[derive(Debug)]
pub struct Occupying {
    cluster: Cluster,
    key: ChannelKey,
    counts: Counts,
}

impl Occupying {
    /// What the attachment may do from now on.
    pub fn set(&mut self, counts: Counts) {
        if counts == self.counts {
            return;
        }
        let part = self.cluster.part(self.cluster.shard_of(&self.key));
        lock(&part.own).change(&self.key, self.counts, counts);
        self.counts = counts;
        part.changed.notify_one();
    }
}

impl Drop for Occupying {
    fn drop(&mut self) {
        self.set(Counts::default());
    }
}

pub(super) fn start(cluster: &Cluster, tasks: &Tasks) {
    let this = cluster.clone();
    let handler = move |from: NodeId, group: GroupId, body: Bytes| {
        let answer = this.on_occupying(from, group, body);
        async { answer }
    };
    cluster.0.transport.register(OCCUPYING, Arc::new(handler));
    let this = cluster.clone();
    let handler = move |_: NodeId, group: GroupId, body: Bytes| {
        let answer = this.on_enumerate(group, body);
        async { answer }
    };
    cluster.0.transport.register(ENUMERATE, Arc::new(handler));
    for shard in cluster.shards() {
        let this = cluster.clone();
        tasks.spawn("cluster.occupancy", OnError::StopNode, |token| {
            this.tell_occupancy(shard, token)
        });
    }
}

impl Cluster {
    fn part(&self, shard: ShardId) -> &Part {
        &self.0.occupancy.shards[shard.0 as usize]
    }

    /// Counts an attachment to the channel, as nothing yet.
    #[must_use]
    pub fn occupy(&self, key: &ChannelKey) -> Occupying {
        Occupying {
            cluster: self.clone(),
            key: key.clone(),
            counts: Counts::default(),
        }
    }

    /// The channel's occupancy over all nodes, about each second as it changes; `None` until it is known.
    #[must_use]
    pub fn watch_occupancy(&self, key: &ChannelKey) -> watch::Receiver<Option<Metrics>> {
        let part = self.part(self.shard_of(key));
        let watching = lock(&part.own).watch(key);
        part.changed.notify_one();
        watching
    }

    /// Channels that open and close, of shards that this node leads. There is one listener; for others there is nothing.
    #[must_use]
    pub fn take_occupancy_changes(&self) -> Option<mpsc::Receiver<OccupancyChange>> {
        lock(&self.0.occupancy.listener).take()
    }

    /// The channel's occupancy over all nodes, as of now.
    ///
    /// # Errors
    /// When no leader of its shard is reached in time.
    pub async fn metrics(&self, key: &ChannelKey) -> Result<Metrics, ReadError> {
        let shard = self.shard_of(key);
        // Others are told soon; whoever asks this node wants what it knows itself.
        self.tell_now(shard).await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let telling = Telling {
                asked: vec![key.clone()],
                ..Telling::default()
            };
            let leadership = *self.leadership(shard).borrow();
            if let Some(answer) = self.ask(shard, leadership, telling).await
                && let Some((_, metrics)) = answer.metrics.into_iter().next()
            {
                return Ok(metrics);
            }
            if Instant::now() >= deadline {
                return Err(ReadError::NoLeader);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Up to `limit` channels of the app that somebody is attached to, in the order of their names: those that begin with
    /// `prefix` and come after `after`.
    ///
    /// # Errors
    /// When the leader of a shard is not reached in time.
    pub async fn active_channels(
        &self,
        app: &AppId,
        prefix: &str,
        after: Option<&ChannelName>,
        limit: usize,
    ) -> Result<Vec<(ChannelName, Metrics)>, ReadError> {
        let question = peer::Enumerate {
            app: app.to_string(),
            prefix: prefix.to_owned(),
            after: after
                .map(|name| name.as_str().to_owned())
                .unwrap_or_default(),
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
        };
        let asked = self.shards().map(|shard| self.enumerate(shard, &question));
        let mut channels = Vec::new();
        for answer in join_all(asked).await {
            channels.extend(answer?);
        }
        channels.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        channels.truncate(limit);
        Ok(channels)
    }

    async fn enumerate(
        &self,
        shard: ShardId,
        question: &peer::Enumerate,
    ) -> Result<Vec<(ChannelName, Metrics)>, ReadError> {
        self.tell_now(shard).await;
        let deadline = Instant::now() + PATIENCE;
        let body = Bytes::from(question.encode_to_vec());
        loop {
            let leader = self.leadership(shard).borrow().leader;
            let answer = match leader {
                Some(leader) if leader == self.node() => self
                    .on_enumerate(GroupId::of_shard(shard), body.clone())
                    .ok(),
                Some(leader) => {
                    let (transport, group) = (&self.0.transport, GroupId::of_shard(shard));
                    let call = transport.call(
                        leader,
                        Lane::Bulk,
                        ENUMERATE,
                        group,
                        body.clone().into(),
                        TELL,
                    );
                    call.await.ok()
                }
                None => None,
            };
            let answer = answer.and_then(|answer| peer::EnumerateResponse::decode(answer).ok());
            if let Some(answer) = answer.filter(|answer| answer.leads) {
                let channels = answer.channels.into_iter().filter_map(read);
                return Ok(channels.map(|(key, metrics)| (key.name, metrics)).collect());
            }
            if Instant::now() >= deadline {
                return Err(ReadError::NoLeader);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Tells the shard's leader what there is to tell, each second and when something changed.
    async fn tell_occupancy(self, shard: ShardId, token: CancellationToken) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(PERIOD);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                _ = tick.tick() => {}
                () = self.part(shard).changed.notified() => tokio::time::sleep(GATHER).await,
            }
            self.tell_now(shard).await;
            let leadership = *self.leadership(shard).borrow();
            if leadership.leader == Some(self.node()) {
                let changes = lock(&self.part(shard).heard).expire(leadership.term, Instant::now());
                self.announce(changes);
            }
        }
    }

    async fn tell_now(&self, shard: ShardId) {
        let _one_at_a_time = self.part(shard).telling.lock().await;
        // A leader that does not know this node is told everything at once.
        for _ in 0..2 {
            let leadership = *self.leadership(shard).borrow();
            if leadership.leader.is_none() {
                lock(&self.part(shard).own).nobody_leads();
                return;
            }
            let tellings = lock(&self.part(shard).own).tell(leadership);
            // Whoever waits for this may go away in between.
            let mut untold = Untold(self.part(shard), true);
            let mut understood = true;
            for telling in tellings {
                let answer = self.ask(shard, leadership, telling).await;
                understood = answer.as_ref().is_some_and(|answer| !answer.unknown);
                let own = lock(&self.part(shard).own);
                for (key, metrics) in answer.into_iter().flat_map(|answer| answer.metrics) {
                    own.answered(&key, metrics);
                }
                if !understood {
                    break;
                }
            }
            untold.1 = !understood;
            if understood {
                return;
            }
        }
    }

    /// `None` when the leader was not reached.
    async fn ask(&self, shard: ShardId, leadership: Leadership, telling: Telling) -> Option<Heed> {
        let leader = leadership.leader?;
        if leader == self.node() {
            return Some(self.heed(shard, (self.node(), self.boot()), telling));
        }
        let body = peer::Occupying {
            boot: self.boot(),
            speaks: telling.speaks,
            number: telling.number,
            whole: telling.whole,
            counts: telling
                .counts
                .iter()
                .map(|(key, counts)| write(key, *counts, 0))
                .collect(),
            asked: telling
                .asked
                .iter()
                .map(|key| write(key, Counts::default(), 0))
                .collect(),
        };
        let (transport, group) = (&self.0.transport, GroupId::of_shard(shard));
        let body = body.encode_to_vec().into();
        let call = transport.call(leader, Lane::Bulk, OCCUPYING, group, body, TELL);
        let answer = peer::OccupyingResponse::decode(call.await.ok()?).ok()?;
        Some(Heed {
            unknown: answer.unknown,
            metrics: answer.metrics.into_iter().filter_map(read).collect(),
        })
    }

    fn on_occupying(&self, from: NodeId, group: GroupId, body: Bytes) -> Result<Bytes, String> {
        let shard = group.shard().ok_or_else(|| "no shard".to_owned())?;
        let said = peer::Occupying::decode(body).map_err(|err| err.to_string())?;
        let read_counts = |it: peer::ChannelCounts| read(it).map(|(key, it)| (key, it.counts));
        let telling = Telling {
            speaks: said.speaks,
            number: said.number,
            whole: said.whole,
            counts: said.counts.into_iter().filter_map(read_counts).collect(),
            asked: said
                .asked
                .into_iter()
                .filter_map(read)
                .map(|(key, _)| key)
                .collect(),
        };
        let heed = self.heed(shard, (from, said.boot), telling);
        let metrics = heed.metrics.iter();
        let answer = peer::OccupyingResponse {
            unknown: heed.unknown,
            metrics: metrics
                .map(|(key, it)| write(key, it.counts, it.presence_members))
                .collect(),
        };
        Ok(answer.encode_to_vec().into())
    }

    /// What a node tells this one, as leader.
    fn heed(&self, shard: ShardId, from: (NodeId, u64), telling: Telling) -> Heed {
        let leadership = *self.leadership(shard).borrow();
        if leadership.leader != Some(self.node()) {
            return Heed {
                unknown: true,
                metrics: vec![],
            };
        }
        let mut heard = lock(&self.part(shard).heard);
        let mut unknown = false;
        if telling.speaks {
            let (term, now) = (leadership.term, Instant::now());
            let numbered = (telling.number, telling.whole);
            match heard.hear(term, from, numbered, telling.counts, now) {
                Some(changes) => self.announce(changes),
                None => unknown = true,
            }
        }
        let counts: Vec<(ChannelKey, Counts)> = telling
            .asked
            .into_iter()
            .map(|key| {
                let counts = heard.counts(&key);
                (key, counts)
            })
            .collect();
        drop(heard);
        Heed {
            unknown,
            metrics: self.with_members(shard, counts),
        }
    }

    fn with_members(
        &self,
        shard: ShardId,
        counts: Vec<(ChannelKey, Counts)>,
    ) -> Vec<(ChannelKey, Metrics)> {
        let state = self.state(shard);
        let with = |(key, counts): (ChannelKey, Counts)| {
            let presence_members = u32::try_from(state.members(&key).len()).unwrap_or(u32::MAX);
            let metrics = Metrics {
                counts,
                presence_members,
            };
            (key, metrics)
        };
        counts.into_iter().map(with).collect()
    }

    fn announce(&self, changes: Vec<OccupancyChange>) {
        for change in changes {
            // Nobody listens, or cannot keep up: what is told of channels is no promise.
            let _ = self.0.occupancy.changes.try_send(change);
        }
    }

    fn on_enumerate(&self, group: GroupId, body: Bytes) -> Result<Bytes, String> {
        let shard = group.shard().ok_or_else(|| "no shard".to_owned())?;
        let question = peer::Enumerate::decode(body).map_err(|err| err.to_string())?;
        let app: AppId = question.app.parse().map_err(|_| "no app".to_owned())?;
        let after = ChannelName::parse(&question.after).ok();
        let leads = self.leadership(shard).borrow().leader == Some(self.node());
        let counts = {
            let heard = lock(&self.part(shard).heard);
            let limit = usize::try_from(question.limit).unwrap_or(usize::MAX);
            let names = heard.channels(&app, &question.prefix, after.as_ref(), limit);
            let keys = names.into_iter().map(|name| ChannelKey {
                app: app.clone(),
                name,
            });
            keys.map(|key| {
                let counts = heard.counts(&key);
                (key, counts)
            })
            .collect()
        };
        let channels = self.with_members(shard, counts);
        let channels = channels.iter();
        let answer = peer::EnumerateResponse {
            leads,
            channels: channels
                .map(|(key, it)| write(key, it.counts, it.presence_members))
                .collect(),
        };
        Ok(answer.encode_to_vec().into())
    }
}

/// What a leader answers.
#[derive(Debug)]
struct Heed {
    unknown: bool,
    metrics: Vec<(ChannelKey, Metrics)>,
}

fn write(key: &ChannelKey, counts: Counts, presence_members: u32) -> peer::ChannelCounts {
    peer::ChannelCounts {
        app: key.app.to_string(),
        channel: key.name.as_str().to_owned(),
        connections: counts.connections,
        publishers: counts.publishers,
        subscribers: counts.subscribers,
        presence_connections: counts.presence_connections,
        presence_subscribers: counts.presence_subscribers,
        presence_members,
    }
}

/// `None` for what cannot be a channel: told by a node of another build.
fn read(it: peer::ChannelCounts) -> Option<(ChannelKey, Metrics)> {
    let key = ChannelKey {
        app: it.app.parse().ok()?,
        name: ChannelName::parse(&it.channel).ok()?,
    };
    let counts = Counts {
        connections: it.connections,
        publishers: it.publishers,
        subscribers: it.subscribers,
        presence_connections: it.presence_connections,
        presence_subscribers: it.presence_subscribers,
    };
    let metrics = Metrics {
        counts,
        presence_members: it.presence_members,
    };
    Some((key, metrics))
}
