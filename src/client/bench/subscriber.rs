//! One connection that receives and checks every message.

use std::sync::Arc;
use std::time::Duration;

use crate::client::bench::counters::Counters;
use crate::client::{Event, Events};
use crate::wire::ably::Message;

/// Numbers jumped over that are remembered per publisher: a malformed one must not fill the memory.
const GAPS_MAX: usize = 10_000;

/// One connection attached to one channel.
pub(super) struct Subscriber {
    index: usize,
    channel: String,
    /// The next message expected of each publisher.
    next: Vec<u64>,
    /// Numbers that were jumped over, of each publisher.
    gaps: Vec<Vec<u64>>,
    counters: Arc<Counters>,
    attached: bool,
}

impl Subscriber {
    pub(super) fn new(
        index: usize,
        channel: &str,
        publishers: usize,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            index,
            channel: channel.to_owned(),
            next: vec![0; publishers],
            gaps: vec![Vec::new(); publishers],
            counters,
            attached: false,
        }
    }

    pub(super) async fn run(mut self, mut events: Events) -> anyhow::Result<()> {
        let counters = self.counters.clone();
        while let Some(event) = events.next().await {
            match event {
                Event::Messages(messages) => {
                    let since = messages.received.saturating_duration_since(counters.begin);
                    for message in &messages.messages {
                        self.on_message(message, since);
                    }
                    counters.on_delivery(messages.received);
                }
                Event::Disconnected { .. } => counters.reconnects.add(),
                Event::Attached { resumed, .. } => {
                    if std::mem::replace(&mut self.attached, true) && !resumed {
                        counters.discontinuities.add();
                    }
                }
                Event::ChannelFailed { error, .. } => {
                    anyhow::bail!("channel {}: {error}", self.channel)
                }
                Event::Failed(error) => return Err(error.into()),
                Event::Connected { .. } => {}
            }
        }
        Ok(())
    }

    fn on_message(&mut self, message: &Message, since: Duration) {
        let counters = &self.counters;
        let parsed = message.name.as_deref().and_then(parse_name);
        let Some((publisher, number, sent)) = parsed.filter(|(p, ..)| *p < self.next.len()) else {
            counters.foreign.add();
            return;
        };
        let (next, gaps) = (&mut self.next[publisher], &mut self.gaps[publisher]);
        if number < *next {
            match gaps.iter().position(|gap| *gap == number) {
                Some(gap) => {
                    gaps.swap_remove(gap);
                    counters.disordered.add();
                }
                None => {
                    counters.duplicates.add();
                    return;
                }
            }
        } else {
            if number > *next {
                counters.disordered.add();
                let room = GAPS_MAX.saturating_sub(gaps.len());
                gaps.extend((*next..number).take(room));
            }
            *next = number + 1;
        }
        counters.on_received(self.index, since.saturating_sub(sent));
    }
}

/// Publisher, number in the channel, and time since the begin.
fn parse_name(name: &str) -> Option<(usize, u64, Duration)> {
    let mut parts = name.split('.');
    let publisher = parts.next()?.parse().ok()?;
    let number = parts.next()?.parse().ok()?;
    let sent = Duration::from_nanos(parts.next()?.parse().ok()?);
    parts.next().is_none().then_some((publisher, number, sent))
}
