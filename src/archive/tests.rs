//! What the trait promises, what a crash and damage leave, and a model.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::channel::{Archive, Archived, ChannelId, Place};

const A: ChannelId = [1; 16];
const B: ChannelId = [2; 16];
const GROUP: GroupId = GroupId(7);

fn place(index: u64) -> Place {
    Place { index, position: 3 }
}

fn digest(n: u64) -> [u8; 16] {
    let mut key = [0; 16];
    // Spread, as real digests are.
    key[..8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    key[8..].copy_from_slice(&n.to_be_bytes());
    key
}

fn entry(n: u64) -> Archived {
    Archived {
        first: place(n),
        now: Place {
            index: n + 1,
            position: u16::MAX,
        },
        stamp_ms: n * 1000,
        retention_s: 77,
        bytes: 300,
        count: 2,
        ephemeral: n.is_multiple_of(2),
        presence: n.is_multiple_of(3),
        key: digest(n),
    }
}

fn open(dir: &Path) -> Archives {
    let options = Options {
        cache_bytes: 4 << 20,
    };
    Archives::open(dir.to_owned(), options).unwrap()
}

fn folder() -> (TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("index");
    (temp, dir)
}

fn firsts(entries: &[Archived]) -> Vec<u64> {
    entries.iter().map(|e| e.first.index).collect()
}

fn all(shard: &dyn Archive, channel: ChannelId) -> Vec<Archived> {
    let last = Place {
        index: u64::MAX,
        position: u16::MAX,
    };
    shard
        .range(channel, Place::default(), last, false, usize::MAX)
        .unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let to = to.join(item.file_name());
        if item.file_type().unwrap().is_dir() {
            copy(&item.path(), &to);
        } else {
            // Files may go while the original runs.
            let _ = fs::copy(item.path(), to);
        }
    }
}

fn aside(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir.parent().unwrap())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains(".broken-"))
        .collect();
    names.sort();
    names
}

/// Call `n` puts entries `3n`, `3n + 1` and `3n + 2`: all that a mark claims must be there.
fn put_calls(shard: &dyn Archive, calls: std::ops::Range<u64>) {
    for call in calls {
        let entries: Vec<_> = (0..3).map(|i| (A, entry(call * 3 + i))).collect();
        shard.put(&entries).unwrap();
    }
}

fn assert_claim_holds(shard: &dyn Archive) -> u64 {
    let mark = shard.mark();
    let found = all(shard, A);
    assert!(found.len() as u64 >= mark * 3, "{} for {mark}", found.len());
    for (n, found) in (0..).zip(&found) {
        assert_eq!(*found, entry(n));
        assert_eq!(shard.find(A, &found.key).unwrap(), Some(found.first));
    }
    mark
}

#[test]
fn puts_finds_and_ranges() {
    let (_temp, dir) = folder();
    let shard = open(&dir).shard(GROUP);
    shard
        .put(&[(A, entry(1)), (B, entry(1)), (A, entry(5)), (A, entry(3))])
        .unwrap();
    assert_eq!(shard.mark(), 1);
    shard.put(&[]).unwrap();
    assert_eq!(shard.mark(), 2, "every call counts");

    assert_eq!(shard.get(A, place(3)).unwrap(), Some(entry(3)));
    assert_eq!(shard.get(B, place(3)).unwrap(), None);
    assert_eq!(shard.find(A, &digest(5)).unwrap(), Some(place(5)));
    assert_eq!(shard.find(B, &digest(5)).unwrap(), None);
    let range = |from, to, newest_first, limit| {
        firsts(
            &shard
                .range(A, place(from), place(to), newest_first, limit)
                .unwrap(),
        )
    };
    assert_eq!(range(0, 9, false, 9), [1, 3, 5]);
    assert_eq!(range(1, 3, false, 9), [1, 3], "both ends belong to it");
    assert_eq!(range(0, 9, true, 2), [5, 3]);
    assert_eq!(range(0, 9, false, 1), [1]);
    assert!(range(9, 0, false, 9).is_empty());

    let moved = Archived {
        now: place(99),
        ..entry(3)
    };
    shard.put(&[(A, moved.clone())]).unwrap();
    assert_eq!(shard.get(A, place(3)).unwrap(), Some(moved));
    assert_eq!(all(&*shard, A).len(), 3);
}

