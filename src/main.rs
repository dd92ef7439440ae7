//! The `firth` command.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use firth::config::Config;
use firth::transport::certs;
use firth::types::NodeId;
use firth::{admin, client, node, storage};

/// The system's allocator keeps an arena per thread, and much of what is freed stays with whichever arena it came from.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A clustered edge broker: Kafka's streams to every browser and phone, and back, in order, exactly once
#[derive(Debug, Parser)]
#[command(version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a whole cluster on this machine, nothing else needed
    Dev(node::dev::Args),
    /// Run one node
    Serve(Serve),
    #[command(flatten)]
    Client(client::Command),
    /// Put load on a cluster, or on this machine's disk, and measure it
    #[command(subcommand)]
    Bench(Bench),
    /// Ask a node about its cluster
    Admin(Admin),
    /// Make certificates for the nodes of a cluster
    #[command(subcommand)]
    Certs(Certs),
}

#[derive(Debug, Subcommand)]
enum Bench {
    #[command(flatten)]
    Cluster(client::BenchCommand),
    /// A node's log on this machine: appends beside the raw limit of the disk, or the time to open it
    Log(storage::bench::Args),
}

#[derive(Debug, clap::Args)]
struct Serve {
    /// The node's configuration, TOML
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Check the configuration and end
    #[arg(long)]
    check: bool,
    /// Stop when standard input ends
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
}

#[derive(Debug, clap::Args)]
struct Admin {
    /// A node's admin listener
    #[arg(long, global = true, default_value = "http://127.0.0.1:9080")]
    url: String,
    #[command(subcommand)]
    command: AdminCommand,
}

#[derive(Debug, Subcommand)]
enum AdminCommand {
    /// Nodes, shards, leaders, bridges
    Status {
        /// Output form
        #[arg(short, long, value_parser = ["table", "json"], default_value = "table")]
        output: String,
    },
    /// Nodes of the cluster
    #[command(subcommand)]
    Node(NodeCommand),
    #[command(subcommand)]
    App(admin::AppCommand),
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Let a node take part again that lost its data and was started with an empty directory.
    ///
    /// It leaves every group, and comes back into each: first it learns, and when it has everything it votes. The other nodes
    /// serve meanwhile. Ask any of those (`--url`). Waits until it is done.
    Readmit {
        /// The node's number
        node: u64,
        /// Return as soon as the cluster has decided it
        #[arg(long)]
        no_wait: bool,
    },
}

#[derive(Debug, Subcommand)]
enum Certs {
    /// Create a certificate authority
    Ca {
        /// Directory to write to; nothing in it is overwritten
        dir: PathBuf,
    },
    /// Create a node's certificate, signed by the authority
    Node {
        /// Directory to write to; nothing in it is overwritten
        dir: PathBuf,
        /// Directory of the authority
        #[arg(long)]
        ca: PathBuf,
        /// The cluster's id
        #[arg(long)]
        cluster: String,
        /// The node's number
        #[arg(long)]
        node: u64,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let ran = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        let ran = runtime.block_on(sendable(run(cli.command)));
        // A blocked read of standard input must not hold the process.
        runtime.shutdown_background();
        ran
    });
    ran.unwrap_or_else(|err| {
        complain(&err);
        let usage = err.is::<firth::config::Error>();
        // As clap has it for a wrong call.
        ExitCode::from(if usage { 2 } else { 1 })
    })
}

#[expect(
    clippy::print_stderr,
    reason = "a command's last words belong to whoever called it"
)]
fn complain(err: &anyhow::Error) {
    eprintln!("firth: {err:#}");
}

/// Answers the caller; one that stopped reading wants no more.
fn say(text: &str) -> anyhow::Result<()> {
    use std::io::Write as _;
    match writeln!(std::io::stdout(), "{text}") {
        Err(err) if err.kind() != std::io::ErrorKind::BrokenPipe => Err(err.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Holds whoever writes a future that is driven here to what every spawned one is held to: a lock that is kept over an
/// await stops, with those who wait for it, the threads that everything else needs.
fn sendable<F: Future + Send>(future: F) -> F {
    future
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Dev(args) => node::dev::run(args).await?,
        Command::Serve(args) => serve(args).await?,
        Command::Client(command) => return Ok(client::run(command).await?),
        Command::Bench(Bench::Cluster(command)) => return Ok(client::bench(command).await?),
        Command::Bench(Bench::Log(args)) => say(&storage::bench::run(&args)?.to_string())?,
        Command::Admin(Admin { url, command }) => admin_command(&url, command).await?,
        Command::Certs(Certs::Ca { dir }) => certs::create_ca(&dir)?,
        Command::Certs(Certs::Node {
            dir,
            ca,
            cluster,
            node,
        }) => certs::create_node(&dir, &ca, &cluster, NodeId(node), &[])?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn admin_command(url: &str, command: AdminCommand) -> anyhow::Result<()> {
    match command {
        AdminCommand::Status { output } => {
            let status = admin::call::status(url).await?;
            match output.as_str() {
                "json" => say(&serde_json::to_string_pretty(&status)?),
                _ => say(&admin::call::table(&status)),
            }
        }
        AdminCommand::Node(NodeCommand::Readmit { node, no_wait }) => {
            admin::call::readmit(url, node, !no_wait, |line| say(&line)).await
        }
        AdminCommand::App(command) => admin::app_command::run(url, command, say).await,
    }
}

async fn serve(args: Serve) -> anyhow::Result<()> {
    let config = Config::load(&args.config)?;
    if args.check {
        return say(&format!("{}: good", args.config.display()));
    }
    node::run(config, node::stop_word(args.until_stdin_ends)).await
}
