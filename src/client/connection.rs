//! A connection that survives its sockets: the task that drives a conversation, and the handle to it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::client::conversation::{Answer, Attach, Conversation, Event, Fate, Publish};
use crate::client::socket::{self, Socket};
use crate::client::{Error, Options};
use crate::stdx::Backoff;
use crate::tasks::{OnError, Tasks};
use crate::types::ErrorInfo;
use crate::wire::ably::{Action, Frame, Message};

/// Commands that wait for the driver.
const COMMANDS: usize = 256;
/// Events that wait for whoever follows them; beyond it the socket is not read.
const EVENTS: usize = 1024;
/// How long a goodbye may take.
const FAREWELL: Duration = Duration::from_secs(2);

enum Command {
    Publish(Publish),
    Attach(Attach),
    Close,
}

/// A connection to a cluster. Dropped, it says goodbye and ends.
#[derive(Debug)]
pub struct Connection {
    commands: mpsc::Sender<Command>,
    window: Arc<Semaphore>,
    answer_timeout: Duration,
    done: oneshot::Receiver<()>,
}

/// What happens on a connection. When it is not read, the socket is not read either, beyond a small store.
#[derive(Debug)]
pub struct Events(mpsc::Receiver<Event>);

impl Events {
    /// The next event; `None` after the connection has ended. Cancel-safe.
    pub async fn next(&mut self) -> Option<Event> {
        self.0.recv().await
    }
}

/// A publish on its way.
#[derive(Debug)]
pub struct Pending(oneshot::Receiver<Answer>);

impl Pending {
    /// Waits for the answer, once. Cancel-safe.
    ///
    /// # Errors
    /// `Closed` when the connection ended before it: the publish may have happened.
    pub async fn answer(&mut self) -> Result<Answer, Error> {
        (&mut self.0).await.map_err(|_| Error::Closed)
    }

    /// The answer if it has come; taken once.
    ///
    /// # Errors
    /// As [`Pending::answer`].
    pub fn try_answer(&mut self) -> Result<Option<Answer>, Error> {
        match self.0.try_recv() {
            Ok(answer) => Ok(Some(answer)),
            Err(oneshot::error::TryRecvError::Empty) => Ok(None),
            Err(oneshot::error::TryRecvError::Closed) => Err(Error::Closed),
        }
    }
}

impl Connection {
    /// Connects to the first of the options' URLs that answers. After this the connection looks after itself.
    ///
    /// # Errors
    /// When a URL is not valid, the server refuses the credentials, or none answers within `connect_timeout`.
    pub async fn connect(options: Options, tasks: &Tasks) -> Result<(Self, Events), Error> {
        for url in &options.urls {
            socket::address(url, &options, None)?;
        }
        if options.urls.is_empty() {
            return Err(Error::Url {
                url: String::new(),
                reason: "no URL is given",
            });
        }
        let (commands, commands_rx) = mpsc::channel(COMMANDS);
        let (events_tx, events) = mpsc::channel(EVENTS);
        let (done_tx, done) = oneshot::channel();
        let (connected_tx, connected) = oneshot::channel();
        let connection = Self {
            commands,
            window: Arc::new(Semaphore::new(
                options.window.clamp(1, Semaphore::MAX_PERMITS),
            )),
            answer_timeout: options.connect_timeout,
            done,
        };
        let driver = Driver {
            options,
            commands: commands_rx,
            events: events_tx,
            conversation: Conversation::default(),
            connected_tx: Some(connected_tx),
            url: 0,
            closing: false,
        };
        tasks.spawn("client.connection", OnError::Log, |token| async move {
            driver.run(token).await;
            drop(done_tx);
            Ok(())
        });
        connected.await.map_err(|_| Error::Closed)??;
        Ok((connection, Events(events)))
    }

    /// Attaches to `channel`, after `serial` if one is given, and waits for the consent.
    ///
    /// # Errors
    /// `Refused` with the server's reason; `Closed` when the connection has ended.
    pub async fn attach(
        &self,
        channel: &str,
        serial: Option<String>,
        params: BTreeMap<String, String>,
    ) -> Result<(), Error> {
        let (attached_tx, attached) = oneshot::channel();
        let attach = Attach {
            channel: channel.to_owned(),
            serial,
            params,
            attached_tx,
        };
        self.command(Command::Attach(attach)).await?;
        let attached = timeout(self.answer_timeout, attached).await;
        let outcome: Result<(), ErrorInfo> = attached
            .map_err(|_| Error::NoAnswer("the attach"))?
            .map_err(|_| Error::Closed)?;
        outcome.map_err(Error::Refused)
    }

