//! Who may come in: the registry's keys and revocations, ready for use.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::auth::{
    AppKeys, Capability, ConnectionKeys, Identity, Key, Keyring, Presented, Revocations, Secret,
};
use crate::broker::Broker;
use crate::types::{AppId, ErrorCode, ErrorInfo};
use crate::wire::control;

/// The keys of the cluster as it is now. Clones share what was built from the registry.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    broker: Broker,
    built: Arc<Mutex<Option<Built>>>,
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
    pub(crate) fn new(broker: Broker) -> Self {
        let built = Arc::default();
        Self { broker, built }
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

    /// What makes connection keys.
    pub(crate) fn connections(&self) -> Result<Arc<ConnectionKeys>, ErrorInfo> {
        Ok(self.built()?.0.connections)
    }

    fn built(&self) -> Result<(Built, Arc<Revocations>), ErrorInfo> {
        let registry = self.broker.registry();
        let now = registry.borrow().clone();
        let born = now.bootstrap.as_ref();
        let born =
            born.ok_or_else(|| ErrorInfo::new(ErrorCode::Busy, "the cluster is starting"))?;
        let mut built = self.built.lock().unwrap_or_else(|err| err.into_inner());
        let built = match &*built {
            Some(built) if Arc::ptr_eq(&built.from, &now.apps) => built.clone(),
            known => {
                let next = build(now.apps.clone(), born, known.as_ref());
                built.insert(next).clone()
            }
        };
        Ok((built, now.revocations.clone()))
    }
}

/// Apps that have not changed since `known` are taken from there: creating one costs no reading of the others.
fn build(from: Arc<Apps>, born: &control::Bootstrap, known: Option<&Built>) -> Built {
    let mut ring = Keyring::default();
    let mut keys = BTreeMap::new();
    for (id, app) in from.iter() {
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
