//! Members whose node is gone: every node says each second that its process lives, and each shard's leader lets go of the
//! members whose process was not heard for too long.
//!
//! Nothing here decides who is present. A leave is an ordinary publish that counts only while the process that is
//! believed dead still attends the connection: two leaders, or one that is wrong, make at most one leave, and none of a
//! connection that came back elsewhere.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::channel::{Attendant, Attended, Member, Outcome};
use crate::cluster::Cluster;
use crate::tasks::{OnError, Tasks};
use crate::transport::{Lane, Service};
use crate::types::{GroupId, NodeId, ShardId};
use crate::wire::{body, control, entry, peer};

const ATTENDING: Service = Service(24);

/// How often a node says that its process lives, and a leader looks for those who do not.
const PERIOD: Duration = Duration::from_secs(1);
/// How long telling a node may take.
const TELL: Duration = Duration::from_secs(1);
/// A process that was not heard for so long is dead: what a client has to come back in.
const DEAD_AFTER: Duration = Duration::from_secs(15);
/// A process that was replaced is remembered for so long; longer than it takes to be dead.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Connections whose members leave at a time.
const CONNECTIONS: usize = 256;
/// Members of one connection that leave with one record, and about the bytes of their data.
const LEAVES: usize = 100;
const LEAVES_BYTES: usize = 64 << 10;

/// Since when a process is heard, and when it was heard last.
#[derive(Clone, Copy, Debug)]
struct Heard {
    first: Instant,
    last: Instant,
}

/// Which processes live, as this node hears it.
#[derive(Debug, Default)]
pub(super) struct Pulses(Mutex<BTreeMap<Attendant, Heard>>);

impl Pulses {
    fn hear(&self, by: Attendant, now: Instant) {
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = Heard {
            first: now,
            last: now,
        };
        heard.entry(by).or_insert(first).last = now;
        heard.retain(|other, heard| {
            let replaced = other.node == by.node && other.boot != by.boot;
            !replaced || now - heard.last < REMEMBERED
        });
    }

    /// Whether the process is gone: it was not heard for long, in which this node led and would have acted on it; or
    /// its node has had another process for as long.
    fn is_dead(&self, by: Attendant, led_since: Instant, now: Instant) -> bool {
        let heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = heard.get(&by).map_or(led_since, |heard| heard.last);
        if now - last.max(led_since) >= DEAD_AFTER {
            return true;
        }
        let mut replaced = (heard.iter()).filter(|(other, _)| other.node == by.node);
        replaced.any(|(other, heard)| {
            other.boot != by.boot && now - heard.first >= DEAD_AFTER && heard.last > last
        })
    }
}

pub(super) fn start(cluster: &Cluster, tasks: &Tasks) {
    let this = cluster.clone();
    let handler = move |from: NodeId, _: GroupId, body: Bytes| {
        let heard = peer::Attending::decode(body).map_err(|err| err.to_string());
        let heard = heard.map(|pulse| {
            let by = Attendant {
                node: from.0,
                boot: pulse.boot,
            };
            this.0.pulses.hear(by, Instant::now());
            peer::AttendingResponse {}.encode_to_vec().into()
        });
        async { heard }
    };
    cluster.0.transport.register(ATTENDING, Arc::new(handler));
    let this = cluster.clone();
    tasks.spawn("cluster.attending", OnError::StopNode, |token| async move {
        let mut tick = tokio::time::interval(PERIOD);
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                _ = tick.tick() => this.say_attending().await,
            }
        }
    });
    for shard in cluster.shards() {
        let this = cluster.clone();
        tasks.spawn("cluster.sweep", OnError::StopNode, |token| {
            this.sweep(shard, token)
        });
    }
}

impl Cluster {
    /// The random number that this process drew at its start: tells it from every other of this node.
    #[must_use]
    pub fn boot(&self) -> u64 {
        self.0.boot
    }

    /// This process.
    #[must_use]
    pub fn attendant(&self) -> Attendant {
        Attendant {
            node: self.node().0,
            boot: self.boot(),
        }
    }

    async fn say_attending(&self) {
        self.0.pulses.hear(self.attendant(), Instant::now());
        let others = self.nodes().keys().filter(|node| **node != self.node());
        let told = others.map(|node| {
            let body = peer::Attending { boot: self.boot() };
            let body = body.encode_to_vec().into();
            let (transport, group) = (&self.0.transport, GroupId::CONTROL);
            transport.call(*node, Lane::Raft, ATTENDING, group, body, TELL)
        });
        // Who does not hear it hears the next one.
        futures_util::future::join_all(told).await;
    }