    /// Publishes `messages` as one unit, in the order of the calls. Waits only until fewer than `window` publishes are
    /// without answer. Sent again after a reconnect, it is stored once.
    ///
    /// # Errors
    /// `Closed` when the connection has ended.
    pub async fn publish(&self, channel: &str, messages: Vec<Message>) -> Result<Pending, Error> {
        let room = self.window.clone().acquire_owned().await;
        let (answer_tx, answer) = oneshot::channel();
        let publish = Publish {
            channel: channel.to_owned(),
            messages,
            answer_tx,
            room: room.map_err(|_| Error::Closed)?,
        };
        self.command(Command::Publish(publish)).await?;
        Ok(Pending(answer))
    }

    /// Says goodbye; publishes without answer stay without.
    pub async fn close(self) {
        let Self { commands, done, .. } = self;
        // It may have ended by itself.
        let _ = commands.send(Command::Close).await;
        drop(commands);
        let _ = done.await;
    }

    async fn command(&self, command: Command) -> Result<(), Error> {
        self.commands.send(command).await.map_err(|_| Error::Closed)
    }
}

struct Driver {
    options: Options,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
    conversation: Conversation,
    /// Told once: connected, or why that will not be.
    connected_tx: Option<oneshot::Sender<Result<(), Error>>>,
    /// Which URL to try next.
    url: usize,
    closing: bool,
}

impl Driver {
    async fn run(mut self, token: CancellationToken) {
        let mut backoff = Backoff::new(self.options.retry_first, self.options.retry_longest);
        let mut lost = Instant::now();
        while !self.closing {
            let (fate, was_live) = self.one_socket(&token).await;
            if was_live {
                lost = Instant::now();
                backoff.reset();
            }
            match fate {
                Fate::Closed => break,
                Fate::Failed(error) => {
                    self.fail(error).await;
                    return;
                }
                Fate::Reconnect(reason) => {
                    self.conversation.on_lost(reason.clone());
                    self.url = (self.url + 1) % self.options.urls.len();
                    if lost.elapsed() >= self.patience() {
                        self.fail(Error::Unreachable { reason }).await;
                        return;
                    }
                    self.pause(backoff.pause(), &token).await;
                }
            }
        }
        self.deliver().await;
    }

    /// How long to go without a connection.
    fn patience(&self) -> Duration {
        match self.connected_tx {
            Some(_) => self.options.connect_timeout,
            None => self.options.give_up.unwrap_or(Duration::MAX),
        }
    }

    async fn fail(&mut self, error: Error) {
        self.conversation.on_failed(error.clone());
        if let Some(connected_tx) = self.connected_tx.take() {
            let _ = connected_tx.send(Err(error));
        }
        self.deliver().await;
    }

    /// Hands out the last events, as far as somebody takes them.
    async fn deliver(&mut self) {
        while let Some(event) = self.conversation.events.pop_front() {
            if timeout(FAREWELL, self.events.send(event)).await.is_err() {
                return;
            }
        }
    }

    /// Takes commands while there is no socket.
    async fn pause(&mut self, pause: Duration, token: &CancellationToken) {
        let until = Instant::now() + pause;
        while !self.closing {
            let command = tokio::select! {
                command = self.commands.recv() => command,
                () = tokio::time::sleep_until(until) => return,
                () = token.cancelled() => None,
            };
            self.on_command(command);
        }
    }

