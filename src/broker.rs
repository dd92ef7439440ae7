//! The one API behind every door: publish, follow a channel from a serial, read its history, list its members.

mod feed;
mod follow;
mod once;
mod publish;

pub use feed::{Hub, Record};
pub use follow::{Continuity, Follower, From, Lost, Polled, Start, Started, Waker};
pub use once::Once;
pub use publish::{Publish, PublishError, Published};

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use crate::channel;

use crate::cluster::{
    self, BridgeState, Cluster, CommandError, Peer, ReadError, Registry, ShardPage, StoredRecord,
};
use crate::tasks::{OnError, Tasks};
use crate::types::{
    AppId, ChannelKey, ChannelName, Counts, ErrorCode, ErrorInfo, Kinds, Leadership, Metrics,
    NodeId, OccupancyChange, Range, Serial, ShardId,
};
use crate::wire::ably::PresenceMessage;
use crate::wire::{control, entry, peer};

/// How long a read waits for a leader and for this node's replica.
const READ_PATIENCE: Duration = Duration::from_secs(5);

/// A handle to the node's broker.
#[derive(Clone, Debug)]
pub struct Broker {
    cluster: Cluster,
    hub: Arc<Hub>,
}

/// Members of one connection on a channel.
#[derive(Clone, Debug)]
pub struct Attended(channel::Attended);

impl Attended {
    /// Where, and of which connection.
    #[must_use]
    pub fn place(&self) -> (ChannelKey, String) {
        (self.0.key.clone(), self.0.connection_id.clone())
    }
}

/// One attachment, for as long as it is counted.
#[derive(Debug)]
pub struct Occupying(cluster::Occupying);

impl Occupying {
    /// What the attachment may do from now on.
    pub fn set(&mut self, counts: Counts) {
        self.0.set(counts);
    }
}

/// Where a channel lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub shard: ShardId,
    pub leader: Option<NodeId>,
}

/// A shard as this node knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardStatus {
    pub shard: ShardId,
    pub leader: Option<NodeId>,
    pub term: u64,
    /// Newest log index applied on this node.
    pub applied: u64,
}

impl Broker {
    /// The node's part in the cluster.
    #[must_use]
    pub const fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// `hub` is the one the cluster was started with as its event sink.
    #[must_use]
    pub const fn new(cluster: Cluster, hub: Arc<Hub>) -> Self {
        Self { cluster, hub }
    }

    #[must_use]
    pub fn node(&self) -> NodeId {
        self.cluster.node()
    }

    /// All nodes with their addresses.
    #[must_use]
    pub fn nodes(&self) -> &BTreeMap<NodeId, Peer> {
        self.cluster.nodes()
    }

    /// The registry, as it changes: apps, keys, namespaces, bridges.
    #[must_use]
    pub fn registry(&self) -> watch::Receiver<Arc<Registry>> {
        self.cluster.registry()
    }

    #[must_use]
    pub fn place(&self, key: &ChannelKey) -> Place {
        let shard = self.cluster.shard_of(key);
        let leader = self.cluster.leadership(shard).borrow().leader;
        Place { shard, leader }
    }

    /// All shards, in order.
    #[must_use]
    pub fn shards(&self) -> Vec<ShardStatus> {
        let status = |shard| {
            let known = *self.cluster.leadership(shard).borrow();
            ShardStatus {
                shard,
                leader: known.leader,
                term: known.term,
                applied: *self.cluster.applied(shard).borrow(),
            }
        };
        self.cluster.shards().map(status).collect()
    }

    /// Who leads the control group.
    #[must_use]
    pub fn control_leader(&self) -> Option<NodeId> {
        self.cluster.control_leadership().borrow().leader
    }

    /// Stores a publish. Calls for one channel are stored in the order of the calls; the returned value waits for
    /// the outcome.
    #[must_use = "the outcome says whether it was stored"]
    pub fn publish(&self, publish: Publish) -> Published {
        let rule = self.cluster.registry().borrow().rule(&publish.key);
        self.publish_by(publish, &rule)
    }

