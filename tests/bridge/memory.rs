//! A cluster in memory: the replicated state the bridge's contract demands, seen by several nodes, with faults.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use firth::bridge::{Outcome, Publish, PublishError, ShardPage, Upstream};
use firth::types::{ChannelKey, ErrorCode, ErrorInfo, Serial, ShardId};
use firth::wire::{control, entry};
use futures_util::future::BoxFuture;
use prost::Message as _;
use tokio::sync::watch;

pub(crate) const SHARDS: u32 = 4;

#[derive(Default)]
struct Shard {
    log: Vec<(Serial, u64, entry::Publish)>,
    /// Highest epoch and offset per (bridge, topic, partition).
    sources: BTreeMap<(String, String, i32), (u64, i64)>,
}

/// What all nodes share.
pub(crate) struct Cluster {
    id: String,
    shards: Mutex<Vec<Shard>>,
    applied: Vec<watch::Sender<u64>>,
    floors: Mutex<BTreeMap<(String, i32), i64>>,
    bridges: watch::Sender<Arc<Vec<control::Bridge>>>,
    publishes: AtomicU64,
    /// Every so many publishes fail in one of the ways the contract allows; 0 for never.
    pub(crate) faults: AtomicU64,
}

/// One node's view.
pub(crate) struct Node {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) slots: watch::Sender<Arc<BTreeMap<u32, u64>>>,
    pub(crate) led: watch::Sender<Arc<BTreeMap<ShardId, u64>>>,
}

impl Cluster {
    pub(crate) fn new(id: &str, bridge: control::Bridge) -> Arc<Self> {
        Arc::new(Self {
            id: id.to_owned(),
            shards: Mutex::new((0..SHARDS).map(|_| Shard::default()).collect()),
            applied: (0..SHARDS).map(|_| watch::channel(0).0).collect(),
            floors: Mutex::default(),
            bridges: watch::channel(Arc::new(vec![bridge])).0,
            publishes: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        })
    }

    pub(crate) fn node(self: &Arc<Self>) -> Arc<Node> {
        Arc::new(Node {
            cluster: self.clone(),
            slots: watch::channel(Arc::default()).0,
            led: watch::channel(Arc::default()).0,
        })
    }

    /// A client publishes one text.
    pub(crate) fn client_publish(&self, channel: &str, id: &str, text: &str) {
        let message = entry::Message {
            data: Some(entry::message::Data::Text(text.to_owned())),
            ..Default::default()
        };
        let body = entry::Body {
            version: entry::VERSION,
            messages: vec![message],
        };
        let publish = entry::Publish {
            app: "app".into(),
            channel: channel.into(),
            id: id.into(),
            count: 1,
            body: body.encode_to_vec().into(),
            ..Default::default()
        };
        self.append(shard_of("app", channel), publish);
    }

    fn append(&self, shard: ShardId, publish: entry::Publish) -> Serial {
        let at = shard.0 as usize;
        let mut shards = self.shards.lock().unwrap();
        let log = &mut shards[at].log;
        let index = log.len() as u64 + 1;
        let serial = Serial {
            incarnation: 1,
            index,
            position: 0,
        };
        log.push((serial, index, publish));
        self.applied[at].send_replace(index);
        serial
    }

    fn apply(&self, publish: Publish) -> Result<Outcome, PublishError> {
        let shard = shard_of(publish.key.app.as_str(), publish.key.name.as_str());
        if let Some(source) = &publish.source {
            let key = (
                source.bridge.clone(),
                source.topic.clone(),
                source.partition,
            );
            let mut shards = self.shards.lock().unwrap();
            let sources = &mut shards[shard.0 as usize].sources;
            let highest = sources.get(&key).copied();
            if highest.is_some_and(|(epoch, _)| source.epoch < epoch) {
                return Err(PublishError::Fenced);
            }
            if let Some((_, offset)) = highest
                && source.offset <= offset
            {
                sources.insert(key, (source.epoch, offset));
                return Ok(Outcome::Duplicate(None));
            }
            let stored = highest.map_or(-1, |(_, offset)| offset);
            if publish.after.is_some_and(|after| stored < after) {
                return Err(PublishError::Busy);
            }
            sources.insert(key, (source.epoch, source.offset));
        }
        let stored = entry::Publish {
            app: publish.key.app.to_string(),
            channel: publish.key.name.to_string(),
            id: publish.id,
            count: publish.count,
            body: publish.body,
            source: publish.source,
            ..Default::default()
        };
        Ok(Outcome::Stored(self.append(shard, stored)))
    }

    /// Data of every message of a channel, in order; `None` for a message without data.
    pub(crate) fn channel(&self, channel: &str) -> Vec<Option<Bytes>> {
        let messages = self.messages(channel).into_iter();
        let data = messages.map(|m| {
            m.data.map(|data| match data {
                entry::message::Data::Text(text) => text.into(),
                entry::message::Data::Binary(binary) => binary,
            })
        });
        data.collect()
    }

