//! What a bench says in the end: numbers, what they were measured on, and whether every message came.

use std::fmt::Write;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::client::bench::counters::Counters;
use crate::client::bench::format_name;
use crate::client::bench::load::{Measured, Plan};

/// Everything measured; as JSON, one object. Latencies in microseconds, durations in seconds.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    bench: &'static str,
    /// Interrupted: the numbers hold for what was done until then.
    partial: bool,
    verified: bool,
    /// What was wrong, if anything.
    failures: Vec<String>,
    settings: Settings,
    machine: Machine,
    publish: Publish,
    #[serde(skip_serializing_if = "Option::is_none")]
    delivery: Option<Delivery>,
    reconnects: u64,
}

#[derive(Debug, Serialize)]
struct Settings {
    urls: Vec<String>,
    format: &'static str,
    channels: usize,
    publishers: usize,
    subscribers: usize,
    messages: u64,
    size_bytes: usize,
    window: usize,
    rate_per_sec: Option<f64>,
}

#[derive(Debug, Serialize)]
struct Machine {
    cores: usize,
    cpu: String,
    kernel: String,
}

#[derive(Debug, Serialize)]
struct Publish {
    seconds: f64,
    sent: u64,
    acked: u64,
    refused: u64,
    unanswered: u64,
    acked_per_sec: f64,
    data_bytes: u64,
    data_bytes_per_sec: f64,
    ack_us: Percentiles,
}

#[derive(Debug, Serialize)]
struct Delivery {
    seconds: f64,
    expected: u64,
    received: u64,
    missing: u64,
    duplicates: u64,
    out_of_order: u64,
    foreign: u64,
    discontinuities: u64,
    received_per_sec: f64,
    data_bytes: u64,
    data_bytes_per_sec: f64,
    delivery_us: Percentiles,
}

#[derive(Debug, Serialize)]
struct Percentiles {
    p50: u64,
    p90: u64,
    p99: u64,
    p999: u64,
    max: u64,
}

impl Percentiles {
    fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: histogram.max(),
        }
    }
}

impl Machine {
    /// Of the load generator; the servers may run elsewhere.
    fn here() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let cpu_info = read("/proc/cpuinfo");
        let model = cpu_info.lines().find(|line| line.starts_with("model name"));
        let cpu = model
            .and_then(|line| line.split(':').nth(1))
            .unwrap_or("unknown");
        let kernel = read("/proc/sys/kernel/osrelease");
        let kernel = if kernel.is_empty() {
            std::env::consts::OS
        } else {
            kernel.trim()
        };
        Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: cpu.trim().to_owned(),
            kernel: kernel.to_owned(),
        }
    }
}

fn per_sec(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 {
        count as f64 / seconds
    } else {
        0.0
    }
}

impl Report {
    pub(super) fn new(plan: &Plan, counters: &Counters, measured: Measured) -> Self {
        let publishing = measured.publishing.as_secs_f64();
        let elapsed = measured.elapsed.as_secs_f64();
        let (acked, received) = (counters.acked.now(), counters.received.now());
        let size = plan.size as u64;
        let delivery = (plan.subscribers_per_channel > 0).then(|| Delivery {
            seconds: elapsed,
            expected: measured.expected,
            received,
            missing: measured.expected.saturating_sub(received),
            duplicates: counters.duplicates.now(),
            out_of_order: counters.disordered.now(),
            foreign: counters.foreign.now(),
            discontinuities: counters.discontinuities.now(),
            received_per_sec: per_sec(received, elapsed),
            data_bytes: received * size,
            data_bytes_per_sec: per_sec(received * size, elapsed),
            delivery_us: Percentiles::of(&counters.delivery()),
        });
        let failures = failures(plan, &measured, acked, delivery.as_ref());
        Self {
            bench: plan.bench,
            partial: measured.partial,
            verified: failures.is_empty(),
            failures,
            settings: Settings {
                urls: plan.options.urls.clone(),
                format: format_name(plan.options.format),
                channels: plan.channels,
                publishers: plan.publishers,
                subscribers: plan.subscribers(),
                messages: plan.messages,
                size_bytes: plan.size,
                window: plan.options.window,
                rate_per_sec: plan.rate,
            },
            machine: Machine::here(),
            publish: Publish {
                seconds: publishing,
                sent: measured.sent,
                acked,
                refused: measured.refused,
                unanswered: measured.unanswered,
                acked_per_sec: per_sec(acked, publishing),
                data_bytes: acked * size,
                data_bytes_per_sec: per_sec(acked * size, publishing),
                ack_us: Percentiles::of(&measured.ack),
            },
            delivery,
            reconnects: counters.reconnects.now(),
        }
    }

