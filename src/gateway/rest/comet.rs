//! The requests that a conversation without WebSocket goes over (§2.1). Always JSON.

use axum::body::Body;
use axum::extract::State;

use crate::gateway::Door;
use crate::gateway::answer::{self, failure};
use crate::gateway::comet::Ends;
use crate::gateway::conversation::Conversation;
use crate::gateway::open::open;
use crate::gateway::rest::Answer;
use crate::gateway::rest::asked::Asked;
use crate::gateway::rest::sent::Sent;
use crate::session::ConnectParams;
use crate::tasks::OnError;
use crate::types::ErrorInfo;
use crate::wire::ably::{Action, Format};

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
    respond(async { ends(&door, &asked)?.receive().await }).await
}

/// Frames of the client. Answered when the conversation has taken them.
pub(super) async fn send(State(door): State<Door>, asked: Asked, body: Body) -> Answer {
    respond(async {
        let ends = ends(&door, &asked)?;
        let sent = Sent::read(&asked.headers, body, door.limits.max_frame_bytes).await?;
        ends.send(sent.bytes()).await?;
        Ok(answer::nothing())
    })
    .await
}

/// The client is done: its members leave at once.
pub(super) async fn close(State(door): State<Door>, asked: Asked) -> Answer {
    say(&door, &asked, Action::Close).await
}

/// The client goes on by another way.
pub(super) async fn disconnect(State(door): State<Door>, asked: Asked) -> Answer {
    say(&door, &asked, Action::Disconnect).await
}

async fn say(door: &Door, asked: &Asked, action: Action) -> Answer {
    respond(async {
        ends(door, asked)?.say(action).await?;
        Ok(answer::nothing())
    })
    .await
}

fn ends(door: &Door, asked: &Asked) -> Result<Ends, ErrorInfo> {
    door.comets.find(asked.segment("key"))
}

async fn respond(work: impl Future<Output = Result<Answer, ErrorInfo>>) -> Answer {
    let result = work.await;
    result.unwrap_or_else(|err| failure(Format::Json, &err))
}
