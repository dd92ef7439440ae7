//! What the bridge needs of the broker below it, as a trait, so that everything here is tested without a cluster.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::types::{ChannelKey, ErrorInfo, Serial, ShardId};
use crate::wire::{control, entry};

/// The broker, as the bridge sees it.
pub trait Upstream: Send + Sync + 'static {
    /// Written into `firth-origin`; names the cursor topics and transactional ids. Never changes.
    fn cluster_id(&self) -> &str;

    /// The configured bridges, changing.
    fn bridges(&self) -> watch::Receiver<Arc<Vec<control::Bridge>>>;

    /// Slots of this bridge's partitions that this node owns now, each with its epoch.
    fn slots(&self, bridge: &str) -> watch::Receiver<Arc<BTreeMap<u32, u64>>>;

    /// The durable floor of each (topic, partition): every record below it is in its channel.
    fn floors(&self, bridge: &str) -> BTreeMap<(String, i32), i64>;

    /// Makes floors durable; they never move backwards. A floor whose epoch is not its slot's present one is ignored
    /// without holding back the others of the same call.
    ///
    /// # Errors
    /// A reason for the log; the bridge offers the (by then higher) floors again later.
    fn advance_floors(
        &self,
        bridge: &str,
        floors: Vec<control::Floor>,
    ) -> BoxFuture<'static, Result<(), String>>;

    /// How many shards the cluster has, for its whole life.
    fn shards(&self) -> u32;

    /// The shard a channel belongs to, for the cluster's whole life.
    fn shard_of(&self, channel: &ChannelKey) -> ShardId;

    /// Stores one record. Submission order is call order per shard. Resolves when the outcome is durable on a
    /// majority. Retries leader changes itself; a lost outcome is resolved by its own idempotent retry.
    ///
    /// The replicated state must keep the highest (epoch, offset) per (bridge, topic, partition) and, for a publish
    /// with a source, in this order: answer [`PublishError::Fenced`] to an epoch older than the highest; answer
    /// [`Outcome::Duplicate`] to an offset at or below the highest; answer [`PublishError::Busy`] and store nothing
    /// when [`Publish::after`] is set and the highest offset is below it.
    fn publish(&self, publish: Publish) -> BoxFuture<'static, Result<Outcome, PublishError>>;

    /// Shards this node leads now, each with its term.
    fn led_shards(&self) -> watch::Receiver<Arc<BTreeMap<ShardId, u64>>>;

    /// The shard's highest applied log index on this node, changing.
    fn applied(&self, shard: ShardId) -> watch::Receiver<u64>;

    /// Accepted (non-duplicate) records of the shard with log index > `after`, applied ones only, about `max_bytes`,
    /// in log order, whole entries only. `after` 0 is where a new bridge begins: at the oldest record that is held.
    ///
    /// # Errors
    /// When the log cannot be read, or records after an `after` above 0 are no longer held: never a page with a hole.
    fn read_shard(
        &self,
        shard: ShardId,
        after: u64,
        max_bytes: usize,
    ) -> BoxFuture<'static, Result<ShardPage, String>>;

    /// Kafka durably has everything of the shard's log up to `index`: the log need not be kept for this bridge.
    fn exported(&self, shard: ShardId, bridge: &str, index: u64);
}

/// One record to store.
#[derive(Clone, Debug, PartialEq)]
pub struct Publish {
    pub key: ChannelKey,
    /// Idempotency key, unique per channel.
    pub id: String,
    /// Messages in `body`.
    pub count: u32,
    /// An encoded [`entry::Body`].
    pub body: Bytes,
    pub source: Option<entry::Source>,
    /// The offset of the same partition's record submitted to the same shard just before this one. The state stores
    /// this record only if it has that one: a refused record in the middle of a pipeline can then never be overtaken
    /// by its successor, whose higher offset would turn the retry into a "duplicate" and lose it.
    pub after: Option<i64>,
}

/// A publish that is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Stored(Serial),
    /// It had been stored before, there where that is still known.
    Duplicate(Option<Serial>),
}

/// A publish that is not known to be durable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Nothing was stored and never will be.
    #[error("refused: {0}")]
    Refused(ErrorInfo),
    /// The partition belongs to an owner with a newer epoch; nothing was stored.
    #[error("fenced by a newer owner")]
    Fenced,
    /// Nothing was stored; the same publish may work later.
    #[error("busy")]
    Busy,
    /// It may have been stored, or may be stored yet.
    #[error("outcome unknown: {0}")]
    Indeterminate(ErrorInfo),
}

/// Part of a shard's log.
#[derive(Clone, Debug, Default)]
pub struct ShardPage {
    /// Serial, stamp in milliseconds since 1970, and the record.
    pub records: Vec<(Serial, u64, entry::Publish)>,
    /// The log index the page is complete through.
    pub through: u64,
    /// What serials of the shard begin with.
    pub incarnation: u16,
}
