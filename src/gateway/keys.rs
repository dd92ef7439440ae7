//! Who may come in: the registry's keys and revocations, ready for use.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use crate::auth::{
    AppKeys, Capability, ConnectionKeys, Identity, Key, Keyring, Nonce, Presented,
    RevocationRequest, Revocations, Revoked, Secret, TokenDetails, TokenRequest,
};
use crate::broker::{Broker, Once};
use crate::tasks::Tasks;
use crate::types::{AppId, ErrorCode, ErrorInfo};
use crate::wire::control;

/// How much longer a nonce is remembered than this node's clock says it must be: other nodes' clocks may be behind.
const NONCE_MARGIN: Duration = Duration::from_secs(300);

/// The keys of the cluster as it is now. Clones share what was built from the registry.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    broker: Broker,
    seen: watch::Receiver<Arc<Seen>>,
    built: Arc<Mutex<Option<Arc<Built>>>>,
}

/// What of the registry this is built from. The same when it is the very same.
#[derive(Debug)]
struct Seen {
    apps: Arc<Apps>,
    revocations: Arc<Revocations>,
}

impl PartialEq for Seen {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.apps, &other.apps) && Arc::ptr_eq(&self.revocations, &other.revocations)
    }
}

/// Follows who may be here.
#[derive(Debug)]
pub(crate) struct Changes(watch::Receiver<Arc<Seen>>);

impl Changes {
    /// Waits for the next change; for ever once the node stops. Cancel-safe.
    pub(crate) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

type Apps = BTreeMap<AppId, Arc<control::App>>;

#[derive(Clone, Debug)]
struct Built {
    from: Arc<Apps>,
    keys: BTreeMap<AppId, Arc<AppKeys>>,
    ring: Arc<Keyring>,
    connections: Arc<ConnectionKeys>,
}

impl Keys {
    pub(crate) fn new(broker: &Broker, tasks: &Tasks) -> Self {
        Self {
            broker: broker.clone(),
            seen: broker.view(tasks, |registry| Seen {
                apps: registry.apps.clone(),
                revocations: registry.revocations.clone(),
            }),
            built: Arc::default(),
        }
    }

    /// Tells when who may be here has changed.
    pub(crate) fn changes(&self) -> Changes {
        let mut seen = self.seen.clone();
        seen.mark_unchanged();
        Changes(seen)
    }

    /// From when on a client that was let in may not be here any more; `None` when nothing is said against it.
    ///
    /// # Errors
    /// When it may not be here now, as [`Keyring::review`].
    pub(crate) fn review(
        &self,
        identity: &Identity,
        now_ms: u64,
    ) -> Result<Option<u64>, ErrorInfo> {
        let (built, revocations) = self.built()?;
        built.ring.review(identity, now_ms, &revocations)?;
        Ok(revocations.applies_at(identity))
    }

    /// Who a client is that brings another token.
    ///
    /// # Errors
    /// As [`Identity::renewed_by`].
    pub(crate) fn renew(&self, identity: &Identity, token: Secret) -> Result<Identity, ErrorInfo> {
        identity.renewed_by(self.authenticate(&Presented::Token(token), None))
    }

    /// Who presents this, and what it may do. `wanted` is the client id that it wants to be.
    ///
    /// # Errors
    /// As [`Keyring::authenticate`]; `Busy` while the cluster is not born.
    pub(crate) fn authenticate(
        &self,
        presented: &Presented,
        wanted: Option<&str>,
    ) -> Result<Identity, ErrorInfo> {
        let (built, revocations) = self.built()?;
        let now_ms = crate::gateway::unix_ms();
        built
            .ring
            .authenticate(presented, wanted, now_ms, &revocations)
    }

