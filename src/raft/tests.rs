//! openraft's own conformance suite, on the real log and state machine.

use std::sync::Arc;

use bytes::Bytes;
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use crate::channel::Archive;
use crate::raft::adapter::Adapter;
use crate::raft::log_store::LogStore;
use crate::raft::{Machine, Replay, Response, Restored, TypeConfig};
use crate::storage::{Log, Options, Owner};
use crate::types::GroupId;

/// Remembers how far it was applied.
#[derive(Default)]
struct Counter(u64);

impl Machine for Counter {
    fn apply(&mut self, index: u64, _: Bytes) -> Result<Response, String> {
        self.0 = index;
        Ok(Response::None)
    }

    fn skip(&mut self, index: u64) {
        self.0 = index;
    }

    fn checkpoint(&self) -> Bytes {
        self.0.to_le_bytes().to_vec().into()
    }

    fn checkpointed(&mut self, _: u64) -> Result<(), String> {
        Ok(())
    }

    fn restore(&mut self, _: u64, checkpoint: Bytes) -> Result<Restored, String> {
        let bytes = checkpoint.as_ref().try_into();
        self.0 = u64::from_le_bytes(bytes.map_err(|_| "eight bytes".to_owned())?);
        Ok(Restored::Whole)
    }

    fn archive(&self) -> Option<Arc<dyn Archive>> {
        None
    }

    fn horizon(&self) -> Option<u64> {
        Some(self.0)
    }

    fn let_go(&mut self) {}

    fn outline(&self) -> Bytes {
        self.checkpoint()
    }

    fn restore_outline(&mut self, index: u64, outline: Bytes) -> Result<(), String> {
        self.restore(index, outline).map(|_| ())
    }

    fn rebuild(&mut self, index: u64, outline: Bytes, _: Replay<'_>) -> Result<(), String> {
        self.restore_outline(index, outline)
    }
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, Adapter, Arc<(tempfile::TempDir, Log)>> for Builder {
    async fn build(
        &self,
    ) -> Result<(Arc<(tempfile::TempDir, Log)>, LogStore, Adapter), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let mut options = Options::new(dir.path());
        // Small, so that creating one per test costs nothing.
        options.segment_bytes = 64 << 10;
        let owner = Owner {
            cluster_id: "suite".into(),
            node: 1,
        };
        let log = Log::open(options, &owner).unwrap();
        let group = GroupId(7);
        let part = log.group(group);
        let machine = Box::<Counter>::default();
        let (adapter, _) = Adapter::open(machine, log.snapshot(group), part.clone()).unwrap();
        let store = LogStore(part);
        Ok((Arc::new((dir, log)), store, adapter))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_store_conforms() {
    Suite::test_all(Builder).await.unwrap();
}
