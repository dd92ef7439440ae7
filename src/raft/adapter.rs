//! openraft's state machine on ours, and its checkpoints on disk.
//!
//! What is offered to other nodes as a snapshot is the machine's *outline* at its horizon, made when it is asked for;
//! the log behind the horizon is ordinary log and does the rest. What lies on this node's disk is a *checkpoint* of the
//! whole state, so that a restart replays little. A checkpoint stands durably before anything it covers is purged, and
//! the log it was made of is durable before the checkpoint is.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use prost::Message as _;
use tokio::sync::watch;

use crate::channel::Archive;
use crate::raft::codec::{decode, log_id_in, log_id_out, membership_in, membership_out};
use crate::raft::log_store::{self, id_in, normal_payload};
use crate::raft::machine::{Machine, Response, Restored};
use crate::raft::{LogId, StoredMembership, TypeConfig};
use crate::storage::{GroupLog, SnapshotFile};
use crate::wire::peer;

pub(super) type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
pub(super) type Snapshot = openraft::alias::SnapshotOf<TypeConfig, Bytes>;

/// Bytes of log read at a time while a state is rebuilt.
const REPLAY_BYTES: usize = 4 << 20;

/// What the keeper of a group watches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Index up to which the log may be purged.
    pub(super) horizon: u64,
    /// Bytes of entries applied since the newest checkpoint, with a fixed price for each.
    pub(super) since_checkpoint: u64,
}

/// What an applied entry counts beside its payload: replaying it is not free either.
const ENTRY_PRICE: u64 = 256;

/// A machine with what openraft wants to know of it. Clones share the machine.
#[derive(Clone)]
pub(crate) struct Adapter {
    inner: Arc<Mutex<Inner>>,
    file: SnapshotFile,
    log: GroupLog,
    progress_tx: watch::Sender<Progress>,
    /// Held from the moment a checkpoint is taken until it is stored: an older one must not come after a newer one, nor
    /// two into one file.
    storing: Arc<tokio::sync::Mutex<()>>,
}

struct Inner {
    machine: Box<dyn Machine>,
    applied: Option<LogId>,
    /// The newest membership at or before the horizon, and all after it.
    memberships: Vec<StoredMembership>,
    horizon: Option<LogId>,
}

/// A checkpoint as bytes, and what must be durable with it.
struct Taken {
    bytes: Bytes,
    archive: Option<Arc<dyn Archive>>,
    index: u64,
    covers: Progress,
}

/// What a checkpoint gave.
enum Found {
    Nothing,
    Whole,
    /// The state of its horizon; the archive is empty.
    Outline,
    /// It leans on an archive that is gone, and the whole log is there.
    Stale,
}

impl Adapter {
    /// Opens the machine where its checkpoint and the log allow, or empty. `false` when the log was purged and no
    /// checkpoint on this disk reaches so far: another replica's outline is needed.
    pub(super) fn open(
        machine: Box<dyn Machine>,
        file: SnapshotFile,
        log: GroupLog,
    ) -> io::Result<(Self, bool)> {
        let mut inner = Inner {
            machine,
            applied: None,
            memberships: Vec::new(),
            horizon: None,
        };
        let mut restored = false;
        for bytes in file.load_all()? {
            restored = match inner.restore(bytes, &log)? {
                Found::Nothing => continue,
                Found::Whole => true,
                Found::Outline => {
                    // Before the archive is filled anew: the checkpoint that leaned on the former one must not be
                    // taken for one that leans on this one.
                    let outline = inner.encode();
                    file.store(&outline)?;
                    true
                }
                Found::Stale => {
                    // For the same reason; the log makes the whole state.
                    file.remove()?;
                    false
                }
            };
            break;
        }
        let usable = restored || log.purged().is_none();
        let horizon = inner.machine.horizon().unwrap_or(0);
        let (progress_tx, _) = watch::channel(Progress {
            horizon,
            since_checkpoint: 0,
        });
        let inner = Arc::new(Mutex::new(inner));
        let adapter = Self {
            inner,
            file,
            log,
            progress_tx,
            storing: Arc::default(),
        };
        Ok((adapter, usable))
    }

