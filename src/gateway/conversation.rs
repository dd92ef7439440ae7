//! One client's conversation, over whatever it comes: reads frames, drives the session, carries out its effects, sends
//! what its followers find.
//!
//! One task, no queue: what a slow reader has not taken stays in the log, and its cursor says where.

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::{AbortHandle, AbortRegistration, Abortable};
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::auth::Identity;
use crate::broker::{self, Follower, From, Occupying, Publish, PublishError, Record, Waker};
use crate::gateway::departures::{Departure, When, changes};
use crate::gateway::live::Seat;
use crate::gateway::wire::{Gone, Received, Wire};
use crate::gateway::{Door, occupancy, steady_ms};
use crate::session::{AttachOutcome, Content, Continuity, Effect, Opening, Session, Start, Ticket};
use crate::types::{AppId, ChannelKey, ChannelName, ErrorCode, ErrorInfo, Metrics, Serial};
use crate::wire::ably::{self, PresenceAction, PresenceMessage};
use crate::wire::body::{encode_body, encode_presence};
use crate::wire::entry;

/// Records a follower hands out before another gets its turn.
const POLL_RECORDS: usize = 64;

struct Attachment {
    slot: u32,
    /// `None` when the client wants nothing of the channel.
    follower: Option<Follower>,
    /// What the client was told of the members is as of this: presence records up to it say nothing new.
    members_as_of: Option<Serial>,
    /// Clients of this connection that were members then.
    own_members: BTreeSet<String>,
    occupying: Occupying,
    /// While the client hears of the channel's occupancy.
    hearing: Option<Hearing>,
}

/// Ends with this value.
struct Hearing {
    number: u64,
    ends: AbortHandle,
}

impl Drop for Hearing {
    fn drop(&mut self) {
        self.ends.abort();
    }
}

/// How a channel is to be followed.
struct Joining {
    start: Start,
    /// Whether the client wants something of the channel.
    wanted: bool,
    members: bool,
    in_place: bool,
}

type Watched = watch::Receiver<Option<Metrics>>;

/// What came of something that the conversation waited for.
enum Done {
    /// `None`: presence that changed nothing.
    Published(Ticket, Result<Option<Serial>, ErrorInfo>),
    /// Presence that this node shows by now. Stored before, it comes with the channel's members by now, if they could be
    /// read.
    Present(Ticket, Serial, ChannelName, Option<Vec<PresenceMessage>>),
    /// This node shows what the client has seen of a channel that it attaches.
    Shown(ChannelName, Box<Joining>),
    Members(ChannelName, Result<Vec<PresenceMessage>, ErrorInfo>),
    /// The channel's occupancy changed; which hearing wants to know, and where it hears more.
    Occupied(ChannelName, u64, Metrics, Watched),
    Attended(ChannelName),
    Nothing,
}

type Doing = Pin<Box<dyn Future<Output = Done> + Send>>;

pub(super) struct Conversation<W> {
    app: AppId,
    session: Session,
    wire: W,
    door: Door,
    waker: Arc<Waker>,
    attachments: HashMap<ChannelName, Attachment>,
    slots: HashMap<u32, ChannelName>,
    next_slot: u32,
    hearings: u64,
    /// Channels whose members are being attended.
    attending: BTreeSet<ChannelName>,
    /// Bounded by the session's limits on unanswered publishes and on channels.
    doing: FuturesUnordered<Doing>,
    /// Slots of followers that had more than their share, to go on with when everything else had its turn.
    unfinished: BTreeSet<u32>,
    /// Who is talking, for as long as the registry agrees.
    identity: Identity,
}

impl<W: Wire> Conversation<W> {
    pub(super) fn new(door: Door, opening: Opening, wire: W) -> Self {
        let identity = opening.identity.clone();
        Self {
            app: identity.app.clone(),
            session: Session::new(opening, steady_ms()),
            wire,
            door,
            waker: Arc::default(),
            attachments: HashMap::new(),
            slots: HashMap::new(),
            next_slot: 0,
            hearings: 0,
            attending: BTreeSet::new(),
            doing: FuturesUnordered::new(),
            unfinished: BTreeSet::new(),
            identity,
        }
    }