    /// Opens a socket and uses it to its end; also tells whether it came to a conversation.
    async fn one_socket(&mut self, token: &CancellationToken) -> (Fate, bool) {
        let resume = self.conversation.resume_key().map(str::to_owned);
        let url = self.options.urls[self.url].clone();
        let until = Instant::now() + self.options.connect_timeout;
        let options = self.options.clone();
        let opening = timeout_at(until, Socket::open(&url, &options, resume.as_deref()));
        let mut opening = std::pin::pin!(opening);
        let opened = loop {
            let command = tokio::select! {
                opened = &mut opening => break opened,
                command = self.commands.recv() => command,
                () = token.cancelled() => None,
            };
            self.on_command(command);
            if self.closing {
                return (Fate::Closed, false);
            }
        };
        let mut socket = match opened {
            Ok(Ok(socket)) => socket,
            Ok(Err(reason)) => return (Fate::Reconnect(format!("{url}: {reason}")), false),
            Err(_) => return (Fate::Reconnect(format!("{url}: no answer")), false),
        };
        let fate = self.pump(&mut socket, token).await;
        let was_live = self.conversation.is_live();
        if !matches!(fate, Fate::Reconnect(_)) {
            // A lost socket takes no goodbye.
            let _ = timeout(FAREWELL, socket.close()).await;
        }
        (fate, was_live)
    }

    /// Moves frames until the socket is of no further use.
    async fn pump(&mut self, socket: &mut Socket, token: &CancellationToken) -> Fate {
        let mut silent_until = Instant::now() + self.options.connect_timeout;
        let events = self.events.clone();
        loop {
            // Whoever does not read events holds the socket back, not the publishes.
            let read = self.conversation.events.is_empty() || self.events.is_closed();
            let conversation = &mut self.conversation;
            let mut command = None;
            tokio::select! {
                frame = socket.exchange(&mut conversation.out, read) => {
                    match frame {
                        Ok(Some(frame)) => {
                            if let Err(fate) = self.on_frame(frame) {
                                return fate;
                            }
                        }
                        Ok(None) => {}
                        Err(reason) => return self.on_broken(reason),
                    }
                    silent_until = Instant::now() + self.silence();
                }
                taken = self.commands.recv(), if !self.closing => command = Some(taken),
                room = events.reserve(), if !read => match room {
                    Ok(room) => if let Some(event) = conversation.events.pop_front() {
                        room.send(event);
                        silent_until = Instant::now() + self.silence();
                    },
                    Err(_) => conversation.events.clear(),
                },
                () = sleep(silent_until.saturating_duration_since(Instant::now())), if read => {
                    return match self.closing {
                        true => Fate::Closed,
                        false => Fate::Reconnect("the server fell silent".to_owned()),
                    };
                }
                () = token.cancelled(), if !self.closing => command = Some(None),
            }
            if let Some(command) = command {
                self.on_command(command);
                // What waits is sent in one write.
                for _ in 0..COMMANDS {
                    match self.commands.try_recv() {
                        Ok(command) if !self.closing => self.on_command(Some(command)),
                        _ => break,
                    }
                }
                if self.closing {
                    self.conversation.out.push_back(Frame::new(Action::Close));
                    silent_until = Instant::now() + FAREWELL;
                }
            }
        }
    }

    /// Everything that was asked for was given or the socket has failed.
    fn on_broken(&self, reason: String) -> Fate {
        if self.closing {
            Fate::Closed
        } else {
            Fate::Reconnect(reason)
        }
    }

    fn on_frame(&mut self, frame: Frame) -> Result<(), Fate> {
        self.conversation.on_frame(frame, Instant::now())?;
        if self.conversation.is_live()
            && let Some(connected_tx) = self.connected_tx.take()
        {
            let _ = connected_tx.send(Ok(()));
        }
        if self.events.is_closed() {
            self.conversation.events.clear();
        }
        // The common case needs no second turn.
        while !self.conversation.events.is_empty() {
            match self.events.try_reserve() {
                Ok(room) => self
                    .conversation
                    .events
                    .pop_front()
                    .map(|event| room.send(event)),
                Err(_) => break,
            };
        }
        Ok(())
    }

    /// How long the server may say nothing from now on.
    fn silence(&self) -> Duration {
        match self.conversation.idle() {
            _ if self.closing => FAREWELL,
            Some(idle) => idle + self.options.idle_grace,
            None if self.conversation.is_live() => Duration::from_hours(24),
            None => self.options.connect_timeout,
        }
    }

    fn on_command(&mut self, command: Option<Command>) {
        match command {
            Some(Command::Publish(publish)) => self.conversation.on_publish(publish),
            Some(Command::Attach(attach)) => self.conversation.on_attach(attach),
            Some(Command::Close) | None => self.closing = true,
        }
    }
}
