//! The live end of channels that someone follows on this node: recent records, encoded once, and whom to wake.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};

use bytes::Bytes;

use crate::broker::follow::Follow;
use crate::channel::{Event, RecordRef};
use crate::cluster::{EventSink, StoredRecord};
use crate::stdx::stable_hash;
use crate::types::{ChannelKey, Serial, ShardId};
use crate::wire::ably::{self, Format};
use crate::wire::{body, entry};

/// Feeds are spread over this many locks.
const STRIPES: usize = 64;
/// What a record costs beside its body and the frames made of it, about.
const RECORD_BYTES: usize = 1024;
/// Bytes of recent records a feed keeps; a follower further behind reads the log.
const TAIL_BYTES: usize = 512 * 1024;

/// One record of a channel, with the frames that carry it to subscribers. Each is encoded once for all of them.
#[derive(Debug)]
pub struct Record {
    pub at: RecordRef,
    pub publish: entry::Publish,
    json: OnceLock<Bytes>,
    msgpack: OnceLock<Bytes>,
}

impl Record {
    /// The body is copied: as it comes, it is a slice that would keep its whole Raft entry in memory.
    fn new(at: RecordRef, mut publish: entry::Publish) -> Self {
        publish.body = Bytes::copy_from_slice(&publish.body);
        Self {
            at,
            publish,
            json: OnceLock::new(),
            msgpack: OnceLock::new(),
        }
    }

    /// Bytes it may hold once both frames are made, about.
    fn cost(&self) -> usize {
        RECORD_BYTES + 4 * self.publish.body.len()
    }

    /// Whether it holds presence events, not messages.
    #[must_use]
    pub const fn is_presence(&self) -> bool {
        self.at.presence
    }

    /// The MESSAGE frame in this format, or the PRESENCE frame. Empty when the stored body cannot be read: then it is logged, and there is
    /// nothing that could be sent.
    pub fn frame(&self, format: Format) -> &Bytes {
        let frame = match format {
            Format::Json => &self.json,
            Format::MsgPack => &self.msgpack,
        };
        frame.get_or_init(|| self.frame_as(&self.publish.channel, format))
    }

    /// The same for a client that knows the channel by this name. Not kept.
    #[must_use]
    pub fn frame_as(&self, name: &str, format: Format) -> Bytes {
        let (serial, stamp_ms) = (self.at.serial, self.at.stamp_ms);
        let frame = match self.is_presence() {
            true => body::presence_frame,
            false => body::record_frame,
        };
        match frame(name, serial, &self.publish, stamp_ms) {
            Ok(frame) => ably::encode(format, &frame),
            Err(err) => {
                tracing::error!(%serial, error = %err, "a stored body cannot be read");
                Bytes::new()
            }
        }
    }
}

impl From<StoredRecord> for Record {
    fn from(stored: StoredRecord) -> Self {
        Self::new(stored.at, stored.publish)
    }
}

/// Recent records of one channel, oldest first, without a gap among them.
#[derive(Debug, Default)]
pub(super) struct Tail {
    records: VecDeque<Arc<Record>>,
    bytes: usize,
    /// The newest record that no longer fits.
    evicted: Option<Serial>,
}

impl Tail {
    fn push(&mut self, record: Arc<Record>) {
        self.bytes += record.cost();
        self.records.push_back(record);
        while self.bytes > TAIL_BYTES && self.records.len() > 1 {
            if let Some(oldest) = self.records.pop_front() {
                self.bytes -= oldest.cost();
                self.evicted = Some(oldest.at.serial);
            }
        }
    }

    /// Records up to `at` may be missing here.
    fn forget(&mut self, at: Serial) {
        self.records.clear();
        self.bytes = 0;
        self.evicted = self.evicted.max(Some(at));
    }

    /// Up to `limit` records after `cursor`; `None` when something between it and the tail is missing. A follower that
    /// had everything since it joined has missed only what was evicted; for any other the records' links to their
    /// predecessors are the proof.
    pub(super) fn after(
        &self,
        cursor: Serial,
        since_join: bool,
        limit: usize,
    ) -> Option<Vec<Arc<Record>>> {
        let start = self
            .records
            .partition_point(|record| record.at.serial <= cursor);
        let nothing_evicted = self.evicted.is_none_or(|evicted| evicted <= cursor);
        let Some(first) = self.records.get(start) else {
            return nothing_evicted.then(Vec::new);
        };
        let complete = since_join && nothing_evicted;
        let linked = (first.at.predecessor).is_none_or(|before| before <= cursor);
        let gapless = complete || linked;
        gapless.then(|| {
            self.records
                .iter()
                .skip(start)
                .take(limit)
                .cloned()
                .collect()
        })
    }
}

/// A channel that someone follows on this node.
#[derive(Debug, Default)]
pub(super) struct Feed {
    tail: Mutex<Tail>,
    /// By number: a crowd that leaves at once finds each of its own at once.
    followers: Mutex<HashMap<u64, Arc<Follow>>>,
}

impl Feed {
    pub(super) fn tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(|err| err.into_inner())
    }

    fn followers(&self) -> MutexGuard<'_, HashMap<u64, Arc<Follow>>> {
        self.followers.lock().unwrap_or_else(|err| err.into_inner())
    }
}

type Stripe = RwLock<HashMap<ChannelKey, Arc<Feed>>>;