    /// Goes on until either side ends it. Whom the client leaves behind on its channels leaves in time.
    pub(super) async fn run(mut self, seat: Seat, token: CancellationToken) {
        let (app, connection_id) = (self.app.clone(), self.session.connection_id().to_owned());
        let client_id = self.identity.client_id.as_str().map(str::to_owned);
        let lifecycle = self.door.lifecycle.clone();
        lifecycle.connection_opened(&app, &connection_id, client_id.as_deref());
        self.converse(&seat, &token).await;
        lifecycle.connection_closed(&app, &connection_id, client_id.as_deref());
        // It may have been busy writing to a socket that was gone when its successor came.
        if seat.is_superseded() {
            self.session.handle_taken_over(steady_ms());
        }
        let grace = Duration::from_millis(self.session.remain_present_for_ms());
        for (channel, members) in self.session.handle_gone(steady_ms()) {
            let departure = self.departure(channel, members);
            let when = When::UnlessAttended(grace);
            self.door.departures.leave(&departure, when);
        }
    }

    async fn converse(&mut self, seat: &Seat, token: &CancellationToken) {
        let mut leaves_at = None;
        let mut drained = false;
        let mut taken_over = false;
        let mut keys = self.door.keys.changes();
        // What changed since the client was let in, and what is to come.
        self.review();
        while self.carry_out().await.is_ok() && !self.session.is_closed() {
            let deadline = self.session.next_deadline();
            let has_room = self.session.has_room();
            let stepped = tokio::select! {
                // Unread frames wait in the client's socket: that is what slows a fast publisher down.
                received = self.wire.receive(), if has_room => self.on_received(received),
                slots = self.waker.ready() => self.on_ready(slots).await,
                () = std::future::ready(()), if !self.unfinished.is_empty() => {
                    let slots = std::mem::take(&mut self.unfinished);
                    self.on_ready(slots).await
                }
                Some(done) = self.doing.next(), if !self.doing.is_empty() => self.on_done(done).await,
                () = sleep_until(deadline) => {
                    self.session.handle_tick(steady_ms());
                    Ok(())
                }
                () = keys.changed() => {
                    self.review();
                    Ok(())
                }
                () = seat.superseded(), if !taken_over => {
                    taken_over = true;
                    self.session.handle_taken_over(steady_ms());
                    Ok(())
                }
                () = token.cancelled(), if leaves_at.is_none() => {
                    leaves_at = Some(Instant::now() + self.door.live.pause_before_leaving());
                    Ok(())
                }
                () = reached(leaves_at), if !drained => {
                    drained = true;
                    self.session.handle_drain(steady_ms());
                    Ok(())
                }
            };
            if stepped.is_err() {
                return;
            }
        }
    }

    fn on_received(&mut self, received: Received) -> Result<(), Gone> {
        match received {
            Received::Bytes(bytes) => match ably::decode(self.wire.format(), &bytes) {
                Ok(frame) => self.session.handle_frame(frame, steady_ms()),
                Err(err) => self.session.handle_undecodable(err, steady_ms()),
            },
            Received::Frame(frame) => self.session.handle_frame(*frame, steady_ms()),
            Received::TooLarge => self.session.handle_too_large(steady_ms()),
            Received::Nothing => {}
            Received::Gone => return Err(Gone),
        }
        Ok(())
    }

