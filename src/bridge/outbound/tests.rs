//! The exporter against a simulated transactional Kafka that fails in every way librdkafka reports.

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    open_for: Duration::from_millis(100),
    bytes: 300,
    idle_entries: 50,
    fenced_pause: Duration::from_secs(10),
};

fn batch(records: Vec<u64>, through: u64) -> Batch<u64> {
    Batch {
        bytes: records.len() * 100,
        records,
        through,
        incarnation: Some(1),
    }
}

fn opened(now: Instant) -> Exporter<u64> {
    let mut exporter = Exporter::new(LIMITS, now);
    assert_eq!(exporter.step(now), Step::Open);
    exporter.on_open(Some(Cursor {
        incarnation: 1,
        index: 10,
    }));
    exporter
}

fn to_commit(exporter: &mut Exporter<u64>, now: Instant) {
    exporter.on_read(batch(vec![11], 11));
    assert_eq!(exporter.step(now), Step::Begin);
    exporter.on_begin(now);
    assert_eq!(exporter.step(now), Step::Produce(vec![11]));
    exporter.on_produce();
    assert_eq!(
        exporter.step(now),
        Step::Read {
            after: 11,
            wait: false
        }
    );
    exporter.on_read(batch(vec![], 11));
    let cursor = Cursor {
        incarnation: 1,
        index: 11,
    };
    assert_eq!(exporter.step(now), Step::Commit(cursor));
}

#[test]
fn one_message_is_committed_at_once_and_nothing_opens_no_transaction() {
    let now = Instant::now();
    let mut exporter = opened(now);
    assert_eq!(
        exporter.step(now),
        Step::Read {
            after: 10,
            wait: true
        }
    );
    to_commit(&mut exporter, now);
    exporter.on_commit();
    assert_eq!(
        exporter.step(now),
        Step::Read {
            after: 11,
            wait: true
        }
    );
    exporter.on_read(batch(vec![], 30));
    assert_eq!(
        exporter.step(now),
        Step::Read {
            after: 30,
            wait: true
        }
    );
    assert_eq!(
        (exporter.committed().index, exporter.done_through()),
        (11, 30)
    );
    assert_eq!(exporter.counters().transactions, 1);
}

#[test]
fn a_long_stretch_of_nothing_commits_the_cursor_alone() {
    let now = Instant::now();
    let mut exporter = opened(now);
    exporter.on_read(batch(vec![], 60));
    assert_eq!(exporter.step(now), Step::Begin);
    exporter.on_begin(now);
    assert_eq!(exporter.step(now), Step::Produce(vec![]));
}

#[test]
fn a_transaction_ends_by_time_and_by_size() {
    for (bytes, later) in [(300, 0), (1, 100)] {
        let now = Instant::now();
        let mut exporter = opened(now);
        exporter.on_read(Batch {
            bytes,
            ..batch(vec![11], 11)
        });
        exporter.on_begin(now);
        exporter.on_produce();
        let step = exporter.step(now + Duration::from_millis(later));
        assert!(matches!(step, Step::Commit(_)), "{step:?}");
    }
}

#[test]
fn an_abort_goes_back_to_the_committed_cursor() {
    let now = Instant::now();
    let mut exporter = opened(now);
    to_commit(&mut exporter, now);
    exporter.on_fault(Fault::Abort("message timed out".into()));
    assert!(matches!(exporter.step(now), Step::Sleep(_)));
    assert_eq!(exporter.step(now), Step::Abort);
    exporter.on_abort();
    assert_eq!(
        exporter.step(now),
        Step::Read {
            after: 10,
            wait: true
        }
    );
    assert_eq!(exporter.counters().records, 0);
}

#[test]
fn a_commit_of_unknown_outcome_is_repeated_then_the_producer_is_rebuilt() {
    let now = Instant::now();
    let mut exporter = opened(now);
    to_commit(&mut exporter, now);
    for _ in 0..TRIES_MAX {
        exporter.on_fault(Fault::Retry("timed out".into()));
        assert!(matches!(exporter.step(now), Step::Sleep(_)));
        assert_eq!(exporter.step(now), Step::CommitAgain);
    }
    exporter.on_fault(Fault::Retry("timed out".into()));
    exporter.step(now);
    assert_eq!(exporter.step(now), Step::Close);
    exporter.on_close();
    assert_eq!(exporter.step(now), Step::Open);
}

