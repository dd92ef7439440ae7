//! One node's configuration: defaults, then a TOML file, then the environment (`FIRTH__`, levels
//! separated by `__`, as in `FIRTH__LISTEN__CLIENT`).
//!
//! It is read and checked whole before any port is bound; whatever is wrong is named with file and field.

mod storage;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use figment::Figment;
use figment::providers::{Env, Format as _, Toml};
use serde::{Deserialize, Serialize};

use crate::session::Limits;
use crate::types::{AppId, NodeId};
use crate::wire::control;
use crate::{admin, archive, bridge, cluster, gateway, raft, telemetry, transport};

pub use self::storage::Storage;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {reason}", .path.display())]
    Read { path: PathBuf, reason: String },
    #[error("{}: {field}: {reason}", .path.display())]
    Invalid {
        path: PathBuf,
        field: String,
        reason: String,
    },
}

/// The file's form. Field names are the keys of the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// This node's number.
    pub node: u64,
    /// Directory of everything the node keeps.
    pub data: PathBuf,
    /// Directory of `ca.pem`, `node.pem` and `node.key`.
    pub certs: PathBuf,
    pub listen: Listen,
    pub cluster: Cluster,
    pub bootstrap: Bootstrap,
    #[serde(default)]
    pub raft: Raft,
    #[serde(default)]
    pub storage: Storage,
    #[serde(default)]
    pub limits: LimitsFile,
    #[serde(default)]
    pub log: Log,
}

/// Addresses of this node's own sockets.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// TCP, for clients.
    pub client: SocketAddr,
    /// TCP, for operators; a loopback address.
    pub admin: SocketAddr,
    /// UDP, for other nodes.
    pub peer: SocketAddr,
}

/// What all nodes' files say alike.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Lower-case letters, digits and inner `-`; in every certificate.
    pub id: String,
    /// Fixed at the cluster's creation.
    #[serde(default = "default_shards")]
    pub shards: u32,
    pub nodes: Vec<Node>,
}

/// One of the cluster's nodes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    pub id: u64,
    /// `host:port` that other nodes dial.
    pub peer: String,
    /// Where clients reach it.
    pub url: String,
    /// Where operators reach it.
    pub admin: String,
}

/// What the cluster is born with.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bootstrap {
    /// At least 32 characters that nobody can guess: makes connection keys self-proving.
    pub secret: String,
    #[serde(default)]
    pub apps: Vec<App>,
    #[serde(default)]
    pub bridges: Vec<Bridge>,
}

/// A tenant.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct App {
    pub id: String,
    #[serde(default)]
    pub keys: Vec<Key>,
    #[serde(default)]
    pub namespaces: Vec<Namespace>,
}

/// A key of an app.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    pub id: String,
    pub secret: String,
    /// JSON: resource to operations.
    #[serde(default = "default_capability")]
    pub capability: String,
    /// Its tokens can be revoked, and live an hour at most for that.
    #[serde(default)]
    pub revocable_tokens: bool,
}

/// A rule for the channels whose name begins with `id:`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    pub id: String,
    /// At least two minutes, whatever is said here; at most 365 days.
    #[serde(default)]
    pub retention_ms: u64,
    /// Bytes of messages retained of one channel beyond those two minutes. 0: no limit.
    #[serde(default)]
    pub retention_bytes: u64,
    /// Beyond those two minutes only a channel's newest record is retained.
    #[serde(default)]
    pub last_only: bool,
    /// Nothing is part of history; who was away for less than two minutes still misses nothing.
    #[serde(default)]
    pub ephemeral: bool,
}

/// A Kafka cluster to mirror with, by the convention.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bridge {
    pub id: String,
    pub app: String,
    pub bootstrap_servers: String,
    #[serde(default = "default_true")]
    pub inbound: bool,
    #[serde(default = "default_true")]
    pub outbound: bool,
}