    async fn on_done(&mut self, done: Done) -> Result<(), Gone> {
        match done {
            Done::Published(ticket, outcome) => {
                self.session.handle_published(ticket, outcome, steady_ms());
            }
            Done::Present(ticket, serial, channel, members) => {
                // Before its answer, so that a client library that was told that its member is in has it in its list. Who has
                // much to catch up on is not waited for.
                let slot = self.attachments.get(&channel).map(|it| it.slot);
                self.on_ready(slot).await?;
                (self.session).handle_published(ticket, Ok(Some(serial)), steady_ms());
                if let Some(members) = members {
                    (self.session).handle_repeated(&channel, &members, steady_ms());
                }
            }
            Done::Shown(channel, joining) => self.join(&channel, &joining),
            Done::Members(channel, members) => {
                self.session.handle_members(&channel, members, steady_ms());
            }
            Done::Occupied(channel, number, metrics, watched) => {
                return self.on_occupied(channel, number, &metrics, watched).await;
            }
            Done::Attended(channel) => {
                self.attending.remove(&channel);
            }
            Done::Nothing => {}
        }
        Ok(())
    }

    /// The registry changed: whether the client may still be here.
    fn review(&mut self) {
        match self.door.keys.review(&self.identity, steady_ms()) {
            Ok(None) => {}
            Ok(Some(at_ms)) => self.session.handle_revocation_at(at_ms, steady_ms()),
            Err(_) => self.session.handle_revoked(steady_ms()),
        }
    }

    /// Carries out the session's effects in order, and writes what they gathered.
    async fn carry_out(&mut self) -> Result<(), Gone> {
        while let Some(effect) = self.session.poll_effect() {
            match effect {
                Effect::Send(frame) => self.wire.send(&frame).await?,
                Effect::Publish {
                    ticket,
                    channel,
                    id,
                    content,
                    ephemeral,
                } => self.publish(ticket, channel, id, &content, ephemeral),
                Effect::Attach {
                    channel,
                    start,
                    subscribe,
                    presence_subscribe,
                    members,
                    in_place,
                    ..
                } => {
                    let joining = Joining {
                        start,
                        wanted: subscribe || presence_subscribe || members,
                        members,
                        in_place,
                    };
                    self.attach(channel, joining);
                }
                Effect::Detach { channel } => {
                    if let Some(attachment) = self.attachments.remove(&channel) {
                        self.slots.remove(&attachment.slot);
                    }
                    self.session.handle_detached(&channel, steady_ms());
                }
                Effect::Attend { channel } => self.attend(channel),
                Effect::Depart { channel, members } => {
                    let departure = self.departure(channel, members);
                    self.door.departures.leave(&departure, When::Now);
                }
                Effect::Members { channel } => self.read_members(channel),
                Effect::Authenticate { token } => {
                    let keys = &self.door.keys;
                    let outcome = keys.renew(&self.identity, token);
                    if let Ok(identity) = &outcome {
                        self.identity = identity.clone();
                    }
                    let believed = outcome.is_ok();
                    self.session.handle_authenticated(outcome, steady_ms());
                    if believed {
                        self.review();
                    }
                    let channels: Vec<ChannelName> = self.attachments.keys().cloned().collect();
                    for channel in channels {
                        self.count(&channel);
                    }
                }
                Effect::Close { code } => {
                    self.wire.flush().await?;
                    self.wire.close(code).await;
                    return Err(Gone);
                }
            }
        }
        self.wire.flush().await
    }

    fn key(&self, channel: ChannelName) -> ChannelKey {
        ChannelKey {
            app: self.app.clone(),
            name: channel,
        }
    }

    fn departure(&self, channel: ChannelName, members: Vec<PresenceMessage>) -> Departure {
        Departure {
            key: self.key(channel),
            connection_id: self.session.connection_id().to_owned(),
            members,
        }
    }

