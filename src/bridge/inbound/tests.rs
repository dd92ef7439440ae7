//! The partition against a simulated Kafka and log that fail in every way the contract allows.

use proptest::prelude::*;

use super::*;
use crate::types::{ErrorCode, ErrorInfo, Serial};

const LIMITS: Limits = Limits {
    records: 8,
    bytes: 1000,
};

fn submit(shard: u32) -> Work<i64> {
    let shard = ShardId(shard);
    Work::Submit { shard, payload: 0 }
}

fn stored() -> Result<Outcome, PublishError> {
    Ok(Outcome::Stored(Serial::default()))
}

fn drain(partition: &mut Partition<i64>, now: Instant) -> Vec<(i64, Option<i64>)> {
    std::iter::from_fn(|| partition.poll(now))
        .map(|s| (s.offset, s.after))
        .collect()
}

#[test]
fn the_floor_follows_only_what_is_contiguous() {
    let now = Instant::now();
    let mut partition = Partition::new(Some(10), LIMITS);
    for (offset, shard) in [(10, 0), (13, 1), (20, 0)] {
        partition.offer(offset, 10, submit(shard));
    }
    assert_eq!(
        drain(&mut partition, now),
        [(10, None), (13, None), (20, Some(10))]
    );
    assert!(!partition.on_outcome(13, stored(), now));
    assert_eq!(partition.floor(), Some(10));
    assert!(partition.on_outcome(10, Ok(Outcome::Duplicate(None)), now));
    assert_eq!(partition.floor(), Some(14));
    assert!(partition.on_outcome(20, stored(), now));
    assert_eq!((partition.floor(), partition.bytes), (Some(21), 0));
    assert_eq!(partition.counters().duplicates, 1);
}

#[test]
fn a_failure_goes_back_once_the_rest_has_settled() {
    let now = Instant::now();
    let mut partition = Partition::new(None, LIMITS);
    for offset in [1, 2, 3] {
        partition.offer(offset, 10, submit(0));
    }
    assert_eq!(drain(&mut partition, now).len(), 3);
    partition.on_outcome(2, Err(PublishError::Busy), now);
    partition.offer(4, 10, submit(0));
    assert_eq!(drain(&mut partition, now), [], "while others are in flight");
    partition.on_outcome(3, Err(PublishError::Busy), now);
    partition.on_outcome(1, stored(), now);
    assert_eq!(drain(&mut partition, now), [], "a pause first");
    let later = partition.next_deadline().unwrap();
    let again = [(2, None), (3, Some(2)), (4, Some(3))];
    assert_eq!(drain(&mut partition, later), again);
}

#[test]
fn a_record_without_a_place_stops_its_partition_and_nothing_before_it() {
    let now = Instant::now();
    let mut partition = Partition::new(None, LIMITS);
    partition.offer(1, 10, submit(0));
    partition.offer(2, 10, Work::Stop("key is not UTF-8".into()));
    partition.offer(3, 10, submit(0));
    assert_eq!(drain(&mut partition, now), [(1, None)]);
    assert_eq!(partition.state(), State::Running);
    partition.on_outcome(1, stored(), now);
    assert_eq!(drain(&mut partition, now), []);
    let State::Blocked(reason) = partition.state() else {
        panic!("not blocked");
    };
    assert_eq!(reason, "record at offset 2: key is not UTF-8");
    assert_eq!(partition.floor(), Some(2));
    assert!(partition.is_full() && !partition.has_room());
}

#[test]
fn a_refusal_for_ever_blocks_and_one_for_now_does_not() {
    for (code, blocked) in [
        (ErrorCode::MessageTooLarge, true),
        (ErrorCode::NoLeader, false),
    ] {
        let now = Instant::now();
        let mut partition = Partition::new(None, LIMITS);
        partition.offer(1, 10, submit(0));
        drain(&mut partition, now);
        partition.on_outcome(1, Err(PublishError::Refused(code.into())), now);
        let later = partition.next_deadline().unwrap();
        assert_eq!(drain(&mut partition, later).is_empty(), blocked);
        assert_eq!(matches!(partition.state(), State::Blocked(_)), blocked);
    }
}