    pub(super) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress_tx.subscribe()
    }

    /// Makes a checkpoint, durably. Takes as long as the disk does.
    pub(super) async fn checkpoint(&self) -> io::Result<()> {
        let _storing = self.storing.lock().await;
        let taken = self.lock().take(&self.progress_tx);
        self.store(taken).await
    }

    async fn store(&self, taken: Taken) -> io::Result<()> {
        // A checkpoint ahead of the log it was made of would be a state without its records.
        log_store::barrier(&self.log).await?;
        let file = self.file.clone();
        let (bytes, archive) = (taken.bytes, taken.archive);
        let stored = tokio::task::spawn_blocking(move || {
            if let Some(archive) = &archive {
                archive.seal()?;
            }
            file.store(&bytes)?;
            match &archive {
                Some(archive) => archive.settle(),
                None => Ok(()),
            }
        });
        stored.await.map_err(io::Error::other)??;
        let noted = self.lock().machine.checkpointed(taken.index);
        noted.map_err(io::Error::other)?;
        self.progress_tx.send_modify(|progress| {
            progress.since_checkpoint = progress
                .since_checkpoint
                .saturating_sub(taken.covers.since_checkpoint);
        });
        Ok(())
    }

    /// Moves the horizon on if the machine chooses it by itself.
    pub(super) fn let_go(&self) {
        let horizon = {
            let mut inner = self.lock();
            inner.machine.let_go();
            inner.note_horizon(&self.log);
            inner.horizon.map_or(0, |id| id.index)
        };
        self.progress_tx
            .send_modify(|progress| progress.horizon = horizon);
    }

    /// What another replica starts from that has the log behind the horizon; without an id while the whole log is needed.
    pub(super) fn outline(&self) -> (SnapshotMeta, Bytes) {
        let inner = self.lock();
        let whole = || (SnapshotMeta::default(), inner.machine.outline());
        inner.outline().unwrap_or_else(whole)
    }

    /// Replaces the state by another replica's outline and this replica's own log behind it, durably.
    pub(super) async fn rebuild(&self, meta: SnapshotMeta, outline: Bytes) -> io::Result<()> {
        let _storing = self.storing.lock().await;
        let this = self.clone();
        let rebuilt = tokio::task::spawn_blocking(move || {
            // No checkpoint of the state that goes may be found later: the archive that it leans on is emptied now.
            match meta.last_log_id {
                Some(_) => this.file.store(&at_horizon(&meta, outline.clone()))?,
                None => this.file.remove()?,
            }
            this.rebuild_now(&meta, outline)
        });
        rebuilt.await.map_err(io::Error::other)??;
        let taken = self.lock().take(&self.progress_tx);
        self.store(taken).await
    }

    fn rebuild_now(&self, meta: &SnapshotMeta, outline: Bytes) -> io::Result<()> {
        let mut inner = self.lock();
        let Some(applied) = inner.applied else {
            return Err(io::Error::other("there is nothing to rebuild"));
        };
        let from = meta.last_log_id.map_or(0, |id| id.index);
        if from > applied.index || self.log.purged().is_some_and(|at| at.index > from) {
            return Err(io::Error::other("the log here does not follow the outline"));
        }
        let mut next = from + 1;
        let mut page = std::collections::VecDeque::new();
        let mut replay = || {
            if page.is_empty() && next <= applied.index {
                page.extend(self.log.read(next..applied.index + 1, REPLAY_BYTES)?);
            }
            Ok(page.pop_front().map(|entry| {
                next = entry.id.index + 1;
                (entry.id.index, normal_payload(entry))
            }))
        };
        let rebuilt = inner.machine.rebuild(from, outline, &mut replay);
        rebuilt.map_err(invalid)?;
        inner.note_horizon(&self.log);
        Ok(())
    }

    /// Takes another replica's outline where this one has nothing of its own to start from.
    pub(super) async fn adopt(&self, meta: &SnapshotMeta, outline: Bytes) -> io::Result<()> {
        let _storing = self.storing.lock().await;
        let taken = Taken {
            bytes: at_horizon(meta, outline.clone()),
            archive: None,
            index: 0,
            covers: Progress::default(),
        };
        self.store(taken).await?;
        let (this, meta) = (self.clone(), meta.clone());
        // The archive is emptied, which waits for the disk.
        let restored = tokio::task::spawn_blocking(move || this.restore_outline(&meta, outline));
        restored.await.map_err(io::Error::other)?
    }

    fn restore_outline(&self, meta: &SnapshotMeta, outline: Bytes) -> io::Result<()> {
        let mut inner = self.lock();
        let index = meta.last_log_id.map_or(0, |id| id.index);
        inner
            .machine
            .restore_outline(index, outline)
            .map_err(invalid)?;
        inner.applied = meta.last_log_id;
        inner.horizon = meta.last_log_id;
        inner.memberships = vec![meta.last_membership.clone()];
        let horizon = inner.machine.horizon().unwrap_or(0);
        self.progress_tx
            .send_modify(|progress| progress.horizon = horizon);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
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
        let membership = inner.memberships.last().cloned().unwrap_or_default();
        Ok((inner.applied, membership))
    }

    async fn apply<S>(&mut self, mut entries: S) -> io::Result<()>
    where
        S: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let bytes = match &entry.payload {
                EntryPayload::Normal(payload) => payload.0.len() as u64,
                EntryPayload::Blank | EntryPayload::Membership(_) => 0,
            };
            let (response, horizon) = {
                let mut inner = self.lock();
                let response = inner.apply(entry, &self.log)?;
                (response, inner.horizon.map_or(0, |id| id.index))
            };
            self.progress_tx.send_modify(|progress| {
                progress.horizon = horizon;
                progress.since_checkpoint += bytes + ENTRY_PRICE;
            });
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
        self.adopt(meta, state).await
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<Snapshot>> {
        let outline = self.lock().outline();
        Ok(outline.map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Adapter {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> io::Result<Snapshot> {
        let _storing = self.storing.lock().await;
        let (outline, taken) = {
            let inner = self.lock();
            (inner.outline(), inner.take(&self.progress_tx))
        };
        self.store(taken).await?;
        let (meta, snapshot) = outline.unwrap_or_default();
        Ok(Snapshot { meta, snapshot })
    }
}

impl Inner {
    fn apply(&mut self, entry: crate::raft::Entry, log: &GroupLog) -> io::Result<Response> {
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
                let stored = StoredMembership::new(Some(entry.log_id), membership);
                self.memberships.push(stored);
                Response::None
            }
        };
        self.applied = Some(entry.log_id);
        self.note_horizon(log);
        Ok(response)
    }

    /// Finds the id of the machine's horizon while the log still has it.
    fn note_horizon(&mut self, log: &GroupLog) {
        let Some(horizon) = self.machine.horizon() else {
            return;
        };
        if self.horizon.is_some_and(|known| horizon <= known.index) {
            return;
        }
        let purged = log.purged().filter(|id| id.index == horizon);
        let logged = log.id(horizon).or(purged).map(id_in);
        let applied = self.applied.filter(|id| id.index == horizon);
        let Some(id) = applied.or(logged) else {
            return;
        };
        self.horizon = Some(id);
        let newest = self
            .memberships
            .partition_point(|at| at.log_id().is_none_or(|id| id.index <= horizon));
        self.memberships.drain(..newest.saturating_sub(1));
    }

    fn outline(&self) -> Option<(SnapshotMeta, Bytes)> {
        let horizon = self.horizon?;
        let first = self.memberships.first().cloned().unwrap_or_default();
        let covered = first.log_id().is_none_or(|id| id.index <= horizon.index);
        let meta = SnapshotMeta {
            last_log_id: Some(horizon),
            last_membership: if covered {
                first
            } else {
                StoredMembership::default()
            },
        };
        Some((meta, self.machine.outline()))
    }

    fn encode(&self) -> Bytes {
        let checkpoint = peer::Checkpoint {
            applied: self.applied.as_ref().map(log_id_out),
            horizon: self.horizon.as_ref().map(log_id_out),
            memberships: self.memberships.iter().map(membership_at_out).collect(),
            state: self.machine.checkpoint(),
        };
        checkpoint.encode_to_vec().into()
    }

    fn take(&self, progress_tx: &watch::Sender<Progress>) -> Taken {
        Taken {
            bytes: self.encode(),
            archive: self.machine.archive(),
            index: self.applied.map_or(0, |id| id.index),
            covers: *progress_tx.borrow(),
        }
    }

    /// Restores a checkpoint if the log allows it: whole where the log reaches so far, else its outline.
    fn restore(&mut self, bytes: Bytes, log: &GroupLog) -> io::Result<Found> {
        let checkpoint: peer::Checkpoint = decode(bytes)?;
        let Some(applied) = checkpoint.applied.as_ref().map(log_id_in) else {
            return Ok(Found::Nothing);
        };
        let horizon = checkpoint.horizon.as_ref().map(log_id_in);
        let memberships = checkpoint.memberships.into_iter().map(membership_at_in);
        let memberships = memberships.collect::<io::Result<Vec<_>>>()?;
        let purged = log.purged().map_or(0, |id| id.index);
        let last = log.last().map_or(0, |id| id.index);
        let state = checkpoint.state;
        // A snapshot that was installed stands at its horizon, before any log.
        let reached = applied.index <= last || Some(applied) == horizon;
        if !reached || applied.index < purged {
            return Ok(Found::Nothing);
        }
        let restored = self.machine.restore(applied.index, state.clone());
        if restored.map_err(invalid)? == Restored::Whole {
            (self.applied, self.horizon) = (Some(applied), horizon);
            self.memberships = memberships;
            return Ok(Found::Whole);
        }
        let Some(horizon) = horizon.filter(|id| id.index >= purged) else {
            return Ok(match purged {
                0 => Found::Stale,
                _ => Found::Nothing,
            });
        };
        tracing::warn!(
            from = horizon.index,
            "the newest state is rebuilt from the log behind its horizon"
        );
        self.machine
            .restore_outline(horizon.index, state)
            .map_err(invalid)?;
        (self.applied, self.horizon) = (Some(horizon), Some(horizon));
        self.memberships = memberships;
        self.memberships
            .retain(|at| at.log_id().is_none_or(|id| id.index <= horizon.index));
        Ok(Found::Outline)
    }
}