    fn publish(
        &self,
        ticket: Ticket,
        channel: ChannelName,
        id: String,
        content: &Content,
        ephemeral: bool,
    ) {
        let (count, body, presence) = match content {
            Content::Messages(messages) => (messages.len(), encode_body(messages), None),
            Content::Presence(events) => {
                let presence = entry::Presence {
                    changes: changes(events),
                    members_max: u32::try_from(self.door.members_max).unwrap_or(u32::MAX),
                    ..entry::Presence::default()
                };
                (events.len(), encode_presence(events), Some(presence))
            }
        };
        let is_presence = presence.is_some();
        let publish = Publish {
            key: self.key(channel),
            id,
            connection_id: self.session.connection_id().to_owned(),
            count: u32::try_from(count).unwrap_or(u32::MAX),
            body,
            source: None,
            presence,
            ephemeral,
        };
        let (broker, key) = (self.door.broker.clone(), publish.key.clone());
        let published = broker.publish(publish);
        self.doing.push(Box::pin(async move {
            let outcome = match published.outcome().await {
                Ok((Some(serial), repeated)) if is_presence => {
                    let members = match repeated {
                        true => broker.members(&key).await.ok(),
                        false => None,
                    };
                    broker.until_shown(&key, serial).await;
                    return Done::Present(ticket, serial, key.name, members);
                }
                Ok((Some(serial), _)) => Ok(Some(serial)),
                Ok((None, _)) if is_presence => Ok(None),
                Ok((None, _)) => Err(ErrorCode::Internal.into()),
                Err(err) => Err(PublishError::into(err)),
            };
            Done::Published(ticket, outcome)
        }));
    }

    /// Repeated by the next attach or enter when it is not heard, and until then by nobody: the grace is far longer.
    fn attend(&mut self, channel: ChannelName) {
        // One at a time is as good as many.
        if !self.attending.insert(channel.clone()) {
            return;
        }
        let connection_id = self.session.connection_id();
        let key = self.key(channel.clone());
        let attended = self.door.broker.attend(key.clone(), connection_id);
        self.doing.push(Box::pin(async move {
            if let Err(err) = attended.outcome().await {
                tracing::warn!(channel = %key, error = %err, "members of a resumed connection are not attended yet");
            }
            Done::Attended(channel)
        }));
    }

    fn read_members(&self, channel: ChannelName) {
        let (broker, key) = (self.door.broker.clone(), self.key(channel.clone()));
        self.doing.push(Box::pin(async move {
            Done::Members(channel, broker.members(&key).await)
        }));
    }

    /// A client that saw more than this node shows yet, on another, would be told of members as they were before.
    fn attach(&mut self, channel: ChannelName, joining: Joining) {
        let key = self.key(channel.clone());
        match joining.start {
            Start::After(serial) if !joining.in_place && !self.door.broker.shows(&key, serial) => {
                let broker = self.door.broker.clone();
                self.doing.push(Box::pin(async move {
                    broker.until_shown(&key, serial).await;
                    Done::Shown(channel, Box::new(joining))
                }));
            }
            _ => self.join(&channel, &joining),
        }
    }

    fn join(&mut self, channel: &ChannelName, joining: &Joining) {
        let outcome = self.follow(channel, joining);
        (self.session).handle_attached(channel, outcome, steady_ms());
        self.count(channel);
    }

    fn follow(&mut self, channel: &ChannelName, joining: &Joining) -> AttachOutcome {
        let &Joining {
            start,
            wanted,
            members,
            in_place,
        } = joining;
        let former = self.attachments.remove(channel);
        if let Some(attachment) = &former {
            self.slots.remove(&attachment.slot);
        }
        let key = self.key(channel.clone());
        let (standing, occupying, hearing) = match former {
            Some(former) => (former.follower, former.occupying, former.hearing),
            None => (None, self.door.broker.occupy(&key), None),
        };
        let from = match (&standing, in_place, start) {
            (Some(follower), true, _) => From::After(follower.cursor()),
            (_, _, Start::Present) => From::Present,
            (_, _, Start::After(serial)) => From::After(serial),
            (_, _, Start::Rewind { count, within_ms }) => From::Rewind { count, within_ms },
        };
        let slot = self.next_slot;
        self.next_slot = self.next_slot.wrapping_add(1);
        let start = broker::Start { from, members };
        let started = (self.door.broker).follow(key, start, self.waker.clone(), slot);
        let at = started.follower.cursor();
        let continuity = match started.continuity {
            broker::Continuity::Fresh { backlog } => Continuity::Fresh { backlog },
            broker::Continuity::Resumed { backlog } => Continuity::Resumed { backlog },
            broker::Continuity::Lost => Continuity::Lost,
        };
        let own = started
            .members
            .iter()
            .filter(|member| member.connection_id.as_deref() == Some(self.session.connection_id()));
        let own_members = own.filter_map(|member| member.client_id.clone()).collect();
        let attachment = Attachment {
            slot,
            follower: wanted.then_some(started.follower),
            members_as_of: members.then_some(started.as_of),
            own_members,
            occupying,
            hearing,
        };
        self.attachments.insert(channel.clone(), attachment);
        self.slots.insert(slot, channel.clone());
        AttachOutcome {
            at,
            continuity,
            members: started.members,
        }
    }

