//! Who may come in: the registry's keys, ready for use.

use std::sync::{Arc, Mutex};

use crate::auth::{Capability, ConnectionKeys, Credential, Key, Keyring, Secret};
use crate::broker::Broker;
use crate::types::{ErrorCode, ErrorInfo};
use crate::wire::control;

/// The keys of the cluster as it is now. Clones share what was built from the registry.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    broker: Broker,
    built: Arc<Mutex<Option<Built>>>,
}

#[derive(Clone, Debug)]
struct Built {
    from: Arc<control::Bootstrap>,
    ring: Arc<Keyring>,
    connections: Arc<ConnectionKeys>,
}

impl Keys {
    pub(crate) fn new(broker: Broker) -> Self {
        let built = Arc::default();
        Self { broker, built }
    }

    /// The key that a credential proves.
    ///
    /// # Errors
    /// As [`Keyring::authenticate`]; `Busy` while the cluster is not born.
    pub(crate) fn authenticate(&self, credential: &Credential) -> Result<Key, ErrorInfo> {
        self.built()?.ring.authenticate(credential).cloned()
    }

    /// What makes connection keys.
    pub(crate) fn connections(&self) -> Result<Arc<ConnectionKeys>, ErrorInfo> {
        Ok(self.built()?.connections)
    }

    fn built(&self) -> Result<Built, ErrorInfo> {
        let registry = self.broker.registry();
        let now = registry.borrow().bootstrap.clone();
        let now = now.ok_or_else(|| ErrorInfo::new(ErrorCode::Busy, "the cluster is starting"))?;
        let mut built = self.built.lock().unwrap_or_else(|err| err.into_inner());
        match &*built {
            Some(built) if Arc::ptr_eq(&built.from, &now) => Ok(built.clone()),
            _ => Ok(built.insert(build(now)).clone()),
        }
    }
}

fn build(from: Arc<control::Bootstrap>) -> Built {
    let mut ring = Keyring::default();
    for app in &from.apps {
        let Ok(id) = app.id.parse::<crate::types::AppId>() else {
            tracing::error!(app = app.id, "the registry holds an app that cannot be");
            continue;
        };
        ring.add_app(id.clone());
        for key in &app.keys {
            match Capability::parse(&key.capability) {
                Ok(capability) => ring.add_key(Key {
                    app: id.clone(),
                    id: key.id.clone(),
                    secret: Secret::new(key.secret.clone()),
                    capability: Arc::new(capability),
                }),
                Err(err) => {
                    tracing::error!(app = app.id, key = key.id, error = %err, "a key is left out");
                }
            }
        }
    }
    let connections = Arc::new(ConnectionKeys::new(&from.secret));
    let ring = Arc::new(ring);
    Built {
        from,
        ring,
        connections,
    }
}
