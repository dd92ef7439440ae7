//! Publishing to one channel by a request (§3.3).

use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use bytes::Bytes;
use serde::Serialize;

use crate::auth::{ClientId, Identity, Operation};
use crate::broker::Publish;
use crate::gateway::answer::answer;
use crate::gateway::rest::Answer;
use crate::gateway::rest::asked::{Asked, permitted};
use crate::gateway::rest::one_or_many::OneOrMany;
use crate::gateway::rest::sent::Sent;
use crate::gateway::{Door, random_id};
use crate::session::{admit, take_connection_key};
use crate::types::{ChannelKey, ErrorCode, ErrorInfo};
use crate::wire::ably::Message;
use crate::wire::body::encode_body;

/// Messages that passed every check that is the same for all channels, as they will be stored.
#[derive(Clone, Debug)]
pub(super) struct Ready {
    id: String,
    connection_id: String,
    count: u16,
    body: Bytes,
    ephemeral: bool,
    privileged: bool,
}

/// What a client is told of what it published.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Stored {
    pub(super) channel: String,
    #[serde(rename = "messageId")]
    pub(super) message_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) serials: Option<Vec<String>>,
}

/// Checks messages of one publish.
///
/// # Errors
/// Says which rule was broken.
pub(super) fn check(
    door: &Door,
    identity: &Identity,
    mut messages: Vec<Message>,
) -> Result<Ready, ErrorInfo> {
    let (client_id, connection_id) = match take_connection_key(&mut messages)? {
        None => (identity.client_id.clone(), String::new()),
        Some(key) => on_behalf(door, identity, &key)?,
    };
    let admission = admit(messages, &client_id, door.limits.max_message_bytes)?;
    Ok(Ready {
        // An id of our own, so that a retry inside the cluster is recognised.
        id: admission.base_id.unwrap_or_else(random_id),
        connection_id,
        count: admission.count,
        body: encode_body(&admission.messages),
        ephemeral: admission.ephemeral,
        privileged: admission.privileged,
    })
}

/// Who publishes for whoever holds this connection key: that connection, and the client that it is. Who asks must be able
/// to be that client as well.
fn on_behalf(door: &Door, identity: &Identity, key: &str) -> Result<(ClientId, String), ErrorInfo> {
    let keys = door.keys.connections()?;
    let holder = keys
        .holder(&identity.app, key)
        .map_err(|err| ErrorInfo::new(ErrorCode::InvalidConnectionKey, err.to_string()))?;
    let client_id = match holder.client_id {
        None => identity.client_id.clone(),
        Some(client_id) => {
            identity.client_id.assign(Some(&client_id))?;
            ClientId::Exactly(client_id)
        }
    };
    Ok((client_id, holder.connection_id))
}

impl Ready {
    /// Stores the messages in a channel, if this client may publish them there.
    ///
    /// # Errors
    /// Nothing is stored, but where the code says that it may be.
    pub(super) async fn store(
        &self,
        door: &Door,
        identity: &Identity,
        channel: &str,
    ) -> Result<Stored, ErrorInfo> {
        let key = permitted(identity, Operation::Publish, channel)?;
        self.store_in(door, identity, key).await
    }

    async fn store_in(
        &self,
        door: &Door,
        identity: &Identity,
        key: ChannelKey,
    ) -> Result<Stored, ErrorInfo> {
        let channel = key.name.to_string();
        if self.privileged {
            permitted(identity, Operation::PrivilegedHeaders, &channel)?;
        }
        let publish = Publish {
            key,
            id: self.id.clone(),
            connection_id: self.connection_id.clone(),
            count: u32::from(self.count),
            body: self.body.clone(),
            source: None,
            presence: None,
            ephemeral: self.ephemeral,
        };
        let (serial, _) = door.broker.publish(publish).outcome().await?;
        let serial = serial.ok_or(ErrorCode::Internal)?;
        let serials = (0..self.count).map(|n| serial.message(n).to_string());
        Ok(Stored {
            channel,
            message_id: self.id.clone(),
            serials: Some(serials.collect()),
        })
    }
}

pub(super) async fn publish(State(door): State<Door>, asked: Asked, body: Body) -> Answer {
    let result = store(&door, &asked, body).await;
    asked.finish(result)
}

async fn store(door: &Door, asked: &Asked, body: Body) -> Result<Answer, ErrorInfo> {
    let (identity, key) = asked.admit_to(door, Operation::Publish)?;
    let sent = Sent::read(&asked.headers, body, door.limits.max_frame_bytes).await?;
    let messages = match asked.param(&["enveloped"]) {
        Some("false") => vec![bare(asked, &sent)?],
        _ => sent.value::<OneOrMany<Message>>()?.0,
    };
    let ready = check(door, &identity, messages)?;
    if asked.param(&["_forceNack"]) == Some("true") {
        return Err(ErrorCode::ForcedNack.into());
    }
    let stored = ready.store_in(door, &identity, key).await?;
    Ok(answer(StatusCode::CREATED, asked.format, &stored))
}

/// The message whose data is the body; what else there is to say stands in the query or in headers.
fn bare(asked: &Asked, sent: &Sent) -> Result<Message, ErrorInfo> {
    let beside = |param: &str, header: &str| {
        let value = asked.param(&[param]).or(asked.header(header));
        value.filter(|value| !value.is_empty()).map(str::to_owned)
    };
    let message = sent.data()?;
    Ok(Message {
        id: beside("messageId", "x-ably-messageid"),
        name: beside("name", "x-ably-name"),
        connection_key: beside("connectionKey", "x-ably-connectionkey"),
        encoding: beside("encoding", "x-ably-encoding").or(message.encoding.clone()),
        ..message
    })
}