/// All followed channels of this node.
///
/// Invariant: a channel has a feed exactly while it has a follower, so what nobody follows costs nothing.
#[derive(Debug)]
pub struct Hub {
    stripes: Vec<Stripe>,
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            stripes: (0..STRIPES).map(|_| Stripe::default()).collect(),
        }
    }
}

impl Hub {
    pub(super) fn join(&self, key: &ChannelKey, follow: Arc<Follow>) -> Arc<Feed> {
        let mut stripe = self
            .stripe(key)
            .write()
            .unwrap_or_else(|err| err.into_inner());
        let feed = stripe.entry(key.clone()).or_default().clone();
        feed.followers().insert(follow.number(), follow);
        feed
    }

    pub(super) fn leave(&self, key: &ChannelKey, follow: &Follow) {
        let mut stripe = self
            .stripe(key)
            .write()
            .unwrap_or_else(|err| err.into_inner());
        let Some(feed) = stripe.get(key) else { return };
        let mut followers = feed.followers();
        followers.remove(&follow.number());
        let empty = followers.is_empty();
        drop(followers);
        if empty {
            stripe.remove(key);
        }
    }

    fn stripe(&self, key: &ChannelKey) -> &Stripe {
        let hash = stable_hash(&[key.app.as_str().as_bytes(), key.name.as_str().as_bytes()]);
        // The shard took the low bits.
        let at = usize::try_from(hash >> 32).unwrap_or(0) % STRIPES;
        &self.stripes[at]
    }
}

impl EventSink for Hub {
    fn advanced(&self, _: ShardId, events: Vec<Event>) {
        for event in events {
            let stripe = self
                .stripe(&event.key)
                .read()
                .unwrap_or_else(|err| err.into_inner());
            let Some(feed) = stripe.get(&event.key) else {
                continue;
            };
            feed.tail()
                .push(Arc::new(Record::new(event.record, event.publish)));
            feed.followers().values().for_each(|follow| follow.wake());
        }
    }

    /// Rare, so every feed is asked to look at the log again; those of other shards find nothing new there.
    fn replaced(&self, _: ShardId, at: Serial) {
        for stripe in &self.stripes {
            let stripe = stripe.read().unwrap_or_else(|err| err.into_inner());
            for feed in stripe.values() {
                feed.tail().forget(at);
                feed.followers().values().for_each(|follow| follow.wake());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::Place;

    fn at(index: u64) -> Serial {
        Serial {
            incarnation: 1,
            index,
            position: 0,
        }
    }

    fn record(index: u64, predecessor: Option<u64>, bytes: usize) -> Arc<Record> {
        let at = RecordRef {
            serial: at(index),
            place: Place { index, position: 0 },
            predecessor: predecessor.map(at),
            stamp_ms: 0,
            count: 1,
            presence: false,
        };
        let publish = entry::Publish {
            body: vec![0; bytes].into(),
            ..Default::default()
        };
        Arc::new(Record::new(at, publish))
    }

    fn indexes(records: Option<Vec<Arc<Record>>>) -> Option<Vec<u64>> {
        records.map(|records| {
            records
                .iter()
                .map(|record| record.at.serial.index)
                .collect()
        })
    }

    #[test]
    fn a_tail_serves_only_who_it_has_everything_for() {
        let mut tail = Tail::default();
        assert_eq!(indexes(tail.after(at(0), false, 9)), Some(vec![]));
        tail.push(record(5, Some(3), 1));
        tail.push(record(8, Some(5), 1));
        assert_eq!(indexes(tail.after(at(2), false, 9)), None, "3 is missing");
        assert_eq!(indexes(tail.after(at(3), false, 9)), Some(vec![5, 8]));
        assert_eq!(indexes(tail.after(at(4), false, 1)), Some(vec![5]));
        assert_eq!(indexes(tail.after(at(8), false, 9)), Some(vec![]));
    }

    #[test]
    fn who_was_there_all_along_needs_no_link() {
        let mut tail = Tail::default();
        tail.push(record(50, Some(40), 1));
        assert_eq!(indexes(tail.after(at(2), false, 9)), None);
        assert_eq!(indexes(tail.after(at(2), true, 9)), Some(vec![50]));
        for index in 51..100 {
            tail.push(record(index, Some(index - 1), TAIL_BYTES / 16));
        }
        assert_eq!(
            indexes(tail.after(at(2), true, 9)),
            None,
            "evicted meanwhile"
        );
    }

    #[test]
    fn a_tail_that_was_forgotten_serves_nobody_before_it() {
        let mut tail = Tail::default();
        tail.push(record(5, Some(3), 1));
        tail.forget(at(9));
        assert_eq!(indexes(tail.after(at(5), true, 9)), None);
        assert_eq!(indexes(tail.after(at(9), true, 9)), Some(vec![]));
        tail.push(record(12, Some(5), 1));
        assert_eq!(
            indexes(tail.after(at(5), true, 9)),
            Some(vec![12]),
            "linked"
        );
        assert_eq!(indexes(tail.after(at(4), true, 9)), None);
    }

    #[test]
    fn a_tail_is_bounded_by_bytes() {
        let mut tail = Tail::default();
        for index in 1..100 {
            tail.push(record(
                index,
                Some(index - 1),
                TAIL_BYTES / 16 - RECORD_BYTES / 4,
            ));
        }
        assert_eq!(
            indexes(tail.after(at(95), false, 9)),
            Some(vec![96, 97, 98, 99])
        );
        assert_eq!(indexes(tail.after(at(94), false, 9)), None);
    }
}