/// Election timing, milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Raft {
    pub heartbeat_ms: u64,
    pub election_min_ms: u64,
    pub election_max_ms: u64,
}

impl Default for Raft {
    fn default() -> Self {
        let defaults = raft::Options::default();
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Self {
            heartbeat_ms: millis(defaults.heartbeat),
            election_min_ms: millis(defaults.election_min),
            election_max_ms: millis(defaults.election_max),
        }
    }
}

/// What clients may cost.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsFile {
    pub connections: usize,
    pub message_bytes: usize,
    pub frame_bytes: usize,
    pub channels_per_connection: usize,
    /// Bytes of publishes that may wait for one shard.
    pub waiting_bytes_per_shard: usize,
}

impl Default for LimitsFile {
    fn default() -> Self {
        let limits = Limits::default();
        Self {
            connections: 15_000,
            message_bytes: limits.max_message_bytes,
            frame_bytes: limits.max_frame_bytes,
            channels_per_connection: limits.max_channels,
            waiting_bytes_per_shard: 16 << 20,
        }
    }
}

/// Log lines.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    pub filter: String,
}

impl Default for Log {
    fn default() -> Self {
        let filter = telemetry::Options::default().filter;
        Self { filter }
    }
}

fn default_shards() -> u32 {
    16
}

fn default_capability() -> String {
    r#"{"*":["*"]}"#.to_owned()
}

const fn default_true() -> bool {
    true
}

/// Every room's options, checked.
#[derive(Debug)]
pub struct Config {
    pub telemetry: telemetry::Options,
    pub storage: crate::storage::Options,
    pub owner: crate::storage::Owner,
    /// Older index entries.
    pub archive: archive::Options,
    pub raft: raft::Options,
    pub transport: transport::Options,
    pub cluster: cluster::Options,
    pub gateway: gateway::Options,
    pub bridge: bridge::Options,
    pub admin: admin::Options,
}

impl Config {
    /// Reads the file and the environment, and checks everything.
    ///
    /// # Errors
    /// Names the file and the field that is unknown, missing or wrong.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|err| Error::Read {
            path: path.to_owned(),
            reason: err.to_string(),
        })?;
        // The file is read here, so that a missing one is an error; figment would take it for empty.
        let figment =
            Figment::from(Toml::string(&text)).merge(Env::prefixed("FIRTH__").split("__"));
        let file: File = figment.extract().map_err(|err| {
            let field = err.path.join(".");
            let path = path.to_owned();
            let from = err.metadata.as_ref().map(|from| from.name.as_ref());
            let reason = match from.filter(|from| from.contains("environment")) {
                Some(_) => format!("{} (set in the environment as FIRTH__…)", err.kind),
                None => err.kind.to_string(),
            };
            Error::Invalid {
                path,
                field: if field.is_empty() {
                    "top level".to_owned()
                } else {
                    field
                },
                reason,
            }
        })?;
        file.check(path)
    }
}

