//! `firth sub`: prints the messages of a channel.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;

use base64::Engine;

use crate::client::{Connection, Error, Event, Options, ServerArgs, interrupted, note};
use crate::tasks::Tasks;
use crate::wire::ably::{self, Data, Format, Message};

/// `firth sub`
#[derive(Clone, Debug, clap::Args)]
pub struct SubArgs {
    /// Channel to attach to
    channel: String,
    /// Stop after this many messages
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Print each message as a JSON object
    #[arg(long)]
    json: bool,
    /// Begin after this channel serial instead of now
    #[arg(long, value_name = "SERIAL")]
    from: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Prints messages, one line each, until `--count` or an interrupt. Reconnects and goes on after the last
/// message printed; standard error tells about it, and above all when messages were lost.
///
/// # Errors
/// When the server refuses the credentials or the channel.
pub(super) async fn run(args: SubArgs, tasks: &Tasks) -> Result<ExitCode, Error> {
    let options = Options {
        // Whoever watches a channel wants to go on watching.
        give_up: None,
        ..args.server.options()
    };
    let (connection, mut events) = Connection::connect(options, tasks).await?;
    connection
        .attach(&args.channel, args.from.clone(), BTreeMap::new())
        .await?;
    let mut stop = std::pin::pin!(interrupted());
    let mut left = args.count;
    // The first consent is an answer to a wish, the later ones are news.
    let mut fresh = args.from.is_none();
    while left != Some(0) {
        let event = tokio::select! {
            event = events.next() => event,
            () = &mut stop => break,
        };
        match event.ok_or(Error::Closed)? {
            Event::Messages(messages) => print(&messages.messages, &mut left, args.json)?,
            Event::Disconnected { reason } => {
                note(format_args!("disconnected: {reason}; connecting again"))
            }
            Event::Connected { .. } => {}
            Event::Attached { resumed: true, .. } if std::mem::take(&mut fresh) => {}
            Event::Attached { resumed: true, .. } => {
                note(format_args!("attached again, nothing was missed"))
            }
            Event::Attached { .. } if std::mem::take(&mut fresh) => {}
            Event::Attached { error, .. } => {
                let why =
                    error.map_or_else(|| "no reason given".to_owned(), |error| error.to_string());
                note(format_args!(
                    "continuity lost, messages may be missing: {why}"
                ));
            }
            Event::ChannelFailed { error, .. } => return Err(Error::Refused(error)),
            Event::Failed(error) => return Err(error),
        }
    }
    connection.close().await;
    Ok(ExitCode::SUCCESS)
}

fn print(messages: &[Message], left: &mut Option<u64>, json: bool) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    for message in messages {
        if *left == Some(0) {
            break;
        }
        let line = if json {
            json_line(message)
        } else {
            text_line(message)
        };
        writeln!(out, "{line}").map_err(Error::io("cannot write to standard output"))?;
        if let Some(left) = left {
            *left -= 1;
        }
    }
    out.flush()
        .map_err(Error::io("cannot write to standard output"))
}

fn json_line(message: &Message) -> String {
    String::from_utf8_lossy(&ably::encode_value(Format::Json, message)).into_owned()
}

/// Serial, name and data, with tabs between; binary data as base64. Whatever a publisher wrote, it stays one line
/// and cannot steer the terminal.
fn text_line(message: &Message) -> String {
    let data = match &message.data {
        Some(Data::Text(text)) => plain(text),
        Some(Data::Binary(bytes)) => base64::engine::general_purpose::STANDARD.encode(bytes),
        None => String::new(),
    };
    let or_dash = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), plain);
    format!(
        "{}\t{}\t{data}",
        or_dash(&message.serial),
        or_dash(&message.name)
    )
}

fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            plain.extend(c.escape_default());
        } else {
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_one_line_and_cannot_steer_the_terminal() {
        let message = Message {
            serial: Some("s1".to_owned()),
            data: Some(Data::Text("é a\nb\x1b[2J".to_owned())),
            ..Message::default()
        };
        assert_eq!(text_line(&message), "s1\t-\té a\\nb\\u{1b}[2J");
        assert!(!json_line(&message).contains('\n'));
        let binary = Message {
            name: Some("n".to_owned()),
            data: Some(Data::Binary(vec![1, 2, 3].into())),
            ..Message::default()
        };
        assert_eq!(text_line(&binary), "-\tn\tAQID");
    }
}