#[test]
fn newest_entry_wins_a_key_in_any_order() {
    let (_temp, dir) = folder();
    let shard = open(&dir).shard(GROUP);
    let same = |n| Archived {
        key: digest(0),
        ..entry(n)
    };
    shard.put(&[(A, same(4)), (A, same(2))]).unwrap();
    shard.put(&[(A, same(3))]).unwrap();
    assert_eq!(shard.find(A, &digest(0)).unwrap(), Some(place(4)));
    shard.forget(A, place(3));
    shard.seal().unwrap();
    shard.settle().unwrap();
    assert_eq!(
        shard.find(A, &digest(0)).unwrap(),
        Some(place(4)),
        "it points elsewhere"
    );
    assert_eq!(firsts(&all(&*shard, A)), [4]);
}

#[test]
fn forgets_only_after_seal_and_settle() {
    let (_temp, dir) = folder();
    let shard = open(&dir).shard(GROUP);
    let entries: Vec<_> = (0..2000).map(|n| (A, entry(n))).collect();
    shard.put(&entries).unwrap();
    shard.put(&[(B, entry(1))]).unwrap();
    let len = || all(&*shard, A).len();

    shard.forget(A, place(1499));
    shard.settle().unwrap();
    assert_eq!(len(), 2000, "not sealed");
    shard.seal().unwrap();
    assert_eq!(len(), 2000, "not settled");
    shard.forget(A, place(1599));
    shard.settle().unwrap();
    assert_eq!(len(), 500, "what was forgotten after the seal stays");
    assert_eq!(shard.find(A, &digest(1499)).unwrap(), None);
    assert_eq!(shard.find(A, &digest(1500)).unwrap(), Some(place(1500)));
    assert_eq!(all(&*shard, B).len(), 1);
    shard.seal().unwrap();
    shard.settle().unwrap();
    assert_eq!(len(), 400);
    assert_eq!(shard.mark(), 2);
}

#[test]
fn reopens_as_it_was_and_clears_durably() {
    let (_temp, dir) = folder();
    let archives = open(&dir);
    let other = archives.shard(GroupId(8));
    put_calls(&*archives.shard(GROUP), 0..10);
    other.put(&[(A, entry(1))]).unwrap();
    drop((archives, other));
    assert!(dir.join("CLEAN").exists());

    let archives = open(&dir);
    let shard = archives.shard(GROUP);
    assert_eq!(assert_claim_holds(&*shard), 10);
    shard.forget(A, place(100));
    shard.clear().unwrap();
    assert_eq!((shard.mark(), all(&*shard, A).len()), (0, 0));
    shard.seal().unwrap();
    put_calls(&*shard, 0..1);
    shard.settle().unwrap();
    assert_eq!(
        all(&*shard, A).len(),
        3,
        "what was forgotten before is gone"
    );
    let copied = dir.with_file_name("copied");
    shard.clear().unwrap();
    copy(&dir, &copied);
    let copied = open(&copied);
    assert_eq!(copied.shard(GROUP).mark(), 0);
    assert_eq!(copied.shard(GroupId(8)).mark(), 1);
    assert!(aside(&dir).is_empty());
}

