//! openraft's own conformance suite, on the real log and state machine.

use std::sync::Arc;

use bytes::Bytes;
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use crate::raft::log_store::LogStore;
use crate::raft::machine::Adapter;
use crate::raft::{Machine, Response, TypeConfig};
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

    fn restore(&mut self, state: Bytes) -> Result<(), String> {
        let bytes = state
            .as_ref()
            .try_into()
            .map_err(|_| "eight bytes".to_owned())?;
        self.0 = u64::from_le_bytes(bytes);
        Ok(())
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
        let adapter = Adapter::open(Box::<Counter>::default(), log.snapshot(group)).unwrap();
        let store = LogStore(log.group(group));
        Ok((Arc::new((dir, log)), store, adapter))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_store_conforms() {
    Suite::test_all(Builder).await.unwrap();
}
