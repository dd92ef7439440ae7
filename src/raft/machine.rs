//! openraft's state machine on ours.

use std::io;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use prost::Message as _;

use crate::channel::Outcome;
use crate::raft::codec::{decode, log_id_in, log_id_out, membership_in, membership_out};
use crate::raft::{LogId, StoredMembership, TypeConfig};
use crate::storage::SnapshotFile;
use crate::wire::peer;

type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Bytes>;

/// What applying an entry answers to its proposer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// An entry that carries no command.
    None,
    /// One for each publish of the entry.
    Publishes(Vec<Outcome>),
    /// A command of the control group: why it was refused, if it was.
    Control(Result<(), String>),
}

/// A replicated state machine. It sees each committed entry once, in log order, also again after a restart.
pub trait Machine: Send + Sync + 'static {
    /// # Errors
    /// When this build cannot apply the entry. The group stops then, rather than differ from its replicas.
    fn apply(&mut self, index: u64, payload: Bytes) -> Result<Response, String>;
    /// An entry without command lies at `index`.
    fn skip(&mut self, index: u64);
    /// The derived state as bytes.
    fn checkpoint(&self) -> Bytes;
    /// Replaces the state by one that `checkpoint` wrote.
    ///
    /// # Errors
    /// When the bytes are damaged or newer than this build.
    fn restore(&mut self, state: Bytes) -> Result<(), String>;
}

/// A machine with what openraft wants to know of it. Clones share the machine.
#[derive(Clone)]
pub(crate) struct Adapter {
    inner: Arc<Mutex<Inner>>,
    file: SnapshotFile,
}

struct Inner {
    machine: Box<dyn Machine>,
    applied: Option<LogId>,
    membership: StoredMembership,
    snapshot: Option<(SnapshotMeta, Bytes)>,
}

impl Adapter {
    /// Opens the machine at its last durable snapshot, or empty.
    pub(super) fn open(mut machine: Box<dyn Machine>, file: SnapshotFile) -> io::Result<Self> {
        let (mut applied, mut membership) = (None, StoredMembership::default());
        let stored = file.load()?.map(decode_snapshot).transpose()?;
        if let Some((meta, state)) = &stored {
            machine.restore(state.clone()).map_err(invalid)?;
            applied = meta.last_log_id;
            membership = meta.last_membership.clone();
        }
        let inner = Inner {
            machine,
            applied,
            membership,
            snapshot: stored,
        };
        let inner = Arc::new(Mutex::new(inner));
        Ok(Self { inner, file })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .expect("a panic while applying stops the group, so nobody comes after it")
    }
}

impl RaftStateMachine<TypeConfig> for Adapter {
    type SnapshotData = Bytes;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let inner = self.lock();
        Ok((inner.applied, inner.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let response = self.lock().apply(entry)?;
            if let Some(responder) = responder {
                responder.send(response);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, state: Bytes) -> io::Result<()> {
        self.file.store(&encode_snapshot(meta, &state))?;
        let mut inner = self.lock();
        inner.machine.restore(state.clone()).map_err(invalid)?;
        inner.applied = meta.last_log_id;
        inner.membership = meta.last_membership.clone();
        inner.snapshot = Some((meta.clone(), state));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let snapshot = self.lock().snapshot.clone();
        Ok(snapshot.map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}

impl Inner {
    fn apply(&mut self, entry: crate::raft::Entry) -> io::Result<Response> {
        let index = entry.log_id.index;
        let response = match entry.payload {
            EntryPayload::Normal(payload) => {
                self.machine.apply(index, payload.0).map_err(invalid)?
            }
            EntryPayload::Blank => {
                self.machine.skip(index);
                Response::None
            }
            EntryPayload::Membership(membership) => {
                self.machine.skip(index);
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
                Response::None
            }
        };
        self.applied = Some(entry.log_id);
        Ok(response)
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Adapter {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let (meta, state) = {
            let inner = self.lock();
            let meta = SnapshotMeta {
                last_log_id: inner.applied,
                last_membership: inner.membership.clone(),
            };
            (meta, inner.machine.checkpoint())
        };
        self.file.store(&encode_snapshot(&meta, &state))?;
        self.lock().snapshot = Some((meta.clone(), state.clone()));
        Ok(Snapshot {
            meta,
            snapshot: state,
        })
    }
}

/// A snapshot travels and lies on disk in the same form; its vote is the sender's, absent on disk.
pub(super) fn snapshot_out(meta: &SnapshotMeta, state: &Bytes) -> peer::SnapshotRequest {
    peer::SnapshotRequest {
        vote: None,
        last: meta.last_log_id.as_ref().map(log_id_out),
        membership_id: meta.last_membership.log_id().as_ref().map(log_id_out),
        membership: Some(membership_out(meta.last_membership.membership())),
        state: state.clone(),
    }
}

pub(super) fn snapshot_in(request: peer::SnapshotRequest) -> io::Result<(SnapshotMeta, Bytes)> {
    let membership = membership_in(request.membership.unwrap_or_default())?;
    let membership_id = request.membership_id.as_ref().map(log_id_in);
    let meta = SnapshotMeta {
        last_log_id: request.last.as_ref().map(log_id_in),
        last_membership: StoredMembership::new(membership_id, membership),
    };
    Ok((meta, request.state))
}

fn encode_snapshot(meta: &SnapshotMeta, state: &Bytes) -> Bytes {
    snapshot_out(meta, state).encode_to_vec().into()
}

fn decode_snapshot(bytes: Bytes) -> io::Result<(SnapshotMeta, Bytes)> {
    snapshot_in(decode(bytes)?)
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