#[test]
fn a_fenced_producer_waits_long_before_it_tries_again() {
    let now = Instant::now();
    let mut exporter = opened(now);
    to_commit(&mut exporter, now);
    exporter.on_fault(Fault::Fenced);
    assert_eq!(exporter.state(), &State::Fenced);
    assert_eq!(exporter.step(now), Step::Sleep(LIMITS.fenced_pause));
    assert_eq!(exporter.step(now), Step::Close);
}

#[test]
fn what_blocks_is_shown_until_a_commit_works() {
    let now = Instant::now();
    let mut exporter = opened(now);
    exporter.on_read(batch(vec![11], 11));
    exporter.on_begin(now);
    exporter.on_fault(Fault::Blocked("no topic `t`".into()));
    let blocked = State::Blocked("no topic `t`".into());
    exporter.step(now);
    assert_eq!(exporter.step(now), Step::Abort);
    exporter.on_abort();
    assert_eq!(exporter.state(), &blocked);
    to_commit(&mut exporter, now);
    assert_eq!(exporter.state(), &blocked);
    exporter.on_commit();
    assert_eq!(exporter.state(), &State::Running);
}

#[test]
fn another_incarnations_cursor_blocks() {
    let now = Instant::now();
    let mut exporter = opened(now);
    exporter.on_read(Batch {
        incarnation: Some(2),
        ..batch(vec![1], 1)
    });
    assert!(matches!(exporter.state(), State::Blocked(_)));
    exporter.step(now);
    assert_eq!(
        exporter.step(now),
        Step::Read {
            after: 10,
            wait: true
        }
    );
}

#[test]
fn a_cursor_that_went_back_blocks() {
    let now = Instant::now();
    let mut exporter = opened(now);
    exporter.on_fault(Fault::Fatal("lost".into()));
    exporter.step(now);
    assert_eq!(exporter.step(now), Step::Close);
    exporter.on_close();
    assert_eq!(exporter.step(now), Step::Open);
    exporter.on_open(None);
    assert!(matches!(exporter.state(), State::Blocked(_)));
    exporter.step(now);
    assert_eq!(exporter.step(now), Step::Close);
}

/// Kafka: what is committed, and the one open transaction of the newest producer.
#[derive(Default)]
struct Kafka {
    epoch: u64,
    committed: Vec<u64>,
    cursor: Option<Cursor>,
    open: Option<(Vec<u64>, Option<Cursor>)>,
}

impl Kafka {
    fn open(&mut self) -> u64 {
        self.epoch += 1;
        self.open = None;
        self.epoch
    }

    fn commit(&mut self) {
        if let Some((records, cursor)) = self.open.take() {
            self.committed.extend(records);
            self.cursor = cursor.or(self.cursor);
        }
    }
}

/// One leader's exporter; several may believe to lead.
struct Leader {
    exporter: Exporter<u64>,
    epoch: u64,
    /// librdkafka's view: the last commit took effect already.
    commit_done: bool,
}

struct Sim {
    /// Every log index from 1; whether it is exportable.
    log: Vec<bool>,
    kafka: Kafka,
    leaders: Vec<Leader>,
    now: Instant,
}

impl Sim {
    fn leader(&self) -> Leader {
        Leader {
            exporter: Exporter::new(LIMITS, self.now),
            epoch: 0,
            commit_done: false,
        }
    }

    fn page(&self, after: u64, size: usize) -> Batch<u64> {
        let records = (1_u64..).zip(&self.log);
        let part: Vec<(u64, bool)> = records
            .map(|(i, e)| (i, *e))
            .filter(|(i, _)| *i > after)
            .take(size)
            .collect();
        let through = part.last().map_or(after, |(i, _)| *i);
        batch(
            part.iter().filter(|(_, e)| *e).map(|(i, _)| *i).collect(),
            through,
        )
    }