/// The checkpoint of a state at its horizon.
fn at_horizon(meta: &SnapshotMeta, outline: Bytes) -> Bytes {
    let checkpoint = peer::Checkpoint {
        applied: meta.last_log_id.as_ref().map(log_id_out),
        horizon: meta.last_log_id.as_ref().map(log_id_out),
        memberships: vec![membership_at_out(&meta.last_membership)],
        state: outline,
    };
    checkpoint.encode_to_vec().into()
}

fn membership_at_out(membership: &StoredMembership) -> peer::MembershipAt {
    peer::MembershipAt {
        id: membership.log_id().as_ref().map(log_id_out),
        membership: Some(membership_out(membership.membership())),
    }
}

fn membership_at_in(at: peer::MembershipAt) -> io::Result<StoredMembership> {
    let membership = membership_in(at.membership.unwrap_or_default())?;
    let id = at.id.as_ref().map(log_id_in);
    Ok(StoredMembership::new(id, membership))
}

/// A snapshot as it travels, without the sender's vote.
pub(super) fn snapshot_out(meta: &SnapshotMeta, state: Bytes) -> peer::SnapshotRequest {
    peer::SnapshotRequest {
        last: meta.last_log_id.as_ref().map(log_id_out),
        membership: Some(membership_at_out(&meta.last_membership)),
        state,
        ..Default::default()
    }
}

pub(super) fn snapshot_in(request: peer::SnapshotRequest) -> io::Result<(SnapshotMeta, Bytes)> {
    let meta = SnapshotMeta {
        last_log_id: request.last.as_ref().map(log_id_in),
        last_membership: membership_at_in(request.membership.unwrap_or_default())?,
    };
    Ok((meta, request.state))
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
