//! What a shard's leader does for its log beside publishing: lets time pass, says up to where nobody needs the log,
//! moves the last retained records out of an old stretch so that they do not hold all of it, and has the replicas
//! compare their states.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::cluster::registry::Registry;
use crate::cluster::replica::{self, State};
use crate::raft::{Group, Host};
use crate::types::ShardId;
use crate::wire::entry;

/// How much a shard's log may hold beyond what is retained.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of log that are left alone however little of them is retained.
    pub slack_bytes: u64,
    /// Beyond the slack, the log may be so many times as large as what is retained of it.
    pub slack_ratio: u64,
    /// Bytes of log that a bridge which does not get on may hold.
    pub held_bytes_max: u64,
    /// How often the replicas compare their states.
    pub check_period: Duration,
    /// Pause between two horizons of a shard: each costs every replica a checkpoint.
    pub horizon_pause: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            slack_bytes: 32 << 20,
            slack_ratio: 4,
            held_bytes_max: 4 << 30,
            check_period: Duration::from_secs(30),
            horizon_pause: Duration::from_secs(10),
        }
    }
}

/// Bytes of records moved with one entry, and with one look at the log.
const MOVED_BYTES: usize = 256 << 10;
const MOVED_BYTES_A_LOOK: u64 = 32 << 20;
/// Bytes of log read to find them at a time.
const READ_BYTES: usize = 4 << 20;
/// The node's log may hold so many times the slack of one shard beyond what is retained.
const NODE_SLACK: u64 = 8;
/// How often a shard that nobody publishes to lets time pass.
const AGE: Duration = Duration::from_secs(5);
/// A horizon is worth an entry when it lets go of so many entries, or of a whole segment.
const HORIZON_ENTRIES: u64 = 65_536;
/// How often it is said that bridges hold too much.
const ALARM: Duration = Duration::from_secs(60);

/// What the node's log holds, and what of it is retained: shared by the upkeep of all shards.
#[derive(Debug)]
pub(super) struct Usage {
    host: Host,
    /// Bytes of retained records, by shard.
    live: Vec<AtomicU64>,
}

impl Usage {
    pub(super) fn new(host: Host, shards: u32) -> Self {
        let live = (0..shards).map(|_| AtomicU64::new(0));
        Self {
            host,
            live: live.collect(),
        }
    }

    fn note(&self, shard: ShardId, live_bytes: u64) {
        let at = usize::try_from(shard.0).ok();
        if let Some(live) = at.and_then(|at| self.live.get(at)) {
            live.store(live_bytes, Ordering::Relaxed);
        }
    }

    /// Bytes of retained records of all shards.
    fn live_bytes(&self) -> u64 {
        self.live
            .iter()
            .map(|live| live.load(Ordering::Relaxed))
            .sum()
    }
}

/// How far the shard's log was exported, by bridge. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Exported(Arc<Mutex<BTreeMap<String, u64>>>);

impl Exported {
    /// Everything up to `index` is where the bridge carries it.
    pub(super) fn advance(&self, bridge: &str, index: u64) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = known.entry(bridge.to_owned()).or_insert(index);
        *at = index.max(*at);
    }

    /// Up to where every outbound bridge of the registry has exported; `None` without such bridges.
    fn lowest(&self, registry: &Registry) -> Option<u64> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bridges = registry.bootstrap.as_ref()?.bridges.iter();
        let outbound = bridges.filter(|bridge| bridge.outbound);
        outbound
            .map(|bridge| known.get(&bridge.id).copied().unwrap_or(0))
            .min()
    }
}

/// The upkeep of one shard, on the node that leads it.
pub(super) struct Upkeep {
    pub(super) shard: ShardId,
    pub(super) options: Options,
    pub(super) group: Group,
    pub(super) state: State,
    pub(super) registry: watch::Receiver<Arc<Registry>>,
    pub(super) exported: Exported,
    usage: Arc<Usage>,
    aged: Option<Instant>,
    checked: Option<(Instant, u64)>,
    let_go: Option<Instant>,
    alarmed: Option<Instant>,
}

/// What one look found to be done.
#[derive(Debug, Default)]
pub(super) struct Due {
    pub(super) entry: entry::Entry,
    /// There is more of it: look again at once.
    pub(super) more: bool,
}

impl Upkeep {
    pub(super) fn new(
        shard: ShardId,
        options: Options,
        group: Group,
        state: State,
        registry: watch::Receiver<Arc<Registry>>,
        exported: Exported,
        usage: Arc<Usage>,
    ) -> Self {
        Self {
            shard,
            options,
            group,
            state,
            registry,
            exported,
            usage,
            aged: None,
            checked: None,
            let_go: None,
            alarmed: None,
        }
    }