    /// Lets go of members of dead processes while this node leads the shard.
    async fn sweep(self, shard: ShardId, token: CancellationToken) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(PERIOD);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // The term in which this node leads, and since when.
        let mut led: Option<(u64, Instant)> = None;
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                _ = tick.tick() => {}
            }
            let known = *self.leadership(shard).borrow();
            if known.leader != Some(self.node()) {
                led = None;
                continue;
            }
            let same = led.filter(|(term, _)| *term == known.term);
            let (_, since) = *led.insert(same.unwrap_or((known.term, Instant::now())));
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                () = self.let_go_of_dead(shard, since) => {}
            }
        }
    }

    async fn let_go_of_dead(&self, shard: ShardId, led_since: Instant) {
        let now = Instant::now();
        let attendants: Vec<_> = self.state(shard).attendants().collect();
        let dead = attendants
            .into_iter()
            .filter(|by| *by != self.attendant() && self.0.pulses.is_dead(*by, led_since, now));
        for by in dead {
            loop {
                let attended = self.state(shard).attended(by, CONNECTIONS);
                if attended.is_empty() {
                    break;
                }
                let left = self.let_go(shard, by, attended).await;
                tracing::info!(%shard, node = by.node, members = left, "members of a dead node leave");
                // Nothing went through, or others were faster: the next look tells.
                if left == 0 {
                    break;
                }
            }
        }
    }

    /// Up to `limit` connections on channels that the log says this process attends, of those that `filter` takes.
    #[must_use]
    pub fn attended_here(&self, filter: impl Fn(&str) -> bool, limit: usize) -> Vec<Attended> {
        let mut found = Vec::new();
        for shard in self.shards() {
            let left = limit - found.len();
            let attended = (self.state(shard)).attended_where(self.attendant(), &filter, left);
            found.extend(attended);
        }
        found
    }

    /// Has these members leave, unless another process attends them by now. How many left.
    pub async fn let_go_here(&self, attended: Vec<Attended>) -> usize {
        let mut by_shard: BTreeMap<ShardId, Vec<Attended>> = BTreeMap::new();
        for attended in attended {
            let shard = self.shard_of(&attended.key);
            by_shard.entry(shard).or_default().push(attended);
        }
        let mut left = 0;
        for (shard, attended) in by_shard {
            left += self.let_go(shard, self.attendant(), attended).await;
        }
        left
    }

    /// Proposes leaves for these members, and waits for what becomes of them. How many members left.
    async fn let_go(&self, shard: ShardId, by: Attendant, attended: Vec<Attended>) -> usize {
        let mut submitted = Vec::new();
        for attended in &attended {
            let rule = self.registry().borrow().rule(&attended.key);
            for members in pages(&attended.members) {
                let Some(publish) = leave(by, attended, members, &rule) else {
                    continue;
                };
                match self.submit(shard, publish) {
                    Ok(outcome) => submitted.push((members.len(), outcome)),
                    // Too much waits; there is another look.
                    Err(_) => break,
                }
            }
        }
        let mut left = 0;
        for (members, outcome) in submitted {
            if let Ok(Ok(Outcome::Stored(_))) = outcome.await {
                left += members;
            }
        }
        left
    }
}

/// Members of one connection in parts that fit a record.
fn pages(mut members: &[Member]) -> Vec<&[Member]> {
    let mut pages = Vec::new();
    while !members.is_empty() {
        let mut bytes = 0;
        let fits = members.iter().take(LEAVES).take_while(|member| {
            bytes += member.event.len();
            bytes <= LEAVES_BYTES
        });
        let (page, rest) = members.split_at(fits.count().max(1));
        pages.push(page);
        members = rest;
    }
    pages
}