    /// Counts the attachment as what it may do now, and tells the client of the channel's occupancy if it is to hear of it.
    fn count(&mut self, channel: &ChannelName) {
        let Some(delivery) = self.session.delivery(channel) else {
            return;
        };
        let (modes, hears) = (delivery.modes, delivery.occupancy.is_some());
        let key = self.key(channel.clone());
        let Some(attachment) = self.attachments.get_mut(channel) else {
            return;
        };
        attachment.occupying.set(occupancy::counts(modes));
        if !hears {
            attachment.hearing = None;
        } else if attachment.hearing.is_none() {
            self.hearings += 1;
            let watched = self.door.broker.watch_occupancy(&key);
            let (ends, registration) = AbortHandle::new_pair();
            attachment.hearing = Some(Hearing {
                number: self.hearings,
                ends,
            });
            let heard = occupied(channel.clone(), self.hearings, watched, true);
            self.doing
                .push(Box::pin(until_aborted(heard, registration)));
        }
    }

    async fn on_occupied(
        &mut self,
        channel: ChannelName,
        number: u64,
        metrics: &Metrics,
        watched: Watched,
    ) -> Result<(), Gone> {
        let attachment = self.attachments.get_mut(&channel);
        let hearing = attachment.and_then(|attachment| attachment.hearing.as_mut());
        let Some(hearing) = hearing.filter(|hearing| hearing.number == number) else {
            return Ok(());
        };
        let (ends, registration) = AbortHandle::new_pair();
        hearing.ends = ends;
        let told = self.session.delivery(&channel).and_then(|delivery| {
            let now_ms = self.door.broker.now_ms();
            let asked = delivery.occupancy?;
            Some(occupancy::frame(delivery.name, asked, metrics, now_ms))
        });
        let next = occupied(channel, number, watched, false);
        self.doing.push(Box::pin(until_aborted(next, registration)));
        if let Some(frame) = told {
            self.wire.send(&frame).await?;
            self.session.handle_sent(steady_ms());
        }
        Ok(())
    }

    /// Sends a share of what each woken follower finds; whoever has more goes on when everything else had its turn.
    async fn on_ready(&mut self, slots: impl IntoIterator<Item = u32>) -> Result<(), Gone> {
        for slot in slots {
            if self.send_records(slot).await? {
                self.unfinished.insert(slot);
            } else {
                self.unfinished.remove(&slot);
            }
        }
        self.wire.flush().await
    }