#[test]
fn crash_keeps_what_was_sealed() {
    let (temp, dir) = folder();
    let archives = open(&dir);
    let shard = archives.shard(GROUP);
    let (stop, sealed) = (AtomicBool::new(false), AtomicU64::new(0));
    let (stop, sealed) = (&stop, &sealed);
    std::thread::scope(|scope| {
        let writer = Arc::clone(&shard);
        scope.spawn(move || {
            let mut call = 0;
            while !stop.load(Ordering::Acquire) {
                put_calls(&*writer, call..call + 40);
                call += 40;
                if call.is_multiple_of(200) {
                    writer.seal().unwrap();
                    sealed.store(call, Ordering::Release);
                }
            }
        });
        for round in 0..12 {
            while sealed.load(Ordering::Acquire) < round * 200 {
                std::thread::yield_now();
            }
            let at_least = sealed.load(Ordering::Acquire);
            let copied = temp.path().join(format!("copy-{round}"));
            copy(&dir, &copied);
            let copied_archives = open(&copied);
            // A copy is not one moment of a file that is being written, so it may not tally; it may never lie.
            let mark = assert_claim_holds(&*copied_archives.shard(GROUP));
            assert!(
                mark >= at_least || !aside(&copied).is_empty(),
                "{mark} < {at_least}"
            );
        }
        stop.store(true, Ordering::Release);
    });
}

#[test]
fn quiet_copy_after_seal_has_everything() {
    let (temp, dir) = folder();
    let archives = open(&dir);
    let shard = archives.shard(GROUP);
    for round in 0..5 {
        put_calls(&*shard, round * 300..(round + 1) * 300);
        shard.seal().unwrap();
        let copied = temp.path().join(format!("copy-{round}"));
        copy(&dir, &copied);
        // As a process leaves it that is killed while it writes a snapshot.
        fs::write(copied.join("snap.00000000000FFFFF.generating"), b"half").unwrap();
        let again = open(&copied);
        assert_eq!(assert_claim_holds(&*again.shard(GROUP)), (round + 1) * 300);
    }
    assert!(aside(&dir).is_empty());
}

/// A folder that grew through reopening, rewriting and removal, and is closed (or, as a copy, is not).
fn grown(dir: &Path, calls: u64) {
    for part in 0..3 {
        let archives = open(dir);
        let shard = archives.shard(GROUP);
        put_calls(&*shard, 0..calls * (part + 1) / 3);
        shard.clear().unwrap();
        put_calls(&*shard, 0..calls);
        shard.seal().unwrap();
    }
}

/// Opens a damaged folder and holds it to the promises: whole, or empty with mark 0, or failing when read.
fn assert_honest(dir: &Path, whole: u64) -> &'static str {
    let archives = open(dir);
    let shard = archives.shard(GROUP);
    let mark = shard.mark();
    assert!(mark <= whole);
    let last = place(u64::MAX);
    match shard.range(A, Place::default(), last, false, usize::MAX) {
        Err(_) => {
            assert_eq!(shard.mark(), 0, "what is broken claims nothing");
            assert!(dir.join("BROKEN").exists());
            drop((archives, shard));
            let shard = open(dir).shard(GROUP);
            assert_eq!((shard.mark(), all(&*shard, A).len()), (0, 0));
            "failed when read"
        }
        Ok(found) if found.is_empty() => {
            assert_eq!(mark, 0);
            "empty"
        }
        Ok(_) => {
            assert_claim_holds(&*shard);
            if mark == whole { "whole" } else { "earlier" }
        }
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    folder::sled_files(dir).unwrap()
}

