//! `firth dev`: a whole cluster on this machine, one process a node, for trying things out and for tests.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, ChildStdin, Command};

use crate::admin::call;
use crate::config;
use crate::node::Signals;
use crate::transport::certs;
use crate::types::NodeId;

/// Where operators reach a node, above its clients' port.
const ADMIN_ABOVE: u16 = 1000;
/// Where other nodes reach it, below.
const PEER_BELOW: u16 = 1000;
/// Ports for `--port 0` are looked for here: below what the system gives to outgoing connections, so that a node can
/// be restarted on its ports.
const FREE_PORTS: std::ops::Range<u16> = 12_000..30_000;
const READY_PATIENCE: Duration = Duration::from_secs(60);
const STOP_PATIENCE: Duration = Duration::from_secs(15);
const PERSISTED_MS: u64 = 24 * 3600 * 1000;

/// `firth dev`
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Nodes of the cluster: 1, 3 or 5
    #[arg(long, default_value_t = 3, value_parser = nodes)]
    nodes: u16,
    /// Port for clients of the first node, the next one for the second, and so on; 0 chooses free ones
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Directory of the cluster, which is the same again when started on it; without it the cluster is temporary
    #[arg(long)]
    data: Option<PathBuf>,
    /// Mirror with this Kafka in both directions, by the convention `/topic/key`
    #[arg(long, value_name = "HOST:PORT")]
    kafka: Option<String>,
    /// Write key, URLs and process ids here, as JSON, once every node serves
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
}

fn nodes(text: &str) -> Result<u16, String> {
    match text {
        "1" => Ok(1),
        "3" => Ok(3),
        "5" => Ok(5),
        _ => Err("a cluster has 1, 3 or 5 nodes".to_owned()),
    }
}

/// What makes the cluster the same one again; kept beside its nodes' data.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    cluster: String,
    nodes: u16,
    key: String,
    secret: String,
    kafka: Option<String>,
}

#[derive(Serialize)]
struct Ready<'a> {
    key: String,
    nodes: Vec<ReadyNode<'a>>,
}

#[derive(Serialize)]
struct ReadyNode<'a> {
    id: u64,
    url: &'a str,
    admin: &'a str,
    pid: u32,
    log: &'a Path,
    /// Starts this node again.
    command: Vec<String>,
}

/// One node's ports and files.
struct Plan {
    id: u64,
    client: SocketAddr,
    admin: SocketAddr,
    peer: SocketAddr,
    url: String,
    admin_url: String,
    config: PathBuf,
    log: PathBuf,
}

/// Runs the cluster until it is told to stop or none of its nodes is left.
///
/// # Errors
/// When a node cannot start; its own words are in the error.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let temporary = match args.data {
        Some(_) => None,
        None => Some(tempfile::Builder::new().prefix("firth-dev-").tempdir()?),
    };
    let data = match (&args.data, &temporary) {
        (Some(data), _) => data.clone(),
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => unreachable!("one of the two was just made"),
    };
    std::fs::create_dir_all(&data).with_context(|| format!("cannot create {}", data.display()))?;
    let data = data.canonicalize()?;
    let kept = keep(&data, &args)?;
    let plans = plan(&data, args.port, kept.nodes)?;
    prepare(&data, &kept, &plans)?;
    let program = std::env::current_exe()?;
    let mut children = BTreeMap::new();
    for plan in &plans {
        children.insert(plan.id, start(&program, plan)?);
    }
    let mut stop = Signals::new()?;
    let key = format!("app.{}", kept.key);
    let served = tokio::select! {
        served = wait_ready(&plans, &mut children) => served.map(|()| true),
        () = stop.received() => Ok(false),
    };
    if matches!(served, Ok(true)) {
        if let Some(file) = &args.ready_file {
            write_ready(file, &program, &key, &plans, &children)?;
        }
        greet(&data, &key, &plans, &kept)?;
        supervise(&program, &plans, &mut children, &mut stop).await?;
    }
    stop_children(&mut children).await;
    served.map(|_| ())
}

