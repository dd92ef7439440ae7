//! The real broker as the bridge's upstream.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use crate::bridge::upstream::{Outcome, Publish, PublishError, ShardPage, Upstream};
use crate::broker::{self, Broker};
use crate::tasks::{OnError, Tasks};
use crate::types::{ChannelKey, ErrorCode, ErrorInfo, ShardId};
use crate::wire::control;

/// The broker below the bridge.
#[derive(Debug)]
pub(super) struct Below {
    broker: Broker,
    tasks: Tasks,
    cluster_id: String,
}

impl Below {
    /// The cluster is born: its id is known.
    pub(super) fn new(broker: Broker, tasks: Tasks) -> Self {
        let registry = broker.registry();
        let born = registry.borrow().bootstrap.clone();
        let cluster_id = born.map_or_else(String::new, |born| born.cluster_id.clone());
        Self {
            broker,
            tasks,
            cluster_id,
        }
    }
}

fn replace_if_other<T: PartialEq>(view_tx: &watch::Sender<Arc<T>>, now: T) {
    view_tx.send_if_modified(|shown| {
        let changed = **shown != now;
        if changed {
            *shown = Arc::new(now);
        }
        changed
    });
}

impl Upstream for Below {
    fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    fn bridges(&self) -> watch::Receiver<Arc<Vec<control::Bridge>>> {
        self.broker.view(&self.tasks, |registry| {
            let bootstrap = registry.bootstrap.as_ref();
            bootstrap.map_or_else(Vec::new, |bootstrap| bootstrap.bridges.clone())
        })
    }

    fn slots(&self, bridge: &str) -> watch::Receiver<Arc<BTreeMap<u32, u64>>> {
        let (bridge, node) = (bridge.to_owned(), self.broker.node());
        self.broker.view(&self.tasks, move |registry| {
            let slots = registry
                .bridges
                .get(&bridge)
                .into_iter()
                .flat_map(|state| &state.slots);
            let owned = slots.filter(|(_, at)| at.node == node);
            owned.map(|(slot, at)| (*slot, at.epoch)).collect()
        })
    }

    fn floors(&self, bridge: &str) -> BTreeMap<(String, i32), i64> {
        self.broker.bridge_state(bridge).floors
    }

    fn advance_floors(
        &self,
        bridge: &str,
        floors: Vec<control::Floor>,
    ) -> BoxFuture<'static, Result<(), String>> {
        let (broker, bridge) = (self.broker.clone(), bridge.to_owned());
        Box::pin(async move {
            let advanced = broker.advance_floors(&bridge, floors).await;
            advanced.map_err(|err| err.to_string())
        })
    }

    fn shards(&self) -> u32 {
        u32::try_from(self.broker.shards().len()).unwrap_or(u32::MAX)
    }

    fn shard_of(&self, channel: &ChannelKey) -> ShardId {
        self.broker.shard_of(channel)
    }

    fn publish(&self, publish: Publish) -> BoxFuture<'static, Result<Outcome, PublishError>> {
        let mut source = publish.source;
        if let Some(source) = &mut source {
            source.after = publish.after;
        }
        let published = self.broker.publish(broker::Publish {
            key: publish.key,
            id: publish.id,
            connection_id: String::new(),
            count: publish.count,
            body: publish.body,
            source,
            presence: None,
            ephemeral: false,
        });
        Box::pin(async move {
            match published.outcome().await {
                Ok((Some(serial), false)) => Ok(Outcome::Stored(serial)),
                Ok((None, false)) => {
                    let what = "stored without a serial";
                    Err(PublishError::Indeterminate(ErrorInfo::new(
                        ErrorCode::Internal,
                        what,
                    )))
                }
                Ok((serial, true)) => Ok(Outcome::Duplicate(serial)),
                Err(broker::PublishError::Fenced) => Err(PublishError::Fenced),
                Err(
                    broker::PublishError::Busy(_)
                    | broker::PublishError::Gap
                    // Messages are never too many members.
                    | broker::PublishError::Full,
                ) => {
                    Err(PublishError::Busy)
                }
                Err(broker::PublishError::Indeterminate(info)) => {
                    Err(PublishError::Indeterminate(info))
                }
            }
        })
    }

    fn led_shards(&self) -> watch::Receiver<Arc<BTreeMap<ShardId, u64>>> {
        let (led_tx, led) = watch::channel(Arc::default());
        let broker = self.broker.clone();
        self.tasks
            .spawn("bridge.led", OnError::StopNode, |token| async move {
                let mut leaderships: Vec<_> = broker
                    .shards()
                    .iter()
                    .map(|status| (status.shard, broker.leadership(status.shard)))
                    .collect();
                loop {
                    let known = leaderships.iter_mut().map(|(shard, leadership)| {
                        let known = *leadership.borrow_and_update();
                        (*shard, known)
                    });
                    let led = known.filter(|(_, known)| known.leader == Some(broker.node()));
                    replace_if_other(
                        &led_tx,
                        led.map(|(shard, known)| (shard, known.term)).collect(),
                    );
                    let changes = leaderships
                        .iter_mut()
                        .map(|(_, leadership)| Box::pin(leadership.changed()));
                    tokio::select! {
                        () = token.cancelled() => return Ok(()),
                        () = led_tx.closed() => return Ok(()),
                        (changed, _, _) = futures_util::future::select_all(changes) => changed?,
                    }
                }
            });
        led
    }

    fn applied(&self, shard: ShardId) -> watch::Receiver<u64> {
        self.broker.applied(shard)
    }

    fn read_shard(
        &self,
        shard: ShardId,
        after: u64,
        max_bytes: usize,
    ) -> BoxFuture<'static, Result<ShardPage, String>> {
        let broker = self.broker.clone();
        Box::pin(async move {
            let page = broker.read_shard(shard, after, max_bytes).await;
            let page = page.map_err(|err| err.to_string())?;
            Ok(ShardPage {
                records: page.records,
                through: page.through,
                incarnation: page.incarnation,
            })
        })
    }

    fn exported(&self, shard: ShardId, bridge: &str, index: u64) {
        self.broker.cluster().exported(shard, bridge, index);
    }
}
