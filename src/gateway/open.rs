//! Who connects, and as which connection.

use crate::auth::Presented;
use crate::gateway::rest::{Pairs, find};
use crate::gateway::{Door, random_id};
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
    let resumed = params
        .resume_key()
        .map(|wanted| keys.verify(&identity.app, wanted));
    let (connection_id, resume_failed) = match resumed {
        None => (random_id(), None),
        Some(Ok(connection_id)) => (connection_id, None),
        Some(Err(err)) => {
            let info = ErrorInfo::new(ErrorCode::ResumeImpossible, err.to_string());
            (random_id(), Some(info))
        }
    };
    Ok(Opening {
        connection_key: keys.mint(
            &identity.app,
            &connection_id,
            &random_id(),
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