/// Reads what makes the cluster the same, or invents it.
fn keep(data: &Path, args: &Args) -> anyhow::Result<Kept> {
    let path = data.join("dev.toml");
    if path.exists() {
        let text = std::fs::read_to_string(&path)?;
        let kept: Kept = toml::from_str(&text).with_context(|| path.display().to_string())?;
        if kept.nodes != args.nodes {
            let (kept, path) = (kept.nodes, path.display());
            bail!("{path}: nodes: this cluster has {kept} nodes; --nodes cannot change that");
        }
        if args.kafka.is_some() && args.kafka != kept.kafka {
            let path = path.display();
            bail!("{path}: kafka: the mapping is fixed when the cluster is created");
        }
        return Ok(kept);
    }
    let kept = Kept {
        cluster: format!("dev-{}", random_text(4)?),
        nodes: args.nodes,
        key: format!("dev{}:{}", random_text(3)?, random_text(16)?),
        secret: random_text(32)?,
        kafka: args.kafka.clone(),
    };
    write_secret(&path, &toml::to_string(&kept)?)?;
    Ok(kept)
}

fn random_text(bytes: usize) -> anyhow::Result<String> {
    let mut random = vec![0; bytes];
    getrandom::fill(&mut random).map_err(|err| anyhow::anyhow!("no randomness: {err}"))?;
    let mut text = String::new();
    random
        .iter()
        .try_for_each(|byte| write!(text, "{byte:02x}"))?;
    Ok(text)
}

fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let file = options.open(path);
    let mut file = file.with_context(|| format!("cannot write {}", path.display()))?;
    Ok(file.write_all(text.as_bytes())?)
}

fn plan(data: &Path, port: u16, nodes: u16) -> anyhow::Result<Vec<Plan>> {
    let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut free = FreePorts::new()?;
    let mut plans = Vec::new();
    for at in 0..nodes {
        let (client, admin, peer) = match port {
            0 => (free.take()?, free.take()?, free.take()?),
            _ => {
                let client = port.checked_add(at).context("--port is too high")?;
                let admin = client
                    .checked_add(ADMIN_ABOVE)
                    .context("--port is too high")?;
                let peer = client.checked_sub(PEER_BELOW).filter(|port| *port > 0);
                (client, admin, peer.context("--port is too low")?)
            }
        };
        let id = u64::from(at) + 1;
        plans.push(Plan {
            id,
            client: local(client),
            admin: local(admin),
            peer: local(peer),
            url: format!("http://127.0.0.1:{client}"),
            admin_url: format!("http://127.0.0.1:{admin}"),
            config: data.join(format!("node-{id}.toml")),
            log: data.join(format!("node-{id}.log")),
        });
    }
    Ok(plans)
}

struct FreePorts(u16);

impl FreePorts {
    fn new() -> anyhow::Result<Self> {
        let mut random = [0; 2];
        getrandom::fill(&mut random).map_err(|err| anyhow::anyhow!("no randomness: {err}"))?;
        let span = FREE_PORTS.end - FREE_PORTS.start;
        Ok(Self(FREE_PORTS.start + u16::from_le_bytes(random) % span))
    }

    fn take(&mut self) -> anyhow::Result<u16> {
        for _ in FREE_PORTS {
            self.0 = if self.0 + 1 < FREE_PORTS.end {
                self.0 + 1
            } else {
                FREE_PORTS.start
            };
            let address = (Ipv4Addr::LOCALHOST, self.0);
            if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
                return Ok(self.0);
            }
        }
        bail!(
            "no free port between {} and {}",
            FREE_PORTS.start,
            FREE_PORTS.end
        )
    }
}

