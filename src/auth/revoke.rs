//! Requests to revoke tokens of a key (§3.7.5).

use serde::Deserialize;

use crate::auth::key::refused;
use crate::auth::{KeyName, Keyring, Presented, REVOCABLE_TTL_MAX_MS, Revocation, Target};
use crate::types::{ErrorCode, ErrorInfo};

/// Targets of one request.
const TARGETS_MAX: usize = 100;

/// How much later a revocation applies that lets clients bring another token first.
const MARGIN_MS: u64 = 30_000;

/// What is asked for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RevocationRequest {
    /// `type:value` each.
    pub targets: Vec<String>,
    /// Milliseconds since 1970; now where it is missing.
    #[serde(default)]
    pub issued_before: Option<u64>,
    /// Whether clients may bring another token first.
    #[serde(default)]
    pub allow_reauth_margin: Option<bool>,
}

/// What comes of one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// As it was given.
    pub target: String,
    pub outcome: Result<Revocation, ErrorInfo>,
}

impl Keyring {
    /// What is to be revoked, target by target in their order. Nothing is until it is in the registry.
    ///
    /// # Errors
    /// `RevocationNeedsKey` for a token; what [`Self::authenticate`] says of a key; `WrongKeyForRevocation` for another than
    /// the one named; `RevocationDisabled` where its tokens cannot be revoked; `InvalidParameter` for no or too many targets,
    /// and for a time in the future or more than an hour ago.
    pub fn revoke(
        &self,
        key_name: &str,
        presented: &Presented,
        request: &RevocationRequest,
        now_ms: u64,
    ) -> Result<Vec<Revoked>, ErrorInfo> {
        let Presented::Key(credential) = presented else {
            return Err(ErrorCode::RevocationNeedsKey.into());
        };
        let key = self.prove(credential)?;
        let name = KeyName::parse(key_name).ok_or_else(|| refused("there is no such key"))?;
        if key.name() != name {
            return Err(ErrorCode::WrongKeyForRevocation.into());
        }
        if !key.revocable_tokens {
            return Err(ErrorCode::RevocationDisabled.into());
        }
        let parameter = |what: &str| ErrorInfo::new(ErrorCode::InvalidParameter, what);
        if !(1..=TARGETS_MAX).contains(&request.targets.len()) {
            return Err(parameter("1 to 100 targets are possible"));
        }
        let issued_before_ms = request.issued_before.unwrap_or(now_ms);
        if issued_before_ms > now_ms || now_ms - issued_before_ms > REVOCABLE_TTL_MAX_MS {
            let what = "issuedBefore is in the future or more than an hour ago";
            return Err(parameter(what));
        }
        let margin = request.allow_reauth_margin.unwrap_or(false);
        let applies_at_ms = now_ms + if margin { MARGIN_MS } else { 0 };
        let revoked = request.targets.iter().map(|text| Revoked {
            target: text.clone(),
            outcome: Target::parse(text).map(|target| Revocation {
                key: name.clone(),
                target,
                issued_before_ms,
                applies_at_ms,
            }),
        });
        Ok(revoked.collect())
    }
}

#[cfg(test)]
mod tests;