impl File {
    /// The file as text, for `firth dev` and for people.
    ///
    /// # Panics
    /// Never: every value of this type has a text.
    #[must_use]
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every value of this type has a text")
    }

    fn check(self, path: &Path) -> Result<Config, Error> {
        let invalid = |field: &str, reason: String| Error::Invalid {
            path: path.to_owned(),
            field: field.to_owned(),
            reason,
        };
        let nodes = &self.cluster.nodes;
        if !nodes.iter().any(|node| node.id == self.node) {
            let reason = format!("node {} is not among cluster.nodes", self.node);
            return Err(invalid("node", reason));
        }
        let ids: std::collections::BTreeSet<u64> = nodes.iter().map(|node| node.id).collect();
        if ids.len() != nodes.len() || ids.contains(&0) {
            let reason = "ids must be different and start at 1".to_owned();
            return Err(invalid("cluster.nodes", reason));
        }
        if ![1, 3, 5].contains(&nodes.len()) {
            let reason = format!("a cluster has 1, 3 or 5 nodes, not {}", nodes.len());
            return Err(invalid("cluster.nodes", reason));
        }
        if !(1..=256).contains(&self.cluster.shards) {
            let reason = "1 to 256 shards are possible".to_owned();
            return Err(invalid("cluster.shards", reason));
        }
        if !is_loopback(self.listen.admin.ip()) {
            let reason = "the admin listener knows no credentials yet, so only a loopback address is possible";
            return Err(invalid("listen.admin", reason.to_owned()));
        }
        if self.bootstrap.secret.len() < 32 {
            let reason = "at least 32 characters are needed".to_owned();
            return Err(invalid("bootstrap.secret", reason));
        }
        for (at, app) in self.bootstrap.apps.iter().enumerate() {
            (app.id.parse::<AppId>())
                .map_err(|err| invalid(&format!("bootstrap.apps.{at}.id"), err.to_string()))?;
            for (n, namespace) in app.namespaces.iter().enumerate() {
                if namespace.retention_ms > admin::RETENTION_MS_MAX {
                    let field = format!("bootstrap.apps.{at}.namespaces.{n}.retention_ms");
                    return Err(invalid(&field, "at most 365 days are possible".to_owned()));
                }
            }
            for (n, key) in app.keys.iter().enumerate() {
                crate::auth::Capability::parse(&key.capability).map_err(|err| {
                    let field = format!("bootstrap.apps.{at}.keys.{n}.capability");
                    invalid(&field, err.to_string())
                })?;
            }
        }
        let raft = self.raft.options();
        if raft.heartbeat * 2 > raft.election_min || raft.election_min >= raft.election_max {
            let reason =
                "twice the heartbeat, election_min_ms and election_max_ms must ascend".to_owned();
            return Err(invalid("raft", reason));
        }
        let storage = self.storage.check();
        storage.map_err(|(field, reason)| invalid(&format!("storage.{field}"), reason))?;
        Ok(self.compose(raft))
    }

    fn compose(self, raft: raft::Options) -> Config {
        let node = NodeId(self.node);
        let ids = self.cluster.nodes.iter().map(|node| NodeId(node.id));
        let peers = ids.zip(self.cluster.nodes.iter().map(|node| node.peer.clone()));
        let peers: BTreeMap<NodeId, String> = peers.filter(|(id, _)| *id != node).collect();
        let known = |node: &Node| {
            let (url, admin) = (node.url.clone(), node.admin.clone());
            (NodeId(node.id), cluster::Peer { url, admin })
        };
        let nodes = self.cluster.nodes.iter().map(known).collect();
        let limits = Limits {
            max_message_bytes: self.limits.message_bytes,
            max_frame_bytes: self.limits.frame_bytes,
            max_channels: self.limits.channels_per_connection,
            ..Limits::default()
        };
        let (peer, id) = (self.listen.peer, self.cluster.id.clone());
        Config {
            telemetry: telemetry::Options {
                filter: self.log.filter,
            },
            storage: self.storage.log(self.data),
            archive: self.storage.archive(),
            raft: self.storage.raft(raft),
            owner: crate::storage::Owner {
                cluster_id: id.clone(),
                node: self.node,
            },
            transport: transport::Options::new(peer, node, id.clone(), self.certs, peers),
            cluster: cluster::Options {
                node,
                nodes,
                shards: self.cluster.shards,
                bootstrap: self.bootstrap.into_control(id, self.cluster.shards),
                upkeep: self.storage.upkeep(),
                records_in_memory_max: self.storage.records_in_memory,
                waiting_bytes_max: self.limits.waiting_bytes_per_shard,
                clock: cluster::Clock::default(),
            },
            gateway: gateway::Options {
                listen: self.listen.client,
                connections_max: self.limits.connections,
                limits,
                members_max: gateway::MEMBERS_MAX,
            },
            bridge: bridge::Options::default(),
            admin: admin::Options {
                listen: self.listen.admin,
            },
        }
    }
}

