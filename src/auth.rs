//! Who a client is and what it may do: (credential, keys, now) → identity with a capability.
//!
//! Pure: keys and revocations come from the registry, time and randomness from the caller. Nothing is remembered of a token
//! that was issued: it says everything itself, under its key's MAC. A refusal is an [`ErrorInfo`] whose code sends
//! a client for another token only where another one can help.

mod authenticate;
mod capability;
mod client_id;
mod connection_key;
mod jwt;
mod key;
mod presented;
mod revocation;
mod revoke;
mod token_request;

pub use capability::{Capability, InvalidCapability, Operation};
pub use client_id::ClientId;
pub use connection_key::{ConnectionKeys, Holder, InvalidConnectionKey, is_connection_id};
pub use key::{AppKeys, Credential, Key, KeyName, Keyring, Secret, is_key_id};
pub use presented::Presented;
pub use revocation::{Revocation, Revocations, Target, TooManyRevocations};
pub use revoke::{RevocationRequest, Revoked};
pub use token_request::{Nonce, TokenDetails, TokenRequest};

use std::sync::Arc;

use crate::types::{AppId, ErrorCode, ErrorInfo, Retry};

/// How long a token lives when nothing else is asked for.
const TTL_DEFAULT_MS: u64 = 3_600_000;

/// How long a token may live.
const TTL_MAX_MS: u64 = 24 * 3_600_000;

/// How long a token may live that can be revoked: so long must be remembered what was.
const REVOCABLE_TTL_MAX_MS: u64 = 3_600_000;

/// How far the clock of whoever signs may be from ours.
const CLOCK_SKEW_MAX_MS: u64 = 120_000;

/// A client that proved who it is. What it may do was decided when it did.
#[derive(Clone, Debug)]
pub struct Identity {
    pub app: AppId,
    /// The key it proved, or that signed its token, without the app.
    pub key_id: String,
    /// The key's secret then: another key may come to have the same id.
    pub secret: Secret,
    pub client_id: ClientId,
    pub capability: Arc<Capability>,
    /// `None` when it proved the key itself, which never expires.
    pub token: Option<TokenClaims>,
}

/// What else a token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenClaims {
    pub issued_at_ms: u64,
    /// From when on it counts no more.
    pub expires_at_ms: u64,
    pub revocation_key: Option<String>,
    /// Its key's tokens can be revoked.
    pub revocable: bool,
    /// It allows every client id, whichever its bearer took.
    pub any_client: bool,
}

impl Identity {
    /// Who a live connection is after it brought another token; `next` is what came of authenticating that.
    ///
    /// # Errors
    /// `IncompatibleCredentials` when the token is for another app or client. A token that is not believed is
    /// `InvalidCredentials` whatever is wrong with it: a client that hears the code of a token error in answer to a new
    /// token brings new ones for ever (§2.4.5).
    pub fn renewed_by(&self, next: Result<Self, ErrorInfo>) -> Result<Self, ErrorInfo> {
        let next = next.map_err(|err| match err.code.retry() {
            Retry::WithNewToken => ErrorInfo::new(ErrorCode::InvalidCredentials, err.message),
            Retry::Never | Retry::Later | Retry::Unknown => err,
        })?;
        if next.app != self.app {
            let what = "the connection belongs to another app";
            return Err(ErrorInfo::new(ErrorCode::IncompatibleCredentials, what));
        }
        let client_id = self.client_id.renewed_by(next.client_id)?;
        Ok(Self { client_id, ..next })
    }
}