/// The leaves of members that do not leave by themselves. `None` when what is known of them cannot be read, which is said.
fn leave(
    by: Attendant,
    attended: &Attended,
    members: &[Member],
    rule: &control::Namespace,
) -> Option<entry::Publish> {
    let (key, connection_id) = (&attended.key, &attended.connection_id);
    let events = members
        .iter()
        .map(|member| (connection_id.as_str(), &member.event));
    let body = body::encode_leaves(events);
    let body = body.map_err(|err| {
        tracing::error!(channel = %key, %connection_id, error = %err, "a member's last event cannot be read");
    });
    let changes = members.iter().map(|member| entry::Change {
        action: LEAVE,
        client_id: member.client_id.clone(),
        connection_id: connection_id.clone(),
    });
    Some(entry::Publish {
        app: key.app.to_string(),
        channel: key.name.to_string(),
        id: left_id(),
        count: u32::try_from(members.len()).ok()?,
        body: body.ok()?,
        retention_ms: rule.retention_ms,
        retention_bytes: rule.retention_bytes,
        last_only: rule.last_only,
        ephemeral: rule.ephemeral,
        presence: Some(entry::Presence {
            changes: changes.collect(),
            node: by.node,
            boot: by.boot,
            if_attended: true,
            members_max: 0,
        }),
        ..Default::default()
    })
}

const LEAVE: u32 = 3;

/// An id that nobody else gives, and that begins with no connection's: clients then order the leave by its time.
#[must_use]
pub fn left_id() -> String {
    static PREFIX: std::sync::LazyLock<u64> = std::sync::LazyLock::new(random);
    static NUMBERS: AtomicU64 = AtomicU64::new(0);
    let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
    format!("left-{:016x}:{number}", *PREFIX)
}

/// A number that no other process draws.
pub(super) fn random() -> u64 {
    let mut random = [0; 8];
    getrandom::fill(&mut random).expect("the system has randomness once it has booted");
    u64::from_le_bytes(random)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by(node: u64, boot: u64) -> Attendant {
        Attendant { node, boot }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn silence_counts_from_when_somebody_listened() {
        let pulses = Pulses::default();
        let began = Instant::now();
        assert!(!pulses.is_dead(by(1, 1), began, began + 14 * SECOND));
        assert!(
            pulses.is_dead(by(1, 1), began, began + DEAD_AFTER),
            "never heard"
        );
        pulses.hear(by(1, 1), began + 5 * SECOND);
        assert!(!pulses.is_dead(by(1, 1), began, began + 19 * SECOND));
        assert!(pulses.is_dead(by(1, 1), began, began + 20 * SECOND));
        let leads = began + 10 * SECOND;
        assert!(
            !pulses.is_dead(by(1, 1), leads, began + 24 * SECOND),
            "just leads"
        );
        assert!(pulses.is_dead(by(1, 1), leads, began + 25 * SECOND));
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_was_replaced_is_dead_though_the_leader_is_new() {
        let pulses = Pulses::default();
        let began = Instant::now();
        pulses.hear(by(1, 1), began);
        for second in 2..=17 {
            pulses.hear(by(1, 2), began + second * SECOND);
        }
        let now = began + 17 * SECOND;
        assert!(pulses.is_dead(by(1, 1), now, now));
        assert!(!pulses.is_dead(by(1, 2), now, now));
        assert!(!pulses.is_dead(by(2, 1), now, now), "another node's");
        pulses.hear(by(1, 2), began + 70 * SECOND);
        let heard = pulses.0.lock().unwrap();
        assert!(!heard.contains_key(&by(1, 1)), "and is forgotten");
    }

    #[test]
    fn leaves_go_in_parts_that_fit_a_record() {
        let member = |bytes: usize| Member {
            connection_id: "c".into(),
            client_id: "me".into(),
            event: vec![0; bytes].into(),
            id: "c:0".into(),
            offset: 0,
            serial: crate::types::Serial::default(),
            stamp_ms: 0,
        };
        let sizes =
            |members: &[Member]| pages(members).iter().map(|it| it.len()).collect::<Vec<_>>();
        assert_eq!(sizes(&vec![member(10); 250]), [100, 100, 50]);
        assert_eq!(sizes(&vec![member(LEAVES_BYTES); 3]), [1, 1, 1]);
        assert_eq!(sizes(&vec![member(LEAVES_BYTES + 1); 2]), [1, 1]);
        assert_eq!(sizes(&vec![member(LEAVES_BYTES / 2); 5]), [2, 2, 1]);
        assert!(pages(&[]).is_empty());
    }

    #[test]
    fn no_two_leaves_have_the_same_id() {
        assert_ne!(left_id(), left_id());
        assert!(left_id().starts_with("left-"));
    }
}
