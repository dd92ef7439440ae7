//! `firth bench`: load, its latency and rate, and above all whether every message came.

mod counters;
mod load;
mod publisher;
mod report;
mod subscriber;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use self::counters::Counters;
use self::load::Plan;
use self::report::Report;
use crate::client::{Error, INTERRUPTED, Options, ServerArgs, interrupted, note};
use crate::tasks::{OnError, Tasks};
use crate::wire::ably::Format;

/// Options that both benches share.
#[derive(Clone, Debug, clap::Args)]
struct LoadArgs {
    /// Messages to publish in all
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    messages: u64,
    /// Bytes of data in each message
    #[arg(long, default_value_t = 100)]
    size: usize,
    /// Publishes without answer per publisher at one time
    #[arg(long, default_value_t = 64)]
    window: usize,
    /// Messages per second in all; as many as the window allows if not given
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// Begin of the channels' names
    #[arg(long, default_value = "bench")]
    prefix: String,
    /// Seconds without an answer or a delivery after which the missing ones count as lost
    #[arg(long, default_value_t = 10)]
    settle: u64,
    /// Put out one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// `firth bench publish`
#[derive(Clone, Debug, clap::Args)]
pub struct PublishBenchArgs {
    /// Channels to publish to in turn
    #[arg(long, default_value_t = 1, value_parser = count)]
    channels: usize,
    /// Connections that publish
    #[arg(long, default_value_t = 1, value_parser = count)]
    publishers: usize,
    /// Attach one subscriber per channel too, which verifies deliveries
    #[arg(long)]
    verify: bool,
    #[command(flatten)]
    load: LoadArgs,
}

/// `firth bench fanout`
#[derive(Clone, Debug, clap::Args)]
pub struct FanoutArgs {
    /// Connections attached to the channel
    #[arg(long, default_value_t = 100, value_parser = count)]
    subscribers: usize,
    #[command(flatten)]
    load: LoadArgs,
}

fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("it must be a whole number from 1".to_owned()),
        Ok(count) => Ok(count),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate.is_finite() => Ok(rate),
        _ => Err("it must be a number above 0".to_owned()),
    }
}

/// Runs `firth bench publish`.
pub(super) async fn publish(args: PublishBenchArgs, tasks: &Tasks) -> Result<ExitCode, Error> {
    let plan = Plan {
        channels: args.channels,
        publishers: args.publishers,
        subscribers_per_channel: usize::from(args.verify),
        ..plan("publish", &args.load)
    };
    run(plan, &args.load, tasks).await
}

/// Runs `firth bench fanout`.
pub(super) async fn fanout(args: FanoutArgs, tasks: &Tasks) -> Result<ExitCode, Error> {
    let plan = Plan {
        subscribers_per_channel: args.subscribers,
        ..plan("fanout", &args.load)
    };
    run(plan, &args.load, tasks).await
}

fn plan(bench: &'static str, load: &LoadArgs) -> Plan {
    Plan {
        bench,
        options: Options {
            window: load.window,
            echo: false,
            ..load.server.options()
        },
        channels: 1,
        publishers: 1,
        subscribers_per_channel: 0,
        messages: load.messages,
        size: load.size,
        rate: load.rate,
        prefix: load.prefix.clone(),
        settle: Duration::from_secs(load.settle),
    }
}

async fn run(plan: Plan, load: &LoadArgs, tasks: &Tasks) -> Result<ExitCode, Error> {
    let stop = CancellationToken::new();
    let interrupt = stop.clone();
    tasks.spawn("client.interrupt", OnError::Log, |token| async move {
        tokio::select! {
            () = interrupted() => interrupt.cancel(),
            () = token.cancelled() => {}
        }
        Ok(())
    });
    let counters = Counters::start();
    let progress = progress(&plan, &counters, tasks);
    let measured = load::run(&plan, &counters, tasks, &stop).await;
    progress.cancel();
    let Some(measured) = measured? else {
        note(format_args!("interrupted before the load began"));
        return Ok(ExitCode::from(INTERRUPTED));
    };
    let report = Report::new(&plan, &counters, measured);
    let text = if load.json {
        report.json()
    } else {
        report.table()
    };
    writeln!(std::io::stdout(), "{text}").map_err(Error::io("cannot write to standard output"))?;
    Ok(match (report.verified(), report.is_partial()) {
        (false, _) => ExitCode::FAILURE,
        (true, true) => ExitCode::from(INTERRUPTED),
        (true, false) => ExitCode::SUCCESS,
    })
}

/// Shows how far the load is, if somebody sits there to see it. Ends with the token returned.
fn progress(plan: &Plan, counters: &Arc<Counters>, tasks: &Tasks) -> CancellationToken {
    let done = CancellationToken::new();
    if !std::io::stderr().is_terminal() {
        return done;
    }
    let bar = indicatif::ProgressBar::new(plan.messages.saturating_add(plan.deliveries()));
    let style = "{elapsed_precise} {wide_bar} {pos}/{len} {per_sec} eta {eta}";
    if let Ok(style) = indicatif::ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    let (ended, counters) = (done.clone(), counters.clone());
    tasks.spawn("client.progress", OnError::Log, |token| async move {
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        loop {
            tokio::select! {
                _ = tick.tick() => bar.set_position(counters.acked.now() + counters.received.now()),
                () = ended.cancelled() => break,
                () = token.cancelled() => break,
            }
        }
        bar.finish_and_clear();
        Ok(())
    });
    done
}