    /// As [`Self::publish`], by another rule than the registry's.
    fn publish_by(&self, publish: Publish, rule: &control::Namespace) -> Published {
        let shard = self.cluster.shard_of(&publish.key);
        let entry = publish.into_entry(rule, self.cluster.attendant());
        Published::new(self.cluster.submit(shard, entry))
    }

    /// The random number that this process drew at its start: with the node it tells who attends a connection.
    #[must_use]
    pub fn boot(&self) -> u64 {
        self.cluster.boot()
    }

    /// Counts an attachment to the channel, as nothing yet.
    #[must_use]
    pub fn occupy(&self, key: &ChannelKey) -> Occupying {
        Occupying(self.cluster.occupy(key))
    }

    /// The channel's occupancy over all nodes, about each second as it changes; `None` until it is known.
    #[must_use]
    pub fn watch_occupancy(&self, key: &ChannelKey) -> watch::Receiver<Option<Metrics>> {
        self.cluster.watch_occupancy(key)
    }

    /// The channel's occupancy over all nodes.
    ///
    /// # Errors
    /// `NoLeader` when who leads its shard is not reached in time.
    pub async fn metrics(&self, key: &ChannelKey) -> Result<Metrics, ErrorInfo> {
        self.cluster.metrics(key).await.map_err(read_error)
    }

    /// Channels that open and close, of shards that this node leads. There is one listener; for others there is nothing.
    #[must_use]
    pub fn take_occupancy_changes(&self) -> Option<mpsc::Receiver<OccupancyChange>> {
        self.cluster.take_occupancy_changes()
    }

    /// Up to `limit` channels of the app that somebody is attached to, in the order of their names: those that begin with
    /// `prefix` and come after `after`.
    ///
    /// # Errors
    /// `NoLeader` when who leads a shard is not reached in time.
    pub async fn active_channels(
        &self,
        app: &AppId,
        prefix: &str,
        after: Option<&ChannelName>,
        limit: usize,
    ) -> Result<Vec<(ChannelName, Metrics)>, ErrorInfo> {
        let channels = self.cluster.active_channels(app, prefix, after, limit);
        channels.await.map_err(read_error)
    }

    /// Tells all other nodes that a client came back here, so that an older socket of its connection ends.
    pub fn say_taken(&self, connection_id: &str, at_ms: u64, tasks: &Tasks) {
        let taken = cluster::Taken {
            connection_id: connection_id.to_owned(),
            at_ms,
            by: self.node(),
        };
        self.cluster.say_taken(&taken, tasks);
    }

    /// Has every connection that came back to another node told to `listener`. The first one counts.
    /// It gets the connection's id, when the client came back in milliseconds since 1970, and to which node.
    pub fn on_taken(&self, listener: impl Fn(&str, u64, NodeId) + Send + Sync + 'static) {
        (self.cluster).on_taken(move |taken| listener(&taken.connection_id, taken.at_ms, taken.by));
    }

    /// What `node` answers to a client's request that it is relayed.
    ///
    /// # Errors
    /// As [`Cluster::relay`].
    pub async fn relay(&self, node: NodeId, asked: &peer::Relayed) -> Result<Bytes, ErrorInfo> {
        self.cluster.relay(node, asked).await
    }

    /// Has what other nodes relay carried out by `listener`. The first one counts.
    pub fn on_relayed<F>(&self, listener: impl Fn(peer::Relayed) -> F + Send + Sync + 'static)
    where
        F: Future<Output = Result<Bytes, ErrorInfo>> + Send + 'static,
    {
        let listener = move |asked| -> cluster::Relaying { Box::pin(listener(asked)) };
        self.cluster.on_relayed(listener);
    }

    /// Milliseconds since 1970, by this node's clock.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.cluster.now_ms()
    }

    /// An id for leaves that a client did not ask for: begins with no connection's id, so that clients order the leave by
    /// its time.
    #[must_use]
    pub fn left_id() -> String {
        cluster::left_id()
    }

    /// Up to `limit` connections on channels that the log says this process attends, of those that `filter` takes.
    #[must_use]
    pub fn attended_here(&self, filter: impl Fn(&str) -> bool, limit: usize) -> Vec<Attended> {
        let attended = self.cluster.attended_here(filter, limit).into_iter();
        attended.map(Attended).collect()
    }