#[test]
fn damage_is_never_claimed() {
    let (temp, dir) = folder();
    grown(&dir, 900);
    let mut outcomes: BTreeMap<(String, &str), u32> = BTreeMap::new();
    for (clean, n) in [(true, 24), (false, 24)] {
        for file in files(&dir) {
            let name = file.file_name().unwrap().to_str().unwrap().to_owned();
            let len = fs::metadata(&file).unwrap().len();
            let mut try_with = |what: &str, damage: &dyn Fn(&Path)| {
                let at = temp.path().join("tried");
                let _ = fs::remove_dir_all(&at);
                copy(&dir, &at);
                if !clean {
                    fs::remove_file(at.join("CLEAN")).unwrap();
                }
                damage(&at.join(&name));
                let outcome = assert_honest(&at, 900);
                let what = format!("{what} {name}, clean {clean}");
                *outcomes.entry((what, outcome)).or_default() += 1;
                for old in aside(&at) {
                    fs::remove_dir_all(temp.path().join(old)).unwrap();
                }
            };
            try_with("delete", &|path| fs::remove_file(path).unwrap());
            for i in 0..n {
                // Spread over the file, its last part more densely, and never twice the same remainder.
                let at = if i % 2 == 0 {
                    len * i / n
                } else {
                    len - len.min(i * i * 7 + 1)
                };
                try_with("truncate", &|path| {
                    let file = fs::File::options().write(true).open(path).unwrap();
                    file.set_len(at).unwrap();
                });
                try_with("flip", &|path| {
                    let mut bytes = fs::read(path).unwrap();
                    let at = usize::try_from(at).unwrap().min(bytes.len() - 1);
                    bytes[at] ^= 0x41;
                    fs::write(path, bytes).unwrap();
                });
            }
        }
    }
    println!("{outcomes:#?}");
}

#[test]
fn lost_rows_do_not_tally() {
    let (_temp, dir) = folder();
    drop(open(&dir));
    {
        let archives = open(&dir);
        put_calls(&*archives.shard(GROUP), 0..5);
    }
    {
        // As sled would be if it lost a page and did not notice.
        let db = sled::open(&dir).unwrap();
        let tree = db.open_tree(store::shard_tree(GROUP.0)).unwrap();
        tree.remove(rows::entry_key(A, place(4))).unwrap().unwrap();
    }
    let _ = fs::remove_file(dir.join("CLEAN"));
    let shard = open(&dir).shard(GROUP);
    assert_eq!((shard.mark(), all(&*shard, A).len()), (0, 0));
    assert_eq!(aside(&dir), ["index.broken-1"]);
}

#[test]
fn one_folder_is_kept_aside() {
    let (_temp, dir) = folder();
    for n in 1..=3 {
        let archives = open(&dir);
        archives.shard(GROUP).put(&[(A, entry(n))]).unwrap();
        drop(archives);
        fs::write(dir.join("BROKEN"), "for a test").unwrap();
        let shard = open(&dir).shard(GROUP);
        assert_eq!((shard.mark(), all(&*shard, A).len()), (0, 0));
        assert_eq!(aside(&dir), [format!("index.broken-{n}")]);
    }
    {
        let db = sled::open(&dir).unwrap();
        db.insert("format", "of tomorrow").unwrap();
    }
    drop(open(&dir));
    assert_eq!(aside(&dir), ["index.broken-4"]);
}

#[test]
fn an_error_or_a_panic_ends_it() {
    for panics in [false, true] {
        let (_temp, dir) = folder();
        let archives = open(&dir);
        let shard = archives.shard(GROUP);
        put_calls(&*shard, 0..2);
        let error = archives.store.run(|_| -> sled::Result<()> {
            assert!(!panics, "as sled does");
            Err(sled::Error::ReportableBug("as sled does".into()))
        });
        assert!(error.unwrap_err().to_string().contains("as sled does"));
        assert_eq!(shard.mark(), 0);
        assert!(shard.put(&[(A, entry(1))]).is_err());
        assert!(shard.find(A, &digest(1)).is_err());
        assert!(shard.get(A, place(1)).is_err());
        assert!(shard.seal().is_err());
        assert!(shard.clear().is_err());
        assert!(archives.shard(GroupId(9)).put(&[]).is_err());
        drop((archives, shard));
        let shard = open(&dir).shard(GROUP);
        assert_eq!((shard.mark(), all(&*shard, A).len()), (0, 0));
        assert_eq!(aside(&dir).len(), 1);
    }
}

