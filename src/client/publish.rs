//! `firth pub`: publishes one message, or one per line of standard input.

use std::collections::VecDeque;
use std::io::Write;
use std::process::ExitCode;

use tokio::sync::mpsc;

use crate::client::{
    Connection, Error, Event, Events, INTERRUPTED, Pending, ServerArgs, interrupted, note,
};
use crate::tasks::{OnError, Tasks};
use crate::wire::ably::{Data, Message};

/// Lines read ahead of what is sent.
const LINES: usize = 256;

/// `firth pub`
#[derive(Clone, Debug, clap::Args)]
pub struct PubArgs {
    /// Channel to publish to
    channel: String,
    /// What to publish; `-` publishes each line of standard input, and nothing publishes a message without data
    data: Option<String>,
    /// Name of the messages
    #[arg(long)]
    name: Option<String>,
    /// Publish DATA this many times
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// Do not print the serials
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Publishes and prints the serial of each message once it is durable, one line each, in order. Data that is
/// acknowledged is never published twice, whatever happens to the connection.
///
/// # Errors
/// At the first message that is refused; those before it are published.
pub(super) async fn run(args: PubArgs, tasks: &Tasks) -> Result<ExitCode, Error> {
    let (connection, events) = Connection::connect(args.server.options(), tasks).await?;
    tasks.spawn("client.notes", OnError::Log, |_| async move {
        tell_changes(events).await;
        Ok(())
    });
    let mut printer = Printer {
        pending: VecDeque::new(),
        quiet: args.quiet,
        acked: 0,
    };
    let mut data = source(&args)?;
    let mut stop = std::pin::pin!(interrupted());
    let mut stopped = false;
    loop {
        let next = tokio::select! {
            next = data.recv() => next,
            () = &mut stop => {
                stopped = true;
                break;
            }
        };
        let Some(next) = next else { break };
        let message = Message {
            id: Some(message_id()?),
            name: args.name.clone(),
            data: next?.map(Data::Text),
            ..Message::default()
        };
        let pending = tokio::select! {
            pending = connection.publish(&args.channel, vec![message]) => pending?,
            () = &mut stop => {
                stopped = true;
                break;
            }
        };
        printer.pending.push_back(pending);
        printer.print_answered()?;
    }
    tokio::select! {
        printed = printer.print_all() => printed?,
        // A second interrupt, or the first while only answers are awaited.
        () = interrupted() => stopped = true,
        () = &mut stop, if !stopped => stopped = true,
    }
    let unanswered = printer.pending.len();
    if stopped {
        note(format_args!(
            "interrupted: {} published, {unanswered} without answer",
            printer.acked
        ));
    }
    connection.close().await;
    Ok(if stopped {
        ExitCode::from(INTERRUPTED)
    } else {
        ExitCode::SUCCESS
    })
}

/// What to publish, one item per message. Standard input is read by a thread of its own, because a read that
/// waits for a terminal cannot be cancelled.
fn source(args: &PubArgs) -> Result<mpsc::Receiver<Result<Option<String>, Error>>, Error> {
    let (tx, rx) = mpsc::channel(LINES);
    let lines = args.data.as_deref() == Some("-");
    let (data, count) = (args.data.clone(), args.count);
    let feed = move || {
        if lines {
            for line in std::io::stdin().lines() {
                let line = line
                    .map(Some)
                    .map_err(Error::io("cannot read standard input"));
                if tx.blocking_send(line).is_err() {
                    return;
                }
            }
            return;
        }
        for _ in 0..count {
            if tx.blocking_send(Ok(data.clone())).is_err() {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("firth-pub-input".to_owned());
    thread
        .spawn(feed)
        .map_err(Error::io("cannot start a thread"))?;
    Ok(rx)
}

/// An id that no other publish has, so that one sent again on a new connection is still known.
fn message_id() -> Result<String, Error> {
    use base64::Engine;
    let mut random = [0; 9];
    getrandom::fill(&mut random).map_err(|err| Error::Io {
        what: "no random numbers",
        reason: err.to_string(),
    })?;
    Ok(format!(
        "{}:0",
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(random)
    ))
}

struct Printer {
    pending: VecDeque<Pending>,
    quiet: bool,
    acked: u64,
}

impl Printer {
    /// Prints the serials that have come, as far as they are in order.
    fn print_answered(&mut self) -> Result<(), Error> {
        while let Some(front) = self.pending.front_mut() {
            let Some(answer) = front.try_answer()? else {
                break;
            };
            self.pending.pop_front();
            self.print(answer.outcome.map_err(Error::Refused)?)?;
        }
        Ok(())
    }

    async fn print_all(&mut self) -> Result<(), Error> {
        while let Some(front) = self.pending.front_mut() {
            let answer = front.answer().await?;
            self.pending.pop_front();
            self.print(answer.outcome.map_err(Error::Refused)?)?;
        }
        Ok(())
    }

    fn print(&mut self, serials: Vec<Option<String>>) -> Result<(), Error> {
        self.acked += 1;
        if self.quiet {
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        for serial in serials.into_iter().flatten() {
            writeln!(out, "{serial}").map_err(Error::io("cannot write to standard output"))?;
        }
        Ok(())
    }
}

async fn tell_changes(mut events: Events) {
    while let Some(event) = events.next().await {
        match event {
            Event::Disconnected { reason } => {
                note(format_args!("disconnected: {reason}; connecting again"))
            }
            Event::Connected { resumed: true } => note(format_args!("resumed")),
            _ => {}
        }
    }
}