/// Certificates on first start, and each node's configuration.
fn prepare(data: &Path, kept: &Kept, plans: &[Plan]) -> anyhow::Result<()> {
    let ca = data.join("certs").join("ca");
    if !ca.exists() {
        certs::create_ca(&ca)?;
    }
    let nodes = plans.iter().map(|plan| config::Node {
        id: plan.id,
        peer: plan.peer.to_string(),
        url: plan.url.clone(),
        admin: plan.admin_url.clone(),
    });
    let nodes: Vec<config::Node> = nodes.collect();
    for plan in plans {
        let dir = data.join("certs").join(format!("node-{}", plan.id));
        if !dir.exists() {
            certs::create_node(&dir, &ca, &kept.cluster, NodeId(plan.id), &[])?;
        }
        let file = config::File {
            node: plan.id,
            data: data.join(format!("node-{}", plan.id)),
            certs: dir,
            listen: config::Listen {
                client: plan.client,
                admin: plan.admin,
                peer: plan.peer,
            },
            cluster: config::Cluster {
                id: kept.cluster.clone(),
                shards: 16,
                nodes: nodes.clone(),
            },
            bootstrap: bootstrap(kept)?,
            raft: config::Raft::default(),
            storage: config::Storage::default(),
            limits: config::LimitsFile::default(),
            log: config::Log::default(),
        };
        write_secret(&plan.config, &file.to_toml())?;
    }
    Ok(())
}

fn bootstrap(kept: &Kept) -> anyhow::Result<config::Bootstrap> {
    let (id, secret) = kept
        .key
        .split_once(':')
        .context("dev.toml: key: not `id:secret`")?;
    let key = config::Key {
        id: id.to_owned(),
        secret: secret.to_owned(),
        capability: r#"{"*":["*"]}"#.to_owned(),
        revocable_tokens: false,
    };
    let namespace = config::Namespace {
        id: "persisted".to_owned(),
        retention_ms: PERSISTED_MS,
        retention_bytes: 0,
        last_only: false,
        ephemeral: false,
    };
    let app = config::App {
        id: "app".to_owned(),
        keys: vec![key],
        namespaces: vec![namespace],
    };
    let bridge = |servers: &String| config::Bridge {
        id: "kafka".to_owned(),
        app: "app".to_owned(),
        bootstrap_servers: servers.clone(),
        inbound: true,
        outbound: true,
    };
    Ok(config::Bootstrap {
        secret: kept.secret.clone(),
        apps: vec![app],
        bridges: kept.kafka.iter().map(bridge).collect(),
    })
}

fn command(program: &Path, plan: &Plan) -> Vec<String> {
    let text = |path: &Path| path.display().to_string();
    vec![
        text(program),
        "serve".into(),
        "--config".into(),
        text(&plan.config),
    ]
}

/// A node's process. Waiting for a process closes its input, and the end of its input is a node's word to stop: so the
/// input is kept apart.
struct Running {
    child: Child,
    input: Option<ChildStdin>,
}

/// The node stops when its standard input ends: it never outlives this process.
fn start(program: &Path, plan: &Plan) -> anyhow::Result<Running> {
    let mut options = std::fs::OpenOptions::new();
    let log = options.create(true).append(true).open(&plan.log);
    let log = log.with_context(|| format!("cannot write {}", plan.log.display()))?;
    let mut child = Command::new(program)
        .args(&command(program, plan)[1..])
        .arg("--until-stdin-ends")
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        // An interrupt at the terminal is this process's to pass on.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let input = child.stdin.take();
    Ok(Running { child, input })
}

