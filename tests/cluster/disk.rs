//! A node's disk: in memory, cut off from power at any moment, with rules that fail, block or note what is done to it.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use firth::channel::{Archive, Archived, ChannelId, MemoryArchive, Place};
use firth::storage::{MemoryDisk, Op};
use firth::types::GroupId;
use tokio::sync::watch;

/// What a rule does to the operation that it waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Lets it pass.
    Note,
    /// Refuses it, and every later one that the rule matches, with this error number of the operating system.
    Fail(i32),
    /// Holds it, and every later one that the rule matches, until `release` or the end of power.
    Block,
    /// The power goes before the operation takes effect.
    PowerCut,
}

type Matches = Box<dyn Fn(Op, &str) -> bool + Send>;

struct Rule {
    matches: Matches,
    /// Matching operations to let pass first.
    left: usize,
    then: Then,
    fired_tx: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    dead: bool,
    rules: Vec<Rule>,
}

#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// The groups' archives, which lie beside the log. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Archives(Arc<Mutex<ByGroup>>);

type ByGroup = BTreeMap<GroupId, Arc<TestArchive>>;

impl Archives {
    pub(crate) fn of(&self, group: GroupId) -> Arc<dyn Archive> {
        self.lock().entry(group).or_default().clone()
    }

    /// Whether no idempotency key is found in them any more, though it is there: what a damaged index does.
    pub(crate) fn forget_keys(&self, forgetful: bool) {
        for archive in self.lock().values() {
            archive.forgetful.store(forgetful, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, ByGroup> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct TestArchive {
    memory: MemoryArchive,
    forgetful: AtomicBool,
}

impl Archive for TestArchive {
    fn put(&self, channel_entries: &[(ChannelId, Archived)]) -> io::Result<()> {
        self.memory.put(channel_entries)
    }

    fn find(&self, channel: ChannelId, key: &[u8; 16]) -> io::Result<Option<Place>> {
        match self.forgetful.load(Ordering::Relaxed) {
            true => Ok(None),
            false => self.memory.find(channel, key),
        }
    }

    fn get(&self, channel: ChannelId, first: Place) -> io::Result<Option<Archived>> {
        self.memory.get(channel, first)
    }

    fn range(
        &self,
        channel: ChannelId,
        from: Place,
        to: Place,
        newest_first: bool,
        limit: usize,
    ) -> io::Result<Vec<Archived>> {
        self.memory.range(channel, from, to, newest_first, limit)
    }

    fn forget(&self, channel: ChannelId, through: Place) {
        self.memory.forget(channel, through);
    }

    fn mark(&self) -> u64 {
        self.memory.mark()
    }

    fn seal(&self) -> io::Result<()> {
        self.memory.seal()
    }

    fn settle(&self) -> io::Result<()> {
        self.memory.settle()
    }

    fn clear(&self) -> io::Result<()> {
        self.memory.clear()
    }
}

/// One power-on of a disk. Clones are the same.
#[derive(Clone)]
pub(crate) struct TestDisk {
    memory: MemoryDisk,
    archives: Archives,
    gate: Arc<Gate>,
}

impl Default for TestDisk {
    fn default() -> Self {
        Self::on(MemoryDisk::default(), Archives::default())
    }
}

impl TestDisk {
    fn on(memory: MemoryDisk, archives: Archives) -> Self {
        let gate = Arc::new(Gate::default());
        let on_op = gate.clone();
        memory.on_op(move |op, name| on_op.pass(op, name));
        Self {
            memory,
            archives,
            gate,
        }
    }

    pub(crate) fn memory(&self) -> &MemoryDisk {
        &self.memory
    }

    pub(crate) fn archives(&self) -> Archives {
        self.archives.clone()
    }

    /// Does `then` from the `nth` matching operation on (1 is the next one). The receiver turns true when that one
    /// comes.
    pub(crate) fn when(
        &self,
        nth: usize,
        then: Then,
        matches: impl Fn(Op, &str) -> bool + Send + 'static,
    ) -> watch::Receiver<bool> {
        let (fired_tx, fired) = watch::channel(false);
        self.gate.lock().rules.push(Rule {
            matches: Box::new(matches),
            left: nth - 1,
            then,
            fired_tx,
        });
        fired
    }

    /// Forgets all rules; what they held goes on.
    pub(crate) fn release(&self) {
        self.gate.lock().rules.clear();
        self.gate.changed.notify_all();
    }

    /// Every operation fails from now on. Those under way may finish, and may be acknowledged until their node is gone.
    pub(crate) fn cut(&self) {
        self.gate.lock().dead = true;
        self.gate.changed.notify_all();
    }

    /// The disk as it is found when power comes back; `keep` decides for each unsynced sector, and whether the archives
    /// are found again. Call it when nobody can acknowledge anything on the strength of this one any more.
    pub(crate) fn after_power_cut(&self, mut keep: impl FnMut() -> bool) -> Self {
        let archives = match keep() {
            true => self.archives(),
            false => Archives::default(),
        };
        Self::on(self.memory.power_cut(keep), archives)
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pass(&self, op: Op, name: &str) -> io::Result<()> {
        let mut state = self.lock();
        loop {
            if state.dead {
                return Err(io::Error::other("the power is gone"));
            }
            match state.verdict(op, name) {
                None | Some(Then::Note) => return Ok(()),
                Some(Then::Fail(number)) => return Err(io::Error::from_raw_os_error(number)),
                Some(Then::PowerCut) => state.dead = true,
                Some(Then::Block) => {
                    let woken = self.changed.wait(state);
                    state = woken.unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

impl State {
    /// What the first rule that is due says. One that holds an operation is asked again by the same operation.
    fn verdict(&mut self, op: Op, name: &str) -> Option<Then> {
        let mut verdict = None;
        for rule in &mut self.rules {
            if !(rule.matches)(op, name) {
                continue;
            }
            if rule.left > 0 {
                rule.left -= 1;
                continue;
            }
            rule.fired_tx.send_replace(true);
            verdict = verdict.or(Some(rule.then));
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use firth::storage::Disk as _;

    #[test]
    fn a_rule_waits_for_its_operation_and_a_cut_ends_everything() {
        let disk = TestDisk::default();
        let fired = disk.when(2, Then::Fail(5), |op, name| {
            op == Op::Sync && name.ends_with(".log")
        });
        let file = disk.memory.create("1.log").unwrap();
        file.write_at(b"abc", 0).unwrap();
        file.sync().unwrap();
        assert!(!*fired.borrow());
        disk.memory.sync_dir().unwrap();
        file.write_at(b"xyz", 0).unwrap();
        for _ in 0..2 {
            assert_eq!(file.sync().unwrap_err().raw_os_error(), Some(5));
        }
        assert!(*fired.borrow());
        disk.when(1, Then::PowerCut, |op, _| op == Op::Rename);
        assert!(disk.memory.rename("1.log", "2.log").is_err());
        assert!(file.write_at(b"later", 0).is_err());
        let found = disk.after_power_cut(|| false);
        assert_eq!(found.memory.bytes("1.log"), b"abc", "what was synced");
        found.memory.create("3.log").unwrap();
    }
}
