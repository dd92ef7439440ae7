//! Who connects, and as which connection.

use crate::auth::{ClientId, Holder, Presented};
use crate::gateway::rest::{Pairs, find};
use crate::gateway::{Door, random_id, relay};
use crate::session::{ConnectParams, Opening};
use crate::types::{ErrorCode, ErrorInfo};

/// Judges a client that connects, by the query and the `Authorization` header it came with.
///
/// # Errors
/// When it may not come in. A connection that cannot be resumed is no error: it gets another one, and is told.
pub(super) fn open(
    door: &Door,
    params: ConnectParams,
    query: &Pairs,
    authorization: Option<&str>,
) -> Result<Opening, ErrorInfo> {
    let token = find(query, &["accessToken", "access_token"]);
    let presented = Presented::from_request(authorization, find(query, &["key"]), token)?;
    let wanted = params.client_id.as_deref();
    let identity = door.keys.authenticate(&presented, wanted)?;
    let keys = door.keys.connections()?;
    let resumed = params.resume_key().map(|wanted| {
        let holder = keys.holder(&identity.app, wanted)?;
        permit(&holder, &identity.client_id)?;
        Ok(holder.connection_id)
    });
    let (connection_id, resume_failed) = match resumed {
        None => (random_id(), None),
        Some(Ok(connection_id)) => (connection_id, None),
        Some(Err(info)) => (random_id(), Some(info)),
    };
    Ok(Opening {
        connection_key: keys.mint(
            &identity.app,
            &connection_id,
            &relay::salt(door.broker.node()),
            &identity.client_id,
        ),
        resumed: params.resume_key().is_some() && resume_failed.is_none(),
        params,
        identity,
        limits: door.limits.clone(),
        connection_id,
        resume_failed,
        node: door.broker.node(),
    })
}

/// Whether a client may go on with the connection. One that was nobody in particular may be somebody by now.
///
/// # Errors
/// When the connection is another client's.
fn permit(holder: &Holder, client_id: &ClientId) -> Result<(), ErrorInfo> {
    let same = match (&holder.client_id, client_id) {
        (None, _) => true,
        (Some(holder), ClientId::Exactly(client_id)) => holder == client_id,
        (Some(_), ClientId::Any | ClientId::Anonymous) => false,
    };
    match same {
        true => Ok(()),
        false => Err(ErrorCode::ResumeForbidden.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_goes_on_with_the_connection_of_another() {
        let of = |client_id: Option<&str>| Holder {
            connection_id: "c".into(),
            client_id: client_id.map(str::to_owned),
        };
        let ada = ClientId::Exactly("ada".into());
        for (holder, client_id, may) in [
            (None, &ada, true),
            (None, &ClientId::Any, true),
            (Some("ada"), &ada, true),
            (Some("bob"), &ada, false),
            (Some("ada"), &ClientId::Any, false),
            (Some("ada"), &ClientId::Anonymous, false),
        ] {
            let permitted = permit(&of(holder), client_id);
            assert_eq!(permitted.is_ok(), may, "{holder:?} {client_id:?}");
        }
    }
}