async fn wait_ready(plans: &[Plan], children: &mut BTreeMap<u64, Running>) -> anyhow::Result<()> {
    let until = tokio::time::Instant::now() + READY_PATIENCE;
    for plan in plans {
        while call::get(&plan.admin_url, "/health/ready").await.is_err() {
            for plan in plans {
                let child = children
                    .get_mut(&plan.id)
                    .context("every node was started")?;
                if let Some(status) = child.child.try_wait()? {
                    bail!(
                        "node {} ended ({status}):\n{}",
                        plan.id,
                        last_lines(&plan.log)
                    );
                }
            }
            if tokio::time::Instant::now() > until {
                bail!(
                    "node {} is not ready after a minute:\n{}",
                    plan.id,
                    last_lines(&plan.log)
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

fn last_lines(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let start = lines.len().saturating_sub(12);
    lines[start..].join("\n")
}

fn write_ready(
    file: &Path,
    program: &Path,
    key: &str,
    plans: &[Plan],
    children: &BTreeMap<u64, Running>,
) -> anyhow::Result<()> {
    let nodes = plans.iter().map(|plan| ReadyNode {
        id: plan.id,
        url: &plan.url,
        admin: &plan.admin_url,
        pid: children
            .get(&plan.id)
            .and_then(|node| node.child.id())
            .unwrap_or(0),
        log: &plan.log,
        command: command(program, plan),
    });
    let ready = Ready {
        key: key.to_owned(),
        nodes: nodes.collect(),
    };
    // Whoever waits for the file finds it whole.
    let partial = file.with_extension("partial");
    write_secret(&partial, &serde_json::to_string_pretty(&ready)?)?;
    std::fs::rename(&partial, file).with_context(|| format!("cannot write {}", file.display()))
}

fn greet(data: &Path, key: &str, plans: &[Plan], kept: &Kept) -> anyhow::Result<()> {
    let mut text = format!(
        "\n  Firth is running: {} nodes, 16 shards, mutual TLS between them.\n\n",
        plans.len()
    );
    for plan in plans {
        writeln!(
            text,
            "  node {}   clients {}   operators {}",
            plan.id, plan.url, plan.admin_url
        )?;
    }
    let last = plans.last().unwrap_or(&plans[0]);
    writeln!(text, "\n  API key  {key}")?;
    writeln!(text, "  Data     {}", data.display())?;
    if let Some(kafka) = &kept.kafka {
        writeln!(
            text,
            "  Kafka    {kafka}: channel /topic/key is topic `topic`, key `key`, both ways"
        )?;
    }
    writeln!(text, "\n  Open these two pages and chat across nodes:")?;
    writeln!(text, "    {}/#key={key}", plans[0].url)?;
    writeln!(text, "    {}/#key={key}", last.url)?;
    writeln!(text, "\n  Or at the command line:")?;
    writeln!(text, "    export FIRTH_KEY={key}")?;
    writeln!(text, "    firth sub --url {} hello", last.url)?;
    writeln!(text, "    firth pub --url {} hello world", plans[0].url)?;
    writeln!(text, "    firth admin status --url {}", plans[0].admin_url)?;
    writeln!(text, "\n  Press Ctrl-C to stop.\n")?;
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

/// Watches the nodes. One that ends is told of and not restarted: it may have been killed on purpose.
async fn supervise(
    program: &Path,
    plans: &[Plan],
    children: &mut BTreeMap<u64, Running>,
    stop: &mut Signals,
) -> anyhow::Result<()> {
    while !children.is_empty() {
        let ends = children.iter_mut().map(|(id, node)| {
            let id = *id;
            Box::pin(async move { (id, node.child.wait().await) })
        });
        let ended = tokio::select! {
            () = stop.received() => return Ok(()),
            (ended, _, _) = futures_util::future::select_all(ends) => ended,
        };
        let (id, status) = ended;
        children.remove(&id);
        let plan = plans
            .iter()
            .find(|plan| plan.id == id)
            .context("a node of the plan")?;
        let again = command(program, plan).join(" ");
        let log = plan.log.display();
        let text = format!(
            "  node {id} ended ({}); its log: {log}\n  start it again: {again}\n",
            status?
        );
        std::io::stdout().write_all(text.as_bytes())?;
    }
    Ok(())
}

async fn stop_children(children: &mut BTreeMap<u64, Running>) {
    for node in children.values_mut() {
        drop(node.input.take());
    }
    for (id, node) in children {
        let child = &mut node.child;
        if tokio::time::timeout(STOP_PATIENCE, child.wait())
            .await
            .is_err()
        {
            tracing::warn!(node = id, "did not stop in time and is killed");
            // It may have ended by itself meanwhile.
            let _ = child.kill().await;
        }
    }
}