fn format_name(format: Format) -> &'static str {
    match format {
        Format::Json => "json",
        Format::MsgPack => "msgpack",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::tests::broker::{self, Faults};
    use serde_json::Value;

    /// Runs a bench against a toy of a server and returns its report.
    async fn bench(faults: Faults, change: impl FnOnce(&mut Plan)) -> (bool, Value, String) {
        let url = broker::start(faults).await;
        let mut plan = Plan {
            bench: "publish",
            options: Options {
                retry_first: Duration::from_millis(1),
                window: 16,
                ..Options::new(vec![url], "app.key:secret")
            },
            channels: 3,
            publishers: 2,
            subscribers_per_channel: 2,
            messages: 1001,
            size: 50,
            rate: None,
            prefix: "bench".to_owned(),
            settle: Duration::from_millis(300),
        };
        change(&mut plan);
        let tasks = Tasks::root().0;
        let counters = Counters::start();
        let stop = CancellationToken::new();
        let measured = load::run(&plan, &counters, &tasks, &stop).await;
        let report = Report::new(&plan, &counters, measured.unwrap().unwrap());
        assert!(tasks.stop(Duration::from_secs(5)).await);
        let json = serde_json::from_str(&report.json()).unwrap();
        (report.verified(), json, report.table())
    }

    #[tokio::test]
    async fn a_good_server_is_verified() {
        for format in [Format::Json, Format::MsgPack] {
            let run = bench(Faults::default(), |plan| plan.options.format = format);
            let (verified, json, table) = run.await;
            assert!(verified, "{table}");
            assert_eq!(json["publish"]["acked"], 1001);
            assert_eq!(json["delivery"]["received"], 2002);
            assert!(json["delivery"]["delivery_us"]["max"].as_u64().unwrap() > 0);
            assert!(table.contains("every message, once, in order"), "{table}");
        }
    }

    #[tokio::test]
    async fn cuts_with_resume_lose_and_double_nothing() {
        let faults = Faults {
            cut_after: 100,
            ..Faults::default()
        };
        // Publishers are cut and subscribers are not: the toy has no log to continue from.
        let (verified, json, table) = bench(faults, |_| ()).await;
        assert!(verified, "{table}");
        assert_eq!(json["publish"]["acked"], 1001);
        assert_eq!(json["reconnects"], 10);
    }

    #[tokio::test]
    async fn a_loss_a_repeat_and_a_refusal_are_failures() {
        let every = 500;
        let lose = Faults {
            lose: every,
            ..Faults::default()
        };
        let double = Faults {
            double: every,
            ..Faults::default()
        };
        let refuse = Faults {
            refuse: every,
            ..Faults::default()
        };
        for (faults, field) in [(lose, "missing"), (double, "duplicates")] {
            let (verified, json, table) = bench(faults, |_| ()).await;
            assert!(!verified, "{table}");
            assert_eq!(json["delivery"][field], 4, "{table}");
        }
        let (verified, json, table) = bench(refuse, |_| ()).await;
        assert!(!verified, "{table}");
        assert_eq!(json["publish"]["refused"], 2);
    }

    #[tokio::test]
    async fn a_server_that_falls_mute_is_a_failure_and_not_a_wait() {
        let faults = Faults {
            mute_from: 500,
            ..Faults::default()
        };
        let (verified, json, table) = bench(faults, |_| ()).await;
        assert!(!verified, "{table}");
        assert_eq!(json["publish"]["acked"], 499);
        assert_eq!(json["publish"]["unanswered"], 32, "both windows: {table}");
    }

    #[tokio::test]
    async fn a_rate_is_kept_to() {
        let (verified, json, table) = bench(Faults::default(), |plan| {
            plan.messages = 100;
            plan.rate = Some(400.0);
        })
        .await;
        assert!(verified, "{table}");
        let seconds = json["publish"]["seconds"].as_f64().unwrap();
        assert!(seconds > 0.2, "{table}");
    }

    #[tokio::test]
    async fn an_interrupt_prints_what_there_is() {
        let url = broker::start(Faults::default()).await;
        let plan = Plan {
            bench: "fanout",
            options: Options::new(vec![url], "app.key:secret"),
            channels: 1,
            publishers: 1,
            subscribers_per_channel: 5,
            messages: u64::MAX / 100,
            size: 10,
            rate: None,
            prefix: "bench".to_owned(),
            settle: Duration::from_secs(5),
        };
        let tasks = Tasks::root().0;
        let (counters, stop) = (Counters::start(), CancellationToken::new());
        let interrupt = async {
            while counters.acked.now() < 100 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            stop.cancel();
        };
        let (measured, ()) = tokio::join!(load::run(&plan, &counters, &tasks, &stop), interrupt);
        let report = Report::new(&plan, &counters, measured.unwrap().unwrap());
        assert!(
            report.is_partial() && report.verified(),
            "{}",
            report.table()
        );
        assert!(report.table().contains("PARTIAL"));
    }

    #[test]
    fn arguments_are_checked() {
        use clap::Parser;
        #[derive(Debug, Parser)]
        struct Cli {
            #[command(subcommand)]
            _command: All,
        }
        #[derive(Debug, clap::Subcommand)]
        enum All {
            #[command(flatten)]
            Client(crate::client::Command),
            #[command(subcommand)]
            Bench(crate::client::BenchCommand),
        }
        let parse =
            |line: &str| Cli::try_parse_from(format!("firth {line} --key a.b:c").split(' '));
        for good in [
            "pub ch hello --name n --count 3",
            "pub ch -",
            "sub ch --count 1 --json",
            "sub ch --from s1",
            "bench publish --url http://a:1,http://b:2 --channels 4 --publishers 8 --messages 10 --size 10 --window 4 --json",
            "bench fanout --subscribers 10 --messages 10 --rate 100.5",
        ] {
            assert!(parse(good).is_ok(), "{good}: {:?}", parse(good).err());
        }
        for bad in [
            "bench publish --rate 0",
            "bench publish --publishers 0",
            "sub ch --count 0",
            "sub ch --rewind 2",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
