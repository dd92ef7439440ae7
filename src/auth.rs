//! Who a client is and what it may do: (credential, keys) → identity with a capability.
//!
//! Pure: keys come from the registry, randomness from the caller. Every refusal outside this room's own
//! errors is an [`ErrorInfo`](crate::types::ErrorInfo) that does not make a client library loop.

mod capability;
mod client_id;
mod connection_key;
mod key;

pub use capability::{Capability, InvalidCapability, Operation};
pub use client_id::ClientId;
pub use connection_key::{ConnectionKeys, InvalidConnectionKey, is_connection_id};
pub use key::{Credential, Key, Keyring, Secret};

use std::sync::Arc;

use crate::types::AppId;

/// A client that proved who it is. What it may do was decided when it connected.
#[derive(Clone, Debug)]
pub struct Identity {
    pub app: AppId,
    /// The key it proved, without the app and without the secret.
    pub key_id: String,
    pub client_id: ClientId,
    pub capability: Arc<Capability>,
    /// What its token says about time and revocation; `None` for a key, which does not expire.
    pub token: Option<TokenClaims>,
}

/// What a token says beside who and what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenClaims {
    /// Milliseconds since 1970.
    pub issued_at_ms: u64,
    /// Milliseconds since 1970.
    pub expires_at_ms: u64,
    pub revocation_key: Option<String>,
    pub revocable: bool,
}