impl Raft {
    fn options(&self) -> raft::Options {
        raft::Options {
            heartbeat: Duration::from_millis(self.heartbeat_ms),
            election_min: Duration::from_millis(self.election_min_ms),
            election_max: Duration::from_millis(self.election_max_ms),
            ..raft::Options::default()
        }
    }
}

impl Bootstrap {
    fn into_control(self, cluster_id: String, shards: u32) -> control::Bootstrap {
        let key = |key: Key| control::Key {
            id: key.id,
            secret: key.secret,
            capability: key.capability,
            revocable_tokens: key.revocable_tokens,
        };
        let namespace = |namespace: Namespace| control::Namespace {
            id: namespace.id,
            retention_ms: namespace.retention_ms,
            retention_bytes: namespace.retention_bytes,
            last_only: namespace.last_only,
            ephemeral: namespace.ephemeral,
        };
        let app = |app: App| control::App {
            id: app.id,
            keys: app.keys.into_iter().map(key).collect(),
            namespaces: app.namespaces.into_iter().map(namespace).collect(),
        };
        let bridge = |bridge: Bridge| control::Bridge {
            id: bridge.id,
            app: bridge.app,
            bootstrap_servers: bridge.bootstrap_servers,
            inbound: bridge.inbound,
            outbound: bridge.outbound,
        };
        control::Bootstrap {
            cluster_id,
            shards,
            secret: self.secret.into_bytes().into(),
            apps: self.apps.into_iter().map(app).collect(),
            bridges: self.bridges.into_iter().map(bridge).collect(),
        }
    }
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        node = 1
        data = "data"
        certs = "certs"
        [listen]
        client = "127.0.0.1:8080"
        admin = "127.0.0.1:9080"
        peer = "127.0.0.1:7080"
        [cluster]
        id = "test"
        [[cluster.nodes]]
        id = 1
        peer = "127.0.0.1:7080"
        url = "http://127.0.0.1:8080"
        admin = "http://127.0.0.1:9080"
        [bootstrap]
        secret = "0123456789abcdef0123456789abcdef"
    "#;

    fn load(text: &str) -> Result<Config, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    }

    fn complaint(text: &str) -> String {
        load(text).unwrap_err().to_string()
    }

    #[test]
    fn a_good_file_fills_every_rooms_options() {
        let config = load(GOOD).unwrap();
        assert_eq!(config.cluster.shards, 16);
        assert!(
            config.transport.peers.is_empty(),
            "a node is not its own peer"
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_file_and_field() {
        let unknown = complaint(&GOOD.replace("[listen]", "[listen]\nclimate = 1"));
        assert!(
            unknown.contains("node.toml") && unknown.contains("climate"),
            "{unknown}"
        );
        let wrong = complaint(&GOOD.replace(
            "127.0.0.1:9080\"\n        peer",
            "0.0.0.0:9080\"\n        peer",
        ));
        assert!(wrong.contains("listen.admin"), "{wrong}");
        let missing = complaint(&GOOD.replace("node = 1", ""));
        assert!(missing.contains("node"), "{missing}");
        let short = complaint(&GOOD.replace("0123456789abcdef0123", ""));
        assert!(short.contains("bootstrap.secret"), "{short}");
        let stranger = complaint(&GOOD.replace("node = 1", "node = 2"));
        assert!(stranger.contains("cluster.nodes"), "{stranger}");
        let absent = Config::load(Path::new("/nonexistent/x.toml")).unwrap_err();
        assert!(absent.to_string().contains("/nonexistent/x.toml"));
    }

    #[test]
    fn a_file_is_written_as_it_is_read() {
        let file: File = Figment::from(Toml::string(GOOD)).extract().unwrap();
        let text = file.to_toml();
        load(&text).unwrap();
    }
}
