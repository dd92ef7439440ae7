//! Errors that a healthy Kafka never sends, from librdkafka's own mock: each class ends in a running bridge again.
//! The mock knows no aborted records, so what is exactly once is shown elsewhere.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use firth::bridge::{Bridge, Options, ShardStatus, State};
use firth::tasks::Tasks;
use firth::types::ShardId;
use rdkafka::mocking::MockCluster;
use rdkafka::types::{RDKafkaApiKey as Api, RDKafkaRespErr as Err};

use crate::memory::{Cluster, shard_of};
use crate::scenarios::{bridge, until};

/// What must have happened on the way.
enum By {
    /// librdkafka or a repeated call: neither abort nor a new producer.
    Retrying,
    Aborting,
    Rebuilding,
}

async fn recovers(api: Api, errors: &[Err], by: By) {
    let what = format!("{errors:?} of {api:?}");
    let mock = MockCluster::new(1).unwrap();
    let shard = shard_of("app", "/errors/k");
    mock.create_topic("errors", 1, 1).unwrap();
    mock.create_topic("firth-cursors-errors-b", 4, 1).unwrap();
    let config = bridge("b", &mock.bootstrap_servers(), false, true);
    let cluster = Cluster::new("errors", config);
    let node = cluster.node();
    node.led
        .send_replace(Arc::new(BTreeMap::from([(shard, 1)])));
    let options = Options {
        fenced_pause_ms: 200,
        request_timeout_ms: 1000,
        ..Options::default()
    };
    let (tasks, _) = Tasks::root();
    let bridge = Bridge::start(node.clone(), options, &tasks);
    let status = || -> Option<ShardStatus> {
        let status = bridge.status();
        let shard = status.first()?.outbound.first()?;
        (shard.state == State::Running && shard.lag == 0).then(|| shard.clone())
    };
    cluster.client_publish("/errors/k", "before", "before");
    until("a first commit", &[&bridge], || {
        status().is_some_and(|s| s.cursor == 1)
    })
    .await;
    mock.request_errors(api, errors);
    cluster.client_publish("/errors/k", "after", "after");
    until(&what, &[&bridge], || {
        status().is_some_and(|s| s.cursor == 2)
    })
    .await;
    let status = status().unwrap();
    match by {
        By::Retrying => assert_eq!((status.aborts, status.rebuilds), (0, 0), "{what}"),
        By::Aborting => assert!(
            status.aborts > 0 && status.rebuilds == 0,
            "{what}: {status:?}"
        ),
        By::Rebuilding => assert!(status.rebuilds > 0, "{what}: {status:?}"),
    }
    assert_eq!(ShardId(status.shard), shard);
    tokio::time::timeout(Duration::from_secs(15), bridge.stop())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_a_moment_are_retried() {
    let busy = Err::RD_KAFKA_RESP_ERR_NOT_COORDINATOR;
    recovers(Api::EndTxn, &[busy, busy], By::Retrying).await;
    let loading = Err::RD_KAFKA_RESP_ERR_COORDINATOR_LOAD_IN_PROGRESS;
    recovers(Api::AddPartitionsToTxn, &[loading], By::Retrying).await;
    let replicas = Err::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS;
    recovers(Api::Produce, &[replicas, replicas], By::Retrying).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_transaction_is_aborted_and_made_again() {
    let large = Err::RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE;
    recovers(Api::Produce, &[large], By::Aborting).await;
    let forbidden = Err::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    recovers(Api::AddPartitionsToTxn, &[forbidden], By::Aborting).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_producer_is_built_anew() {
    let fenced = Err::RD_KAFKA_RESP_ERR_PRODUCER_FENCED;
    recovers(Api::EndTxn, &[fenced], By::Rebuilding).await;
    let invalid = Err::RD_KAFKA_RESP_ERR_INVALID_TXN_STATE;
    recovers(Api::AddPartitionsToTxn, &[invalid], By::Rebuilding).await;
    let forbidden = Err::RD_KAFKA_RESP_ERR_TRANSACTIONAL_ID_AUTHORIZATION_FAILED;
    recovers(Api::AddPartitionsToTxn, &[forbidden], By::Rebuilding).await;
}
