//! Tests of the log as a whole, on the disk in memory unless the operating system matters.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::storage::{
    Done, Entry, Error, GroupLog, Log, LogId, MemoryDisk, Options, Owner, segment,
};
use crate::types::GroupId;

mod crash;
mod damage;
mod damage_model;
mod footers;
mod holes;
mod io_errors;
mod model;
mod open;
mod reads;
mod seeds;
mod segments;

fn owner() -> Owner {
    Owner {
        cluster_id: "test".to_owned(),
        node: 7,
    }
}

fn options() -> Options {
    Options {
        segment_bytes: 4096,
        tail_bytes: 1 << 20,
        scrub_bytes_per_second: 0,
        ..Options::new("log")
    }
}

/// As a node that has just started sees the disk.
fn open(disk: &MemoryDisk) -> Log {
    try_open(disk).unwrap()
}

fn try_open(disk: &MemoryDisk) -> Result<Log, Error> {
    Log::open_on(Arc::new(disk.clone()), options(), &owner())
}

fn id(term: u64, index: u64) -> LogId {
    let node = term % 3 + 1;
    LogId { term, node, index }
}

/// An entry whose payload tells which one it is.
fn entry(term: u64, index: u64, size: usize) -> Entry {
    let text = format!("entry {index} of term {term};");
    let payload: Vec<u8> = text.bytes().cycle().take(size).collect();
    Entry {
        id: id(term, index),
        kind: u8::try_from(index % 3).unwrap(),
        payload: Bytes::from(payload),
    }
}

fn entries(term: u64, range: std::ops::Range<u64>) -> Vec<Entry> {
    range.map(|index| entry(term, index, 100)).collect()
}

type Outcome = Receiver<io::Result<()>>;

/// A callback and where its outcome arrives.
fn done() -> (Done, Outcome) {
    let (tx, rx): (Sender<io::Result<()>>, _) = channel();
    (Box::new(move |result| drop(tx.send(result))), rx)
}

/// Appends and waits until it is durable.
fn append(group: &GroupLog, entries: Vec<Entry>) {
    let (done, outcome) = done();
    group.append(entries, done).unwrap();
    outcome.recv().unwrap().unwrap();
}

fn purge(group: &GroupLog, upto: LogId) {
    let (done, outcome) = done();
    group.purge(upto, done);
    outcome.recv().unwrap().unwrap();
}

fn vote(group: &GroupLog, vote: &'static [u8]) {
    let (done, outcome) = done();
    group.save_vote(Bytes::from_static(vote), done);
    outcome.recv().unwrap().unwrap();
}

fn all(group: &GroupLog) -> Vec<Entry> {
    group.read(0..u64::MAX, usize::MAX).unwrap()
}

/// The disk when power is cut now and nothing unsynced survives.
fn cut(disk: &MemoryDisk) -> MemoryDisk {
    disk.power_cut(|| false)
}
