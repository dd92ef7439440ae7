//! Members whose node dies.

use firth::channel::{Attendant, Outcome};
use firth::types::ShardId;
use firth::wire::ably::{PresenceAction, PresenceMessage};
use firth::wire::{body, entry};

use crate::net::{LONG, Net, SOON, key, shards, until};

/// Publishes in a node's name until it is answered.
async fn publish(
    net: &Net,
    node: u64,
    channel: &str,
    connection: &str,
    events: &[PresenceMessage],
) {
    let what = format!("node {node} to be heard");
    until(&what, SOON, async || {
        let live = net.live(node).expect("a scenario asks nodes that live");
        let Attendant { node, boot } = live.cluster.attendant();
        let change = |event: &PresenceMessage| entry::Change {
            action: event
                .action
                .map_or(0, |it| u32::try_from(it.number()).unwrap()),
            client_id: event.client_id.clone().unwrap(),
            connection_id: String::new(),
        };
        let key = key(channel);
        let publish = entry::Publish {
            app: key.app.to_string(),
            channel: channel.to_owned(),
            id: format!("{connection}:0"),
            connection_id: connection.to_owned(),
            count: u32::try_from(events.len()).unwrap(),
            body: body::encode_presence(events),
            retention_ms: u64::try_from(LONG.as_millis()).unwrap(),
            presence: Some(entry::Presence {
                changes: events.iter().map(change).collect(),
                node,
                boot,
                ..Default::default()
            }),
            ..Default::default()
        };
        let submitted = live.cluster.submit(live.cluster.shard_of(&key), publish);
        match submitted.ok()?.await.ok()?.ok()? {
            Outcome::Stored(_) | Outcome::Duplicate(_) => Some(()),
            Outcome::Unchanged if events.is_empty() => Some(()),
            other => panic!("{connection} was answered with {other:?}"),
        }
    })
    .await;
}

async fn enter(net: &Net, node: u64, channel: &str, connection: &str, clients: &[&str]) {
    let event = |client: &&str| PresenceMessage {
        action: Some(PresenceAction::Enter),
        client_id: Some((*client).to_owned()),
        ..PresenceMessage::default()
    };
    let events: Vec<_> = clients.iter().map(event).collect();
    publish(net, node, channel, connection, &events).await;
}

fn members(net: &Net, node: u64, channel: &str) -> Vec<String> {
    let live = net.live(node).expect("a scenario asks nodes that live");
    let key = key(channel);
    let members = live
        .cluster
        .state(live.cluster.shard_of(&key))
        .members(&key);
    let members = members.into_iter();
    members
        .map(|it| format!("{}@{}", it.client_id, it.connection_id))
        .collect()
}

/// Who left, in order, once for each leave that a subscriber hears of.
async fn leaves(net: &Net, node: u64, channel: &str) -> Vec<String> {
    let mut left = Vec::new();
    for record in net.history(node, channel).await {
        let publish = entry::Publish {
            id: record.id,
            body: record.body,
            ..Default::default()
        };
        let events = body::decode_presence(&publish, 0).unwrap().into_iter();
        let leaves = events.filter(|event| event.action == Some(PresenceAction::Leave));
        left.extend(leaves.map(|it| {
            let (client, connection) = (it.client_id.unwrap(), it.connection_id.unwrap());
            assert!(
                !it.id.unwrap().starts_with(&connection),
                "clients go by its time"
            );
            format!("{client}@{connection}")
        }));
    }
    left
}

const STAYING: [&str; 3] = ["ann@home", "cid@moved", "dan@moved"];

/// One shard's leader dies with the node that everybody is on, the other shard's may live: both let go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_a_dead_node_leave_once_everywhere_unless_another_took_them_over() {
    let net = Net::start(3, 41).await;
    let dying = net.leader(ShardId(0)).await;
    let home = net.ids().into_iter().find(|id| *id != dying).unwrap();
    let channels: Vec<String> = shards().map(|shard| Net::channel_of(shard, "p")).collect();
    for channel in &channels {
        enter(&net, home, channel, "home", &["ann"]).await;
        enter(&net, dying, channel, "gone", &["ann", "bob"]).await;
        enter(&net, dying, channel, "moved", &["cid", "dan"]).await;
    }
    net.kill(dying).await;
    for channel in &channels {
        // The client came back here: its new node says so, and publishes nothing.
        publish(&net, home, channel, "moved", &[]).await;
        assert_eq!(
            members(&net, home, channel).len(),
            5,
            "nobody is let go at once"
        );
    }
    for channel in &channels {
        until("the dead node's members to leave", SOON, async || {
            let living = net.living();
            let mut all = living.iter().map(|live| members(&net, live.id, channel));
            all.all(|members| members == STAYING).then_some(())
        })
        .await;
    }
    net.restart(dying).await;
    net.wait_serving().await;
    net.agree().await;
    for channel in &channels {
        for id in net.ids() {
            assert_eq!(members(&net, id, channel), STAYING);
            assert_eq!(leaves(&net, id, channel).await, ["ann@gone", "bob@gone"]);
        }
    }
    net.check_nodes();
}