    /// Whether every message came, once and in order.
    pub(super) fn verified(&self) -> bool {
        self.verified
    }

    pub(super) fn is_partial(&self) -> bool {
        self.partial
    }

    pub(super) fn json(&self) -> String {
        serde_json::to_string_pretty(self).expect("numbers and texts have a JSON form")
    }

    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        let (s, m, p) = (&self.settings, &self.machine, &self.publish);
        let mut line = |name: &str, value: String| {
            // Writing to memory cannot fail.
            let _ = writeln!(text, "{name:<14}{value}");
        };
        let partial = if self.partial {
            " (PARTIAL: interrupted)"
        } else {
            ""
        };
        line("bench", format!("{}{partial}", self.bench));
        line(
            "machine",
            format!("{} cores, {}, kernel {}", m.cores, m.cpu, m.kernel),
        );
        line("servers", s.urls.join(", "));
        let rate = s
            .rate_per_sec
            .map_or("unlimited".to_owned(), |rate| format!("{rate}/s"));
        line(
            "settings",
            format!(
                "{} messages of {} B, {} publishers, {} channels, {} subscribers, window {}, rate {rate}, {}",
                s.messages,
                s.size_bytes,
                s.publishers,
                s.channels,
                s.subscribers,
                s.window,
                s.format
            ),
        );
        line(
            "published",
            format!("{} acked of {} sent in {:.3} s", p.acked, p.sent, p.seconds),
        );
        line("", throughput(p.acked_per_sec, p.data_bytes_per_sec));
        line("ack", p.ack_us.text());
        if let Some(d) = &self.delivery {
            line(
                "delivered",
                format!("{} of {} in {:.3} s", d.received, d.expected, d.seconds),
            );
            line("", throughput(d.received_per_sec, d.data_bytes_per_sec));
            line("delivery", d.delivery_us.text());
        }
        line("reconnects", self.reconnects.to_string());
        let verdict = if self.verified {
            "every message, once, in order"
        } else {
            "FAILED"
        };
        line("verification", verdict.to_owned());
        for failure in &self.failures {
            line("", failure.clone());
        }
        text.truncate(text.trim_end().len());
        text
    }
}

impl Percentiles {
    fn text(&self) -> String {
        let Self {
            p50,
            p90,
            p99,
            p999,
            max,
        } = self;
        format!("p50 {p50} us, p90 {p90} us, p99 {p99} us, p99.9 {p999} us, max {max} us")
    }
}

fn throughput(messages: f64, bytes: f64) -> String {
    format!("{messages:.0} messages/s, {:.2} MB/s of data", bytes / 1e6)
}

/// What was wrong. An interrupt is not, but whatever was acknowledged must have come even then.
fn failures(
    plan: &Plan,
    measured: &Measured,
    acked: u64,
    delivery: Option<&Delivery>,
) -> Vec<String> {
    let mut found = Vec::new();
    let mut count = |number: u64, what: &str| {
        if number > 0 {
            found.push(format!("{number} {what}"));
        }
    };
    count(
        measured.refused,
        "publishes were refused or lost their connection",
    );
    count(
        measured.serials_disordered,
        "publishes got no serial or one out of order",
    );
    if !measured.partial {
        count(measured.unanswered, "publishes were never answered");
        count(
            plan.messages.saturating_sub(acked),
            "of the messages asked for were not acknowledged",
        );
    }
    if let Some(delivery) = delivery {
        count(delivery.missing, "deliveries are missing");
        count(delivery.duplicates, "deliveries came twice");
        count(
            delivery.out_of_order,
            "deliveries were out of order or skipped earlier ones",
        );
        count(delivery.foreign, "deliveries were not of this run");
        count(
            delivery.discontinuities,
            "times the server gave up continuity",
        );
    }
    if let Some(error) = &measured.first_error {
        found.push(format!("first error: {error}"));
    }
    found
}