    /// Has these members leave, unless another process attends them by now. How many left.
    pub async fn let_go_here(&self, attended: Vec<Attended>) -> usize {
        let attended = attended.into_iter().map(|Attended(it)| it);
        self.cluster.let_go_here(attended.collect()).await
    }

    /// Says that this process attends the members that the connection has in the channel, if it has any.
    #[must_use = "the outcome says whether it was heard"]
    pub fn attend(&self, key: ChannelKey, connection_id: &str) -> Published {
        self.publish(Publish {
            key,
            id: String::new(),
            connection_id: connection_id.to_owned(),
            count: 0,
            body: Bytes::new(),
            source: None,
            presence: Some(entry::Presence::default()),
            ephemeral: false,
        })
    }

    /// The channel's members, in the order of client id and connection id. Shows everything acknowledged anywhere before
    /// the call.
    ///
    /// # Errors
    /// When no leader is reached in time.
    pub async fn members(&self, key: &ChannelKey) -> Result<Vec<PresenceMessage>, ErrorInfo> {
        let shard = self.cluster.shard_of(key);
        let caught_up = self.cluster.catch_up(shard, READ_PATIENCE).await;
        caught_up.map_err(read_error)?;
        let members = self.cluster.state(shard).members(key);
        Ok(follow::listed(members))
    }

    /// Records of a channel of these kinds within `range`, at most `limit`, and whether the page was cut before that for its size.
    /// Shows everything acknowledged anywhere before the call.
    ///
    /// # Errors
    /// When no leader is reached in time, or the log cannot be read.
    pub async fn history(
        &self,
        key: &ChannelKey,
        range: &Range,
        kinds: Kinds,
        limit: usize,
    ) -> Result<(Vec<StoredRecord>, bool), ErrorInfo> {
        let shard = self.cluster.shard_of(key);
        self.cluster
            .catch_up(shard, READ_PATIENCE)
            .await
            .map_err(read_error)?;
        let refs = self.cluster.state(shard).range(key, range, kinds, limit);
        let refs = refs.map_err(|err| read_error(err.into()))?;
        let wanted = refs.len();
        let records = self.cluster.read_records(shard, refs).await;
        let records = records.map_err(|err| read_error(err.into()))?;
        let cut = records.len() < wanted;
        Ok((records, cut))
    }

    /// Whether everything after `serial` is retained, so that what is retained up to it ends there without a gap. As this
    /// node knows it.
    ///
    /// # Errors
    /// When the channel cannot be read.
    pub fn reaches_back_to(&self, key: &ChannelKey, serial: Serial) -> Result<bool, ErrorInfo> {
        let shard = self.cluster.shard_of(key);
        let found = self.cluster.state(shard).after(key, serial, 1);
        match found {
            Ok(_) => Ok(true),
            Err(channel::ReadError::Behind(_)) => Ok(false),
            Err(err) => Err(read_error(err.into())),
        }
    }

    /// Whether this node shows everything up to `serial`: its followers have been woken for it.
    #[must_use]
    pub fn shows(&self, key: &ChannelKey, serial: Serial) -> bool {
        let now = self.cluster.state(self.cluster.shard_of(key)).now();
        // Of another life of the cluster there is nothing to wait for.
        serial.incarnation != now.incarnation || serial <= now
    }

    /// Waits until this node shows everything up to `serial`, or for as long as a reader waits.
    pub async fn until_shown(&self, key: &ChannelKey, serial: Serial) {
        let mut applied = self.cluster.applied(self.cluster.shard_of(key));
        let shown = applied.wait_for(|applied| *applied >= serial.index);
        if tokio::time::timeout(READ_PATIENCE, shown).await.is_err() {
            // It may be that a client made it up.
            tracing::debug!(channel = %key, %serial, "not shown here");
        }
    }

    /// Follows a channel. `waker` is woken with `slot` whenever there is something to poll for.
    #[must_use]
    pub fn follow(&self, key: ChannelKey, start: Start, waker: Arc<Waker>, slot: u32) -> Started {
        Follower::start(self.cluster.clone(), &self.hub, key, start, waker, slot)
    }

