//! What happens to the shards: random entries, checkpoints, restarts and rebuilds.

use proptest::prelude::*;

use super::gathering::{self, Event};
use super::{CHANNELS, MINUTE};

#[derive(Clone, Debug)]
pub(super) struct Post {
    pub(super) channel: u8,
    pub(super) id: u8,
    /// 0: an id of the publisher's; 1: numbered by the connection; 2: from Kafka.
    pub(super) kind: u8,
    pub(super) epoch: u64,
    pub(super) offset: i64,
    pub(super) after: Option<i64>,
    pub(super) class: u8,
    pub(super) bytes: usize,
    /// None: messages.
    pub(super) presence: Option<Asked>,
}

/// What a presence publish asks for.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) events: Vec<Event>,
    pub(super) node: u64,
    pub(super) if_attended: bool,
    pub(super) members_max: u32,
}

#[derive(Clone, Debug)]
pub(super) enum Item {
    Post(Post),
    /// Moves a retained record: the n-th of all, modulo their number; or pretends to.
    Move(usize, u8),
}

#[derive(Clone, Debug)]
pub(super) enum Step {
    Entry {
        /// Milliseconds the clock moves on.
        clock_ms: u64,
        /// Milliseconds the proposer is behind it.
        back_ms: u64,
        items: Vec<Item>,
        horizon: u8,
        check: bool,
    },
    Skip,
    Checkpoint,
    /// From the last checkpoint, over the archive as it is now.
    Restart,
    /// From an outline; interrupted after so many entries by a restart (0) or another outline (1), or not.
    Rebuild(u8, usize, u8),
}

fn asked() -> impl Strategy<Value = Asked> {
    let parts = (
        prop::collection::vec(gathering::event(), 0..4),
        1..4_u64,
        prop_oneof![3 => Just(false), 1 => Just(true)],
        prop_oneof![2 => Just(0_u32), 1 => 1..4_u32],
    );
    parts.prop_map(|(events, node, if_attended, members_max)| Asked {
        events,
        node,
        if_attended,
        members_max,
    })
}

fn item() -> impl Strategy<Value = Item> {
    let post = (
        (0..CHANNELS, 0..6_u8, 0..3_u8),
        (1..3_u64, 0..9_i64, prop::option::of(0..9_i64)),
        (0..8_u8, 0..60_usize),
        prop::option::of(asked()),
    );
    let post = post.prop_map(
        |((channel, id, kind), (epoch, offset, after), (class, bytes), presence)| {
            Item::Post(Post {
                channel,
                id,
                kind,
                epoch,
                offset,
                after,
                class,
                bytes,
                presence,
            })
        },
    );
    prop_oneof![5 => post, 2 => (any::<usize>(), 0..8_u8).prop_map(|(n, how)| Item::Move(n, how))]
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    let clock =
        prop_oneof![6 => 0..50_000_u64, 2 => 100_000..140_000_u64, 1 => Just(25 * 60 * MINUTE)];
    let back = prop_oneof![4 => Just(0), 1 => 1..60_000_u64];
    let entry = (
        clock,
        back,
        prop::collection::vec(item(), 0..6),
        0..4_u8,
        any::<bool>(),
    );
    let entry = entry.prop_map(|(clock_ms, back_ms, items, horizon, check)| Step::Entry {
        clock_ms,
        back_ms,
        items,
        horizon,
        check,
    });
    prop_oneof![
        12 => entry,
        1 => Just(Step::Skip),
        2 => Just(Step::Checkpoint),
        1 => Just(Step::Restart),
        1 => (0..9_u8, 0..20_usize, 0..3_u8).prop_map(|(max, after, how)| Step::Rebuild(max, after, how)),
    ]
}