#[test]
fn a_fenced_owner_is_over() {
    let now = Instant::now();
    let mut partition = Partition::new(None, LIMITS);
    partition.offer(1, 10, submit(0));
    partition.offer(2, 10, submit(0));
    partition.poll(now);
    partition.on_outcome(1, Err(PublishError::Fenced), now);
    assert_eq!(partition.state(), State::Fenced);
    assert_eq!(drain(&mut partition, now + Duration::from_secs(60)), []);
}

#[test]
fn the_window_is_bounded_and_takes_one_record_of_any_size() {
    let now = Instant::now();
    let mut partition = Partition::new(None, LIMITS);
    partition.offer(1, 5000, submit(0));
    assert!(partition.is_full());
    assert_eq!(drain(&mut partition, now), [(1, None)]);
    partition.on_outcome(1, stored(), now);
    assert!(partition.has_room());
    for offset in 2..10 {
        partition.offer(offset, 1, submit(0));
    }
    assert!(partition.is_full());
    partition.offer(5, 1, submit(0));
    assert_eq!(partition.window.len(), 8, "an offset read again is ignored");
}

/// The replicated state of one shard, as [`Upstream::publish`](crate::bridge::Upstream::publish) demands it.
#[derive(Default)]
struct Shard {
    highest: Option<(u64, i64)>,
    log: Vec<i64>,
}

impl Shard {
    fn apply(
        &mut self,
        epoch: u64,
        offset: i64,
        after: Option<i64>,
    ) -> Result<Outcome, PublishError> {
        let (old_epoch, old) = self.highest.map_or((0, None), |(e, o)| (e, Some(o)));
        if epoch < old_epoch {
            return Err(PublishError::Fenced);
        }
        if old.is_some_and(|old| offset <= old) {
            self.highest = old.map(|old| (epoch, old));
            return Ok(Outcome::Duplicate(None));
        }
        if after.is_some_and(|after| old.is_none_or(|old| old < after)) {
            return Err(PublishError::Busy);
        }
        self.highest = Some((epoch, offset));
        self.log.push(offset);
        stored()
    }
}

#[derive(Clone, Debug)]
struct Sent {
    epoch: u64,
    shard: usize,
    submission: Submission<i64>,
}

struct Sim {
    /// Offset, shard (or 9: came from this cluster).
    kafka: Vec<(i64, u32)>,
    shards: [Shard; 3],
    /// Submitted, not arrived; in order.
    wire: VecDeque<Sent>,
    /// Arrived or lost; its outcome is on its way back.
    answers: Vec<(u64, i64, Result<Outcome, PublishError>)>,
    /// May arrive at any time or never, whatever its submitter was told.
    limbo: Vec<Sent>,
    epoch: u64,
    durable_floor: Option<i64>,
    partition: Partition<i64>,
    now: Instant,
}

impl Sim {
    fn new(kafka: Vec<(i64, u32)>) -> Self {
        Self {
            kafka,
            shards: Default::default(),
            wire: VecDeque::new(),
            answers: Vec::new(),
            limbo: Vec::new(),
            epoch: 1,
            durable_floor: None,
            partition: Partition::new(None, LIMITS),
            now: Instant::now(),
        }
    }

    fn read(&mut self) {
        let next = self.partition.next().unwrap_or(i64::MIN);
        if self.partition.is_full() {
            return;
        }
        if let Some(&(offset, shard)) = self.kafka.iter().find(|(o, _)| *o >= next) {
            let work = if shard == 9 {
                Work::Skip
            } else {
                submit(shard)
            };
            self.partition.offer(offset, 10, work);
        }
    }

    fn submit(&mut self) {
        self.now += Duration::from_millis(7);
        if let Some(submission) = self.partition.poll(self.now) {
            let shard = self.kafka.iter().find(|(o, _)| *o == submission.offset);
            self.wire.push_back(Sent {
                epoch: self.epoch,
                shard: shard.unwrap().1 as usize,
                submission,
            });
        }
    }