    pub(crate) fn messages(&self, channel: &str) -> Vec<entry::Message> {
        let shards = self.shards.lock().unwrap();
        let log = &shards[shard_of("app", channel).0 as usize].log;
        let records = log.iter().filter(|(.., p)| p.channel == channel);
        records
            .flat_map(|(.., p)| entry::Body::decode(p.body.clone()).unwrap().messages)
            .collect()
    }

    /// Records in all channels of a topic.
    pub(crate) fn count(&self, topic: &str) -> usize {
        let shards = self.shards.lock().unwrap();
        let path = format!("/{topic}/");
        let all = shards.iter().flat_map(|s| &s.log);
        all.filter(|(.., p)| p.channel.starts_with(&path)).count()
    }

    pub(crate) fn floor(&self, topic: &str, partition: i32) -> Option<i64> {
        self.floors
            .lock()
            .unwrap()
            .get(&(topic.to_owned(), partition))
            .copied()
    }
}

impl Node {
    pub(crate) fn own_all_slots(&self, epoch: u64) {
        let slots = (0..firth::bridge::SLOTS).map(|slot| (slot, epoch));
        self.slots.send_replace(Arc::new(slots.collect()));
    }

    pub(crate) fn lead_all_shards(&self, term: u64) {
        let led = (0..SHARDS).map(|shard| (ShardId(shard), term));
        self.led.send_replace(Arc::new(led.collect()));
    }

    pub(crate) fn retire(&self) {
        self.slots.send_replace(Arc::default());
        self.led.send_replace(Arc::default());
    }
}

pub(crate) fn shard_of(app: &str, channel: &str) -> ShardId {
    let hash = firth::stdx::stable_hash(&[app.as_bytes(), channel.as_bytes()]);
    ShardId(u32::try_from(hash % u64::from(SHARDS)).unwrap())
}

impl Upstream for Node {
    fn cluster_id(&self) -> &str {
        &self.cluster.id
    }

    fn bridges(&self) -> watch::Receiver<Arc<Vec<control::Bridge>>> {
        self.cluster.bridges.subscribe()
    }

    fn slots(&self, _bridge: &str) -> watch::Receiver<Arc<BTreeMap<u32, u64>>> {
        self.slots.subscribe()
    }

    fn floors(&self, _bridge: &str) -> BTreeMap<(String, i32), i64> {
        self.cluster.floors.lock().unwrap().clone()
    }

    fn advance_floors(
        &self,
        _bridge: &str,
        floors: Vec<control::Floor>,
    ) -> BoxFuture<'static, Result<(), String>> {
        let mut durable = self.cluster.floors.lock().unwrap();
        for floor in floors {
            let old = durable.entry((floor.topic, floor.partition)).or_default();
            *old = floor.offset.max(*old);
        }
        Box::pin(std::future::ready(Ok(())))
    }

    fn shards(&self) -> u32 {
        SHARDS
    }

    fn exported(&self, _: ShardId, _: &str, _: u64) {}

    fn shard_of(&self, channel: &ChannelKey) -> ShardId {
        shard_of(channel.app.as_str(), channel.name.as_str())
    }

    /// Applied when called, so in order; answered a little later. Some fail: not stored, or stored and not known.
    fn publish(&self, publish: Publish) -> BoxFuture<'static, Result<Outcome, PublishError>> {
        let nth = self.cluster.publishes.fetch_add(1, Ordering::Relaxed) + 1;
        let every = self.cluster.faults.load(Ordering::Relaxed);
        let kind = (every > 0 && nth.is_multiple_of(every)).then(|| nth / every % 4);
        let lost = Err(PublishError::Indeterminate(ErrorInfo::from(
            ErrorCode::Timeout,
        )));
        let outcome = match kind {
            Some(0) => Err(PublishError::Busy),
            Some(1) => lost,
            Some(2) => {
                let _ = self.cluster.apply(publish);
                lost
            }
            Some(_) => Err(PublishError::Refused(ErrorCode::NoLeader.into())),
            None => self.cluster.apply(publish),
        };
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(nth % 5)).await;
            outcome
        })
    }

    fn led_shards(&self) -> watch::Receiver<Arc<BTreeMap<ShardId, u64>>> {
        self.led.subscribe()
    }

    fn applied(&self, shard: ShardId) -> watch::Receiver<u64> {
        self.cluster.applied[shard.0 as usize].subscribe()
    }

    fn read_shard(
        &self,
        shard: ShardId,
        after: u64,
        max_bytes: usize,
    ) -> BoxFuture<'static, Result<ShardPage, String>> {
        let shards = self.cluster.shards.lock().unwrap();
        let log = &shards[shard.0 as usize].log;
        let mut page = ShardPage {
            incarnation: 1,
            through: after,
            ..Default::default()
        };
        let mut bytes = 0;
        for record in log.iter().filter(|(serial, ..)| serial.index > after) {
            if bytes >= max_bytes {
                break;
            }
            bytes += record.2.body.len();
            page.through = record.0.index;
            page.records.push(record.clone());
        }
        Box::pin(std::future::ready(Ok(page)))
    }
}