#[test]
fn what_another_holds_is_refused_and_left_alone() {
    let (_temp, dir) = folder();
    let archives = open(&dir);
    put_calls(&*archives.shard(GROUP), 0..2);
    let error = Archives::open(dir.clone(), Options::default()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    assert!(aside(&dir).is_empty());
    assert_eq!(assert_claim_holds(&*archives.shard(GROUP)), 2);
}

#[derive(Clone, Debug)]
enum Step {
    Put(Vec<(bool, u64)>),
    Forget(bool, u64),
    Seal,
    Settle,
    Clear,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec((any::<bool>(), 0..60_u64), 0..20).prop_map(Step::Put),
        2 => (any::<bool>(), 0..60_u64).prop_map(|(a, n)| Step::Forget(a, n)),
        2 => Just(Step::Seal),
        2 => Just(Step::Settle),
        1 => Just(Step::Clear),
        1 => Just(Step::Reopen),
    ]
}

#[derive(Default)]
struct Model {
    entries: BTreeMap<(ChannelId, Place), Archived>,
    forgotten: Vec<(ChannelId, Place)>,
    sealed: Vec<(ChannelId, Place)>,
    mark: u64,
}

fn named(a: bool) -> ChannelId {
    if a { A } else { B }
}

/// Keys repeat, so that several entries of a channel share one.
fn modelled(n: u64, moved: u64) -> Archived {
    Archived {
        key: digest(n % 11),
        now: place(moved),
        ..entry(n)
    }
}

impl Model {
    fn step(&mut self, step: &Step, archives: &mut Option<Archives>, dir: &Path) {
        let shard = archives.as_ref().unwrap().shard(GROUP);
        match step {
            Step::Put(entries) => {
                self.mark += 1;
                let entries: Vec<_> = entries
                    .iter()
                    .map(|(a, n)| (named(*a), modelled(*n, self.mark)))
                    .collect();
                shard.put(&entries).unwrap();
                for (channel, entry) in entries {
                    self.entries.insert((channel, entry.first), entry);
                }
            }
            Step::Forget(a, n) => {
                shard.forget(named(*a), place(*n));
                self.forgotten.push((named(*a), place(*n)));
            }
            Step::Seal => {
                shard.seal().unwrap();
                self.sealed.append(&mut self.forgotten);
            }
            Step::Settle => {
                shard.settle().unwrap();
                for (channel, through) in self.sealed.drain(..) {
                    self.entries
                        .retain(|(c, first), _| *c != channel || *first > through);
                }
            }
            Step::Clear => {
                shard.clear().unwrap();
                *self = Self::default();
            }
            Step::Reopen => {
                drop((shard, archives.take()));
                // Half of the time as if it had been killed.
                if self.mark.is_multiple_of(2) {
                    fs::remove_file(dir.join("CLEAN")).unwrap();
                }
                *archives = Some(open(dir));
                self.forgotten.clear();
                self.sealed.clear();
            }
        }
    }

    fn check(&self, shard: &dyn Archive) {
        assert_eq!(shard.mark(), self.mark);
        for channel in [A, B] {
            let of = |entries: &BTreeMap<(ChannelId, Place), Archived>| -> Vec<Archived> {
                let of = entries.iter().filter(|((c, _), _)| *c == channel);
                of.map(|(_, entry)| entry.clone()).collect()
            };
            let expected = of(&self.entries);
            assert_eq!(all(shard, channel), expected);
            for n in 0..11 {
                let newest = expected.iter().rev().find(|e| e.key == digest(n));
                let found = shard.find(channel, &digest(n)).unwrap();
                assert_eq!(found, newest.map(|e| e.first));
            }
            let newest_first = shard.range(channel, place(10), place(40), true, 7).unwrap();
            let expected: Vec<_> = expected
                .into_iter()
                .rev()
                .filter(|e| (10..=40).contains(&e.first.index))
                .take(7)
                .collect();
            assert_eq!(newest_first, expected);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn is_a_map(steps in prop::collection::vec(step(), 1..40)) {
        let (_temp, dir) = folder();
        let mut archives = Some(open(&dir));
        let mut model = Model::default();
        for step in &steps {
            model.step(step, &mut archives, &dir);
            model.check(&*archives.as_ref().unwrap().shard(GROUP));
        }
        prop_assert!(aside(&dir).is_empty());
    }
}