    fn arrive(&mut self, fault: u8) {
        let Some(sent) = self.wire.pop_front() else {
            return;
        };
        let Sent {
            epoch,
            shard,
            submission,
        } = sent.clone();
        let offset = submission.offset;
        let lost = Err(PublishError::Indeterminate(ErrorInfo::from(
            ErrorCode::Timeout,
        )));
        let answer = match fault {
            0 => Err(PublishError::Busy),
            1 => lost,
            2 => {
                self.limbo.push(sent);
                lost
            }
            3 => {
                let _ = self.shards[shard].apply(epoch, offset, submission.after);
                lost
            }
            _ => self.shards[shard].apply(epoch, offset, submission.after),
        };
        self.answers.push((epoch, offset, answer));
    }

    fn answer(&mut self, pick: usize) {
        if self.answers.is_empty() {
            return;
        }
        let (epoch, offset, answer) = self.answers.swap_remove(pick % self.answers.len());
        if epoch == self.epoch {
            self.partition.on_outcome(offset, answer, self.now);
        }
    }

    fn haunt(&mut self, pick: usize) {
        if !self.limbo.is_empty() {
            let sent = self.limbo.swap_remove(pick % self.limbo.len());
            let submission = sent.submission;
            let _ = self.shards[sent.shard].apply(sent.epoch, submission.offset, submission.after);
        }
    }

    fn save_floor(&mut self) {
        self.durable_floor = self.partition.floor();
    }

    /// The owner dies, or is only thought dead and its submissions still arrive.
    fn take_over(&mut self) {
        self.epoch += 1;
        self.limbo.extend(self.wire.drain(..));
        self.partition = Partition::new(self.durable_floor, LIMITS);
    }

    fn act(&mut self, (action, pick): (u8, usize)) {
        match action {
            0..=2 => self.read(),
            3..=5 => self.submit(),
            6..=9 => self.arrive(99),
            10 => self.arrive(u8::try_from(pick % 4).unwrap()),
            11..=13 => self.answer(pick),
            14 => self.haunt(pick),
            15 if pick % 3 == 0 => self.take_over(),
            _ => self.save_floor(),
        }
    }

    fn check(&self) {
        // What the floor claims is true.
        let floor = self.partition.floor().unwrap_or(i64::MIN);
        for (offset, shard) in self.kafka.iter().filter(|(o, s)| *o < floor && *s != 9) {
            let log = &self.shards[*shard as usize].log;
            assert!(
                log.contains(offset),
                "{offset} is below the floor {floor} but not stored"
            );
        }
        for shard in &self.shards {
            assert!(shard.log.is_sorted(), "{:?}", shard.log);
        }
    }

    fn finish(&mut self) {
        for _ in 0..10_000 {
            self.read();
            self.now += Duration::from_secs(10);
            self.submit();
            self.arrive(99);
            self.answer(0);
        }
        for (n, shard) in self.shards.iter().enumerate() {
            let expected: Vec<i64> = (self.kafka.iter())
                .filter(|(_, s)| *s as usize == n)
                .map(|(o, _)| *o)
                .collect();
            assert_eq!(shard.log, expected, "shard {n}");
        }
        let end = self.kafka.last().map(|(o, _)| o + 1);
        assert_eq!(self.partition.floor(), end);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn whatever_fails_every_record_is_stored_once_and_in_order(
        gaps in proptest::collection::vec((1..4_i64, prop_oneof![4 => 0..3_u32, 1 => Just(9)]), 0..40),
        actions in proptest::collection::vec((0..17_u8, any::<usize>()), 0..600),
    ) {
        let offsets = gaps.iter().scan(0, |offset, (gap, shard)| {
            *offset += gap;
            Some((*offset, *shard))
        });
        let mut sim = Sim::new(offsets.collect());
        for action in actions {
            sim.act(action);
            sim.check();
        }
        sim.finish();
    }
}
