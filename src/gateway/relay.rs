//! Comet requests that reach another node than the one that holds their conversation: behind a balancer each may come to
//! any. The connection key's salt names the node that minted it, so no node has to search.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::broker::Broker;
use crate::gateway::comet::{Comets, Ends, NOTHING};
use crate::gateway::random_id;
use crate::types::{ErrorCode, ErrorInfo, NodeId};
use crate::wire::ably::Action;
use crate::wire::peer::{Relayed, relayed};

/// How long a relayed `recv` waits for something to come; then the client asks again.
const WAIT: Duration = Duration::from_secs(15);
/// How long the other node waits at a time: nobody tells it when the client is gone, and what it takes then is lost to a client
/// that goes on as if nothing had happened.
const WAIT_AT_A_TIME: Duration = Duration::from_secs(1);

/// The salt of a connection key that this node mints.
pub(super) fn salt(node: NodeId) -> String {
    format!("{:x}-{}", node.0, random_id())
}

/// Which node a connection key says minted it. Nobody vouches for it: that node looks whether it holds the connection.
fn minted_by(key: &str) -> Option<NodeId> {
    let (_, rest) = key.split_once('!')?;
    let (node, _) = rest.split_once('-')?;
    u64::from_str_radix(node, 16).ok().map(NodeId)
}

/// Where a conversation is.
pub(super) enum Place {
    Here(Ends),
    Elsewhere(NodeId),
}

/// # Errors
/// `Disconnected` when it is not here, and its key says nothing else: the client connects again, and resumes.
pub(super) fn place(comets: &Comets, broker: &Broker, key: &str) -> Result<Place, ErrorInfo> {
    let here = comets.find(key);
    let other = minted_by(key).filter(|node| *node != broker.node());
    match other.filter(|node| here.is_err() && broker.nodes().contains_key(node)) {
        Some(node) => Ok(Place::Elsewhere(node)),
        None => here.map(Place::Here),
    }
}

/// Frames that wait at the node that holds the conversation, or none after a while: a JSON array.
///
/// # Errors
/// As [`Broker::relay`].
pub(super) async fn receive(broker: &Broker, node: NodeId, key: &str) -> Result<Bytes, ErrorInfo> {
    let asked = Relayed {
        connection_key: key.to_owned(),
        action: relayed::Action::Receive.into(),
        body: Bytes::new(),
    };
    let until = Instant::now() + WAIT;
    loop {
        let began = Instant::now();
        let array = broker.relay(node, &asked).await?;
        // Nothing at once: another request has taken this one's place, and keeps it.
        let replaced = began.elapsed() < WAIT_AT_A_TIME;
        if array != NOTHING || replaced || Instant::now() >= until {
            return Ok(array);
        }
    }
}

/// Carries out what another node relays.
///
/// # Errors
/// `Disconnected` when the conversation is not here, or over; as [`Ends::send_alone`].
pub(super) async fn carry_out(comets: Comets, asked: Relayed) -> Result<Bytes, ErrorInfo> {
    let ends = comets.find(&asked.connection_key)?;
    match relayed::Action::try_from(asked.action) {
        Ok(relayed::Action::Receive) => return ends.receive_within(WAIT_AT_A_TIME).await,
        Ok(relayed::Action::Send) => ends.send_alone(&asked.body).await?,
        Ok(relayed::Action::Close) => ends.say(Action::Close).await?,
        Ok(relayed::Action::Disconnect) => ends.say(Action::Disconnect).await?,
        Err(err) => return Err(ErrorInfo::new(ErrorCode::Internal, err.to_string())),
    }
    Ok(Bytes::new())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{ClientId, ConnectionKeys};

    #[test]
    fn a_key_tells_who_minted_it() {
        let keys = ConnectionKeys::new(&[7; 32]);
        for node in [1, 10, 255, u64::MAX] {
            for client in [ClientId::Any, ClientId::Exactly("a-b!c".into())] {
                let app = "app".parse().unwrap();
                let key = keys.mint(&app, "c-0n_n", &salt(NodeId(node)), &client);
                assert_eq!(minted_by(&key), Some(NodeId(node)), "{key}");
                assert!(keys.verify(&app, &key).is_ok());
            }
        }
        for other in ["", "a", "a!b", "a!-b", "a!x-b", "a!11111111111111111-b"] {
            assert_eq!(minted_by(other), None, "{other}");
        }
    }
}
