//! The requests that a conversation without WebSocket goes over (§2.1). Always JSON.

use axum::body::Body;
use axum::extract::State;
use bytes::{Bytes, BytesMut};

use crate::gateway::Door;
use crate::gateway::answer::{self, failure};
use crate::gateway::comet::{self, Ends};
use crate::gateway::conversation::Conversation;
use crate::gateway::open::open;
use crate::gateway::relay::{self, Place};
use crate::gateway::rest::Answer;
use crate::gateway::rest::asked::Asked;
use crate::gateway::rest::sent::Sent;
use crate::session::ConnectParams;
use crate::tasks::OnError;
use crate::types::{ErrorInfo, NodeId};
use crate::wire::ably::{Action, Format};
use crate::wire::peer::{Relayed, relayed};

/// Opens a conversation and is its first `recv`.
pub(super) async fn connect(State(door): State<Door>, asked: Asked) -> Answer {
    respond(async { begin(&door, &asked)?.receive().await }).await
}

fn begin(door: &Door, asked: &Asked) -> Result<Ends, ErrorInfo> {
    let query = asked.pairs.iter();
    let query = query.map(|(name, value)| (name.as_str(), value.as_str()));
    let mut params = ConnectParams::from_query(query)?;
    params.format = Format::Json;
    params.version = params.version.or(asked.version());
    params.check_version()?;
    let opening = open(door, params, &asked.pairs, asked.header("authorization"))?;
    let streams = asked.param(&["stream"]) != Some("false");
    let (wire, ends) = door.comets.open(&opening.connection_key, streams)?;
    let seat = door.seat(&opening);
    let conversation = Conversation::new(door.clone(), opening, wire);
    door.tasks
        .spawn("gateway.comet", OnError::Log, |token| async move {
            Box::pin(conversation.run(seat, token)).await;
            Ok(())
        });
    Ok(ends)
}

/// What waits for the client, as soon as something does.
pub(super) async fn receive(State(door): State<Door>, asked: Asked) -> Answer {
    respond(async {
        match place(&door, &asked)? {
            Place::Here(ends) => ends.receive().await,
            Place::Elsewhere(node) => {
                let array = relay::receive(&door.broker, node, asked.segment("key"));
                let mut line = BytesMut::from(&array.await?[..]);
                // To whom it should be a stream, it is one of one line.
                line.extend_from_slice(b"\n");
                Ok(comet::json(line.freeze()))
            }
        }
    })
    .await
}

/// Frames of the client. Answered when the conversation has taken them.
pub(super) async fn send(State(door): State<Door>, asked: Asked, body: Body) -> Answer {
    respond(async {
        let place = place(&door, &asked)?;
        let sent = Sent::read(&asked.headers, body, door.limits.max_frame_bytes).await?;
        match place {
            Place::Here(ends) => ends.send(sent.bytes()).await?,
            Place::Elsewhere(node) => {
                let frames = sent.bytes().clone();
                relay(&door, node, &asked, relayed::Action::Send, frames).await?;
            }
        }
        Ok(answer::nothing())
    })
    .await
}

/// The client is done: its members leave at once.
pub(super) async fn close(State(door): State<Door>, asked: Asked) -> Answer {
    say(&door, &asked, Action::Close, relayed::Action::Close).await
}

/// The client goes on by another way.
pub(super) async fn disconnect(State(door): State<Door>, asked: Asked) -> Answer {
    say(
        &door,
        &asked,
        Action::Disconnect,
        relayed::Action::Disconnect,
    )
    .await
}

async fn say(door: &Door, asked: &Asked, here: Action, elsewhere: relayed::Action) -> Answer {
    respond(async {
        match place(door, asked)? {
            Place::Here(ends) => ends.say(here).await?,
            Place::Elsewhere(node) => {
                relay(door, node, asked, elsewhere, Bytes::new()).await?;
            }
        }
        Ok(answer::nothing())
    })
    .await
}

fn place(door: &Door, asked: &Asked) -> Result<Place, ErrorInfo> {
    relay::place(&door.comets, &door.broker, asked.segment("key"))
}

async fn relay(
    door: &Door,
    node: NodeId,
    asked: &Asked,
    action: relayed::Action,
    body: Bytes,
) -> Result<Bytes, ErrorInfo> {
    let relayed = Relayed {
        connection_key: asked.segment("key").to_owned(),
        action: action.into(),
        body,
    };
    door.broker.relay(node, &relayed).await
}

async fn respond(work: impl Future<Output = Result<Answer, ErrorInfo>>) -> Answer {
    let result = work.await;
    result.unwrap_or_else(|err| failure(Format::Json, &err))
}