    /// Whether the follower may have more at once.
    async fn send_records(&mut self, slot: u32) -> Result<bool, Gone> {
        let Some(channel) = self.slots.get(&slot).cloned() else {
            return Ok(false);
        };
        let Some(attachment) = self.attachments.get_mut(&channel) else {
            return Ok(false);
        };
        let Some(follower) = &mut attachment.follower else {
            return Ok(false);
        };
        let polled = match follower.poll(POLL_RECORDS).await {
            Ok(polled) => polled,
            Err(lost) => {
                self.begin_anew(&channel, &lost.error);
                return Ok(false);
            }
        };
        let members_as_of = attachment.members_as_of;
        let mut unreadable = false;
        for record in polled.records {
            let told = record.is_presence()
                && members_as_of.is_some_and(|as_of| record.at.serial <= as_of);
            let mut left = self.own_members_left(&record);
            if told {
                // Who was in after that has come again since.
                left.retain(|client_id| !self.was_listed(&channel, client_id));
            }
            let bytes = match told {
                true => None,
                false => self.bytes_for(&channel, &record, !left.is_empty()),
            };
            match bytes {
                Some(bytes) if bytes.is_empty() => unreadable = true,
                Some(bytes) => {
                    self.wire.send_bytes(bytes).await?;
                    self.session.handle_sent(steady_ms());
                }
                None => {}
            }
            for client_id in left {
                (self.session).handle_member_left(&channel, &client_id, steady_ms());
            }
        }
        if unreadable {
            let what = "a message is stored in a form that this node cannot read";
            let error = ErrorInfo::new(ErrorCode::ContinuityLost, what);
            self.begin_anew(&channel, &error);
            return Ok(false);
        }
        Ok(polled.more)
    }

    /// Records of an attached channel cannot be had: goes on from the present, and tells the client.
    fn begin_anew(&mut self, channel: &ChannelName, error: &ErrorInfo) {
        let joining = Joining {
            start: Start::Present,
            wanted: true,
            // Among what was skipped may be leaves of this connection's own.
            members: true,
            in_place: false,
        };
        let begun = self.follow(channel, &joining);
        let AttachOutcome { at, members, .. } = begun;
        (self.session).handle_discontinuity(channel, at, members, error, steady_ms());
    }

    /// What of a record the client gets, if anything.
    fn bytes_for(&self, channel: &ChannelName, record: &Record, about_own: bool) -> Option<Bytes> {
        let delivery = self.session.delivery(channel)?;
        let own = record.publish.connection_id == self.session.connection_id();
        let wanted = match record.is_presence() {
            true => delivery.presence || own || about_own,
            false => delivery.messages && (delivery.echo || !own),
        };
        if !wanted {
            return None;
        }
        let format = self.wire.format();
        if delivery.name == channel.as_str() {
            return Some(record.frame(format).clone());
        }
        Some(record.frame_as(delivery.name, format))
    }

    /// Whether this connection's client was a member when the channel was attached.
    fn was_listed(&self, channel: &ChannelName, client_id: &str) -> bool {
        let attachment = self.attachments.get(channel);
        attachment.is_some_and(|attachment| attachment.own_members.contains(client_id))
    }

    /// Members of this connection that somebody else had leave.
    fn own_members_left(&self, record: &Record) -> Vec<String> {
        let own = self.session.connection_id();
        let presence = record.publish.presence.as_ref();
        let by_others = presence.filter(|_| record.publish.connection_id != own);
        let changes = by_others.into_iter().flat_map(|presence| &presence.changes);
        let leave = PresenceAction::Leave.number();
        changes
            .filter(|change| change.connection_id == own && i64::from(change.action) == leave)
            .map(|change| change.client_id.clone())
            .collect()
    }
}

/// The channel's occupancy, as soon as it is known, or when it has changed.
async fn occupied(channel: ChannelName, number: u64, mut watched: Watched, first: bool) -> Done {
    let changed = match first {
        true => Ok(()),
        false => watched.changed().await,
    };
    let known = match changed {
        Ok(()) => watched
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|known| *known),
        Err(_) => None,
    };
    match known {
        Some(metrics) => Done::Occupied(channel, number, metrics, watched),
        // The node stops.
        None => Done::Nothing,
    }
}

async fn until_aborted(heard: impl Future<Output = Done>, registration: AbortRegistration) -> Done {
    let heard = Abortable::new(heard, registration).await;
    heard.unwrap_or(Done::Nothing)
}

async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline_ms: Option<u64>) {
    match deadline_ms {
        Some(deadline) => {
            tokio::time::sleep(Duration::from_millis(deadline.saturating_sub(steady_ms()))).await;
        }
        None => std::future::pending().await,
    }
}