    /// The entry that is due, without its stamp; `None` when nothing is.
    pub(super) async fn look(&mut self, now_ms: u64, moved_bytes: &mut u64) -> Option<Due> {
        let (time, applied, floor, horizon, live_bytes) = {
            let state = self.state.read();
            let (floor, horizon) = (state.live_floor(), state.horizon());
            let due = state.has_due(now_ms);
            (due, state.applied(), floor, horizon, state.live_bytes())
        };
        let time = self.has_aged(time);
        let mut due = Due::default();
        let held = self.held(floor);
        let to = floor.min(held);
        let frees = self.group.newer_segments() > 0 || to.saturating_sub(horizon) > HORIZON_ENTRIES;
        let pause = self.options.horizon_pause;
        let rested = self.let_go.is_none_or(|at| at.elapsed() >= pause);
        if to > horizon && frees && rested {
            due.entry.horizon = to;
            self.let_go = Some(Instant::now());
        }
        due.entry.check = self.check_is_due(applied);
        let budget = MOVED_BYTES_A_LOOK.saturating_sub(*moved_bytes);
        if held >= floor && budget > 0 && self.is_pinned(live_bytes) {
            due.entry.publishes = self.pinning(floor, applied).await;
            let bytes = due.entry.publishes.iter().map(prost::Message::encoded_len);
            *moved_bytes += bytes.sum::<usize>() as u64;
            due.more = !due.entry.publishes.is_empty();
        }
        let something = due.entry.horizon > 0 || due.entry.check || due.more;
        (something || time).then_some(due)
    }

    /// Little of the log is retained, and it is large: this shard's, or the node's and this shard's oldest entries are in
    /// the older half of its segments.
    fn is_pinned(&self, live_bytes: u64) -> bool {
        let allowed = |live: u64, slack| {
            live.saturating_mul(self.options.slack_ratio)
                .saturating_add(slack)
        };
        if self.group.log_bytes() > allowed(live_bytes, self.options.slack_bytes) {
            return true;
        }
        let node = self.usage.host.log_usage();
        let slack = self.options.slack_bytes.saturating_mul(NODE_SLACK);
        node.bytes_on_disk > allowed(self.usage.live_bytes(), slack)
            && self.group.newer_segments() * 2 > node.segments
    }

    /// Notes how much of the shard is retained here; also where this node only follows.
    pub(super) fn note_usage(&self) {
        self.usage.note(self.shard, self.state.read().live_bytes());
    }

    /// Time alone has changed something, and it was a while ago that this was last looked at.
    fn has_aged(&mut self, due: bool) -> bool {
        let aged = due && self.aged.is_none_or(|at| at.elapsed() >= AGE);
        if aged {
            self.aged = Some(Instant::now());
        }
        aged
    }

    /// Up to where bridges let go.
    fn held(&mut self, floor: u64) -> u64 {
        let registry = self.registry.borrow().clone();
        let Some(lowest) = self.exported.lowest(&registry).filter(|at| *at < floor) else {
            return u64::MAX;
        };
        let bytes = self.group.log_bytes();
        let quiet = (self.alarmed).is_some_and(|at| at.elapsed() < ALARM);
        let beyond = bytes > self.options.held_bytes_max;
        if bytes > self.options.held_bytes_max / 2 && !quiet {
            self.alarmed = Some(Instant::now());
            let (shard, limit) = (self.shard, self.options.held_bytes_max);
            match beyond {
                false => {
                    tracing::warn!(%shard, bytes, limit, "an outbound bridge does not get on and holds the log")
                }
                true => {
                    tracing::error!(%shard, bytes, limit, "an outbound bridge held the log too long: messages are \
                    let go that it has not exported")
                }
            }
        }
        if beyond { u64::MAX } else { lowest }
    }

    fn check_is_due(&mut self, applied: u64) -> bool {
        let due = self.checked.is_none_or(|(at, index)| {
            at.elapsed() >= self.options.check_period && applied > index + 1
        });
        if due {
            self.checked = Some((Instant::now(), applied));
        }
        due
    }

    /// The retained records among the oldest entries, as publishes that move them.
    async fn pinning(&self, floor: u64, applied: u64) -> Vec<entry::Publish> {
        let (group, state) = (self.group.clone(), self.state.clone());
        let found = tokio::task::spawn_blocking(move || {
            replica::find_movable(&group, &state, floor + 1, applied, READ_BYTES, MOVED_BYTES)
        });
        match found.await {
            Ok(Ok(found)) => found,
            Ok(Err(err)) => {
                let shard = self.shard;
                tracing::warn!(%shard, error = %err, "old records cannot be read to be moved");
                Vec::new()
            }
            // The node stops.
            Err(_) => Vec::new(),
        }
    }
}