    /// Has tokens count no more, on every node as soon as it hears of it.
    ///
    /// # Errors
    /// `RateLimited` when the app has revoked as much as it may at a time, or its key is gone meanwhile; `Timeout` when
    /// the control group is not reached, and it may or may not have been done.
    pub async fn revoke_tokens(&self, change: control::RevokeTokens) -> Result<(), ErrorInfo> {
        let command = control::entry::Command::RevokeTokens(change);
        let done = self.cluster.command(command).await;
        done.map_err(|err| {
            let code = match err {
                CommandError::Refused(_) => ErrorCode::RateLimited,
                CommandError::Indeterminate => ErrorCode::Timeout,
            };
            ErrorInfo::new(code, err.to_string())
        })
    }
}

/// What only the bridge asks for.
impl Broker {
    /// A view of the registry that changes only when what it shows does.
    pub fn view<T>(
        &self,
        tasks: &Tasks,
        show: impl Fn(&Registry) -> T + Send + 'static,
    ) -> watch::Receiver<Arc<T>>
    where
        T: PartialEq + Send + Sync + 'static,
    {
        let mut registry = self.cluster.registry();
        let first = Arc::new(show(&registry.borrow_and_update()));
        let (view_tx, view) = watch::channel(first);
        tasks.spawn("broker.view", OnError::StopNode, |token| async move {
            loop {
                tokio::select! {
                    () = token.cancelled() => return Ok(()),
                    () = view_tx.closed() => return Ok(()),
                    changed = registry.changed() => changed?,
                }
                let now = show(&registry.borrow_and_update());
                view_tx.send_if_modified(|shown| {
                    let changed = **shown != now;
                    if changed {
                        *shown = Arc::new(now);
                    }
                    changed
                });
            }
        });
        view
    }

    /// Who leads a shard, as it changes.
    #[must_use]
    pub fn leadership(&self, shard: ShardId) -> watch::Receiver<Leadership> {
        self.cluster.leadership(shard)
    }

    #[must_use]
    pub fn shard_of(&self, key: &ChannelKey) -> ShardId {
        self.cluster.shard_of(key)
    }

    /// Newest log index applied on this node, as it grows.
    #[must_use]
    pub fn applied(&self, shard: ShardId) -> watch::Receiver<u64> {
        self.cluster.applied(shard)
    }

    /// The reading side of a bridge, as the registry has it.
    #[must_use]
    pub fn bridge_state(&self, bridge: &str) -> BridgeState {
        let registry = self.cluster.registry();
        let state = registry.borrow().bridges.get(bridge).cloned();
        state.unwrap_or_default()
    }

    /// Makes floors durable. They never sink.
    ///
    /// # Errors
    /// When the slot has another owner by now, or the control group is not reached.
    pub async fn advance_floors(
        &self,
        bridge: &str,
        floors: Vec<control::Floor>,
    ) -> Result<(), CommandError> {
        let bridge = bridge.to_owned();
        let change = control::AdvanceFloors { bridge, floors };
        self.cluster
            .command(control::entry::Command::AdvanceFloors(change))
            .await
    }

    /// Accepted messages of a shard after log index `after`, about `max_bytes` of them.
    ///
    /// # Errors
    /// When the log cannot be read that far back.
    pub async fn read_shard(
        &self,
        shard: ShardId,
        after: u64,
        max_bytes: usize,
    ) -> Result<ShardPage, ErrorInfo> {
        let cluster = self.cluster.clone();
        let read = move || cluster.read_shard(shard, after, max_bytes);
        let page = tokio::task::spawn_blocking(read).await;
        let page = page.map_err(|_| ErrorInfo::from(ErrorCode::Internal))?;
        page.map_err(|err| read_error(err.into()))
    }
}

fn read_error(err: ReadError) -> ErrorInfo {
    let code = match err {
        ReadError::NoLeader => ErrorCode::NoLeader,
        ReadError::Behind => ErrorCode::Busy,
        ReadError::State(channel::ReadError::Rebuilding) => ErrorCode::Busy,
        ReadError::State(_) => ErrorCode::Internal,
        ReadError::Storage(_) => ErrorCode::Internal,
    };
    ErrorInfo::new(code, err.to_string())
}