    /// The token that answers a request. A signed request is answered once in the whole cluster.
    ///
    /// # Errors
    /// As [`Keyring::request_token`]; `TokenRequestReplayed`; when it cannot be found out whether the request was
    /// answered before, in which case it may count as that.
    pub(crate) async fn issue(
        &self,
        key_name: &str,
        request: &TokenRequest,
        presented: Option<&Presented>,
    ) -> Result<TokenDetails, ErrorInfo> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).expect("the system has randomness once it has booted");
        let now_ms = crate::gateway::unix_ms();
        let (built, _) = self.built()?;
        let issued = (built.ring).request_token(key_name, request, presented, now_ms, random);
        let (details, nonce) = issued?;
        if let Some(nonce) = nonce
            && !self.is_fresh(&nonce, now_ms).await?
        {
            return Err(ErrorCode::TokenRequestReplayed.into());
        }
        Ok(details)
    }

    async fn is_fresh(&self, nonce: &Nonce, now_ms: u64) -> Result<bool, ErrorInfo> {
        let kind = format!("nonces:{}", nonce.key);
        let valid = Duration::from_millis(nonce.until_ms.saturating_sub(now_ms));
        let once = Once {
            kind: &kind,
            text: &nonce.text,
            mark: crate::gateway::random_id(),
            remembered: valid + NONCE_MARGIN,
        };
        self.broker.once(once).await
    }

    /// What is to be revoked; nothing is yet.
    ///
    /// # Errors
    /// As [`Keyring::revoke`].
    pub(crate) fn revoke(
        &self,
        key_name: &str,
        presented: &Presented,
        request: &RevocationRequest,
    ) -> Result<Vec<Revoked>, ErrorInfo> {
        let now_ms = crate::gateway::unix_ms();
        let ring = self.built()?.0.ring.clone();
        ring.revoke(key_name, presented, request, now_ms)
    }

    /// What makes connection keys.
    pub(crate) fn connections(&self) -> Result<Arc<ConnectionKeys>, ErrorInfo> {
        Ok(self.built()?.0.connections.clone())
    }

    fn built(&self) -> Result<(Arc<Built>, Arc<Revocations>), ErrorInfo> {
        let registry = self.broker.registry();
        let now = registry.borrow().clone();
        let born = now.bootstrap.as_ref();
        let born =
            born.ok_or_else(|| ErrorInfo::new(ErrorCode::Busy, "the cluster is starting"))?;
        let mut built = self.built.lock().unwrap_or_else(|err| err.into_inner());
        let built = match &*built {
            Some(built) if Arc::ptr_eq(&built.from, &now.apps) => built.clone(),
            known => {
                let next = build(now.apps.clone(), born, known.as_deref());
                built.insert(Arc::new(next)).clone()
            }
        };
        Ok((built, now.revocations.clone()))
    }
}

/// Apps that have not changed since `known` are taken from there: creating one costs no reading of the others.
fn build(from: Arc<Apps>, born: &control::Bootstrap, known: Option<&Built>) -> Built {
    let mut ring = Keyring::default();
    let mut keys = BTreeMap::new();
    for (id, app) in from.iter().filter(|(id, _)| !Broker::is_internal(id)) {
        let same = known.filter(|known| {
            let before = known.from.get(id);
            before.is_some_and(|before| Arc::ptr_eq(before, app))
        });
        let same = same.and_then(|known| known.keys.get(id)).cloned();
        let of_app = same.unwrap_or_else(|| Arc::new(read(id, app)));
        keys.insert(id.clone(), of_app.clone());
        ring.put(id.clone(), of_app);
    }
    let connections = known.map(|known| known.connections.clone());
    let connections = connections.unwrap_or_else(|| Arc::new(ConnectionKeys::new(&born.secret)));
    let ring = Arc::new(ring);
    Built {
        from,
        keys,
        ring,
        connections,
    }
}

fn read(id: &AppId, app: &control::App) -> AppKeys {
    let keys = app.keys.iter().filter_map(|key| {
        let capability = Capability::parse(&key.capability);
        let capability = capability
            .inspect_err(|err| {
                tracing::error!(app = app.id, key = key.id, error = %err, "a key is left out");
            })
            .ok()?;
        Some(Key {
            app: id.clone(),
            id: key.id.clone(),
            secret: Secret::new(key.secret.clone()),
            capability: Arc::new(capability),
            revocable_tokens: key.revocable_tokens,
        })
    });
    keys.collect()
}