    /// One step of one leader, with a fault of a kind or none.
    fn step(&mut self, who: usize, fault: u8, size: usize) {
        self.now += Duration::from_millis(3);
        let (now, kafka) = (self.now, &mut self.kafka);
        let who = who % self.leaders.len();
        let Leader {
            exporter, epoch, ..
        } = &mut self.leaders[who];
        let step = exporter.step(now);
        let fenced = *epoch != kafka.epoch;
        let why = || "simulated".to_owned();
        match step {
            Step::Sleep(_) => {}
            Step::Close => exporter.on_close(),
            Step::Open => {
                // Fencing may work although reading the cursor does not.
                *epoch = kafka.open();
                match fault {
                    0 => exporter.on_fault(Fault::Retry(why())),
                    1 => exporter.on_fault(Fault::Fatal(why())),
                    _ => exporter.on_open(kafka.cursor),
                }
            }
            Step::Read { .. } if fault == 0 => exporter.on_fault(Fault::Retry(why())),
            Step::Read { after, .. } => {
                let page = self.page(after, size);
                self.leaders[who].exporter.on_read(page);
            }
            _ if fenced => exporter.on_fault(Fault::Fenced),
            Step::Begin if fault == 0 => exporter.on_fault(Fault::Retry(why())),
            Step::Begin if fault == 1 => exporter.on_fault(Fault::Fatal(why())),
            Step::Begin => {
                kafka.open = Some((Vec::new(), None));
                self.leaders[who].commit_done = false;
                self.leaders[who].exporter.on_begin(now);
            }
            Step::Produce(records) => {
                let (open, _) = kafka.open.as_mut().unwrap();
                match fault {
                    0..=2 => {
                        open.extend(&records[..records.len() / 2]);
                        exporter.on_fault(match fault {
                            0 => Fault::Abort(why()),
                            1 => Fault::Fatal(why()),
                            _ => Fault::Blocked(why()),
                        });
                    }
                    _ => {
                        open.extend(records);
                        exporter.on_produce();
                    }
                }
            }
            Step::Commit(cursor) => {
                kafka.open.as_mut().unwrap().1 = Some(cursor);
                self.commit(who, fault);
            }
            Step::CommitAgain => self.commit(who, fault),
            Step::Abort => match fault {
                0 => exporter.on_fault(Fault::Retry(why())),
                1 => exporter.on_fault(Fault::Fatal(why())),
                _ => {
                    kafka.open = None;
                    exporter.on_abort();
                }
            },
        }
    }

    fn commit(&mut self, who: usize, fault: u8) {
        let leader = &mut self.leaders[who];
        let why = || "simulated".to_owned();
        if fault >= 2 && !leader.commit_done {
            self.kafka.commit();
            leader.commit_done = true;
        }
        match fault {
            // Not committed, or committed and not known.
            0 | 2 => leader.exporter.on_fault(Fault::Retry(why())),
            1 | 3 => leader.exporter.on_fault(Fault::Fatal(why())),
            4 if !leader.commit_done => leader.exporter.on_fault(Fault::Abort(why())),
            _ => leader.exporter.on_commit(),
        }
    }

    fn expected(&self) -> Vec<u64> {
        let indices = (1_u64..).zip(&self.log);
        indices.filter(|(_, e)| **e).map(|(i, _)| i).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn whatever_fails_every_record_is_committed_once_and_in_order(
        log in proptest::collection::vec(any::<bool>(), 0..60),
        actions in proptest::collection::vec((0..24_u8, any::<usize>(), 0..40_u8, 1..6_usize), 0..500),
    ) {
        let mut sim = Sim {
            log,
            kafka: Kafka::default(),
            leaders: Vec::new(),
            now: Instant::now(),
        };
        sim.leaders.push(sim.leader());
        for (action, who, fault, size) in actions {
            match action {
                // A new leader; the old one may not know, or be dead.
                0 => sim.leaders.push(sim.leader()),
                1 if sim.leaders.len() > 1 => {
                    sim.leaders.remove(who % sim.leaders.len());
                }
                _ => sim.step(who, fault, size),
            }
            let expected = sim.expected();
            prop_assert!(expected.starts_with(&sim.kafka.committed), "{:?}", sim.kafka.committed);
        }
        sim.leaders = vec![sim.leader()];
        for _ in 0..400 {
            sim.step(0, 99, 4);
        }
        prop_assert_eq!(&sim.kafka.committed, &sim.expected());
        let exporter = &sim.leaders[0].exporter;
        prop_assert_eq!(exporter.done_through(), sim.log.len() as u64);
        prop_assert_eq!(exporter.state(), &State::Running);
    }
}
