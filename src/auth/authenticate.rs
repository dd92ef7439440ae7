//! From what a client presents to who it is (§3.7.1, §3.7.3), and whether it still is.

use std::sync::Arc;

use crate::auth::jwt::{self, Claims, Jwt};
use crate::auth::key::refused;
use crate::auth::{
    CLOCK_SKEW_MAX_MS, Capability, ClientId, Identity, Key, KeyName, Keyring, Presented,
    REVOCABLE_TTL_MAX_MS, Revocations, TTL_MAX_MS, TokenClaims,
};
use crate::types::{ErrorCode, ErrorInfo};

/// Longest token in bytes: as long as client libraries send.
const TOKEN_BYTES_MAX: usize = 128 * 1024;

impl Keyring {
    /// Who presents this, and what it may do: of a token what it says and its key may as well. `wanted` is the client id
    /// that it wants to be.
    ///
    /// # Errors
    /// `NotFound` for an app that does not exist. `InvalidCredentials` for a key that does not, or with another secret.
    /// `TokenUnrecognized`, `InvalidJwt`, `TokenExpired` and `TokenRevoked` where another token can help. Of a token that is
    /// well signed but cannot be used: `InvalidParameter` when it lives too long, `BadRequest` when its capability is
    /// none, `CapabilityDenied` when its key may nothing of it. `IncompatibleCredentials` and `InvalidClientId` for a
    /// client id that it cannot have. No error repeats a secret.
    pub fn authenticate(
        &self,
        presented: &Presented,
        wanted: Option<&str>,
        now_ms: u64,
        revocations: &Revocations,
    ) -> Result<Identity, ErrorInfo> {
        let identity = match presented {
            Presented::Key(credential) => {
                let key = self.prove(credential)?;
                Identity {
                    app: key.app.clone(),
                    key_id: key.id.clone(),
                    secret: key.secret.clone(),
                    client_id: ClientId::of_key(wanted)?,
                    capability: key.capability.clone(),
                    token: None,
                }
            }
            Presented::Token(token) => self.of_token(token.expose(), wanted, now_ms)?,
        };
        if revocations.covers(&identity, now_ms) {
            return Err(ErrorCode::TokenRevoked.into());
        }
        Ok(identity)
    }

    /// Whether a client that proved to be this may still be here.
    ///
    /// # Errors
    /// `NotFound` when its app was deleted, `KeyRevoked` when its key was, be there another with its id; `TokenRevoked` and `TokenExpired`.
    pub fn review(
        &self,
        identity: &Identity,
        now_ms: u64,
        revocations: &Revocations,
    ) -> Result<(), ErrorInfo> {
        let key = self.key(&identity.app, &identity.key_id)?;
        if key.is_none_or(|key| !key.secret.equals(&identity.secret)) {
            return Err(ErrorCode::KeyRevoked.into());
        }
        if revocations.covers(identity, now_ms) {
            return Err(ErrorCode::TokenRevoked.into());
        }
        match &identity.token {
            Some(token) if token.expires_at_ms <= now_ms => Err(ErrorCode::TokenExpired.into()),
            _ => Ok(()),
        }
    }

    /// A token, or one that a customer's JWT carries. What such a JWT says else, and who signed it, does not matter: who has it
    /// has the token inside. Only when it ends does, for whoever made it wanted no more.
    fn of_token(
        &self,
        text: &str,
        wanted: Option<&str>,
        now_ms: u64,
    ) -> Result<Identity, ErrorInfo> {
        if text.len() > TOKEN_BYTES_MAX {
            let what = format!("token is longer than {TOKEN_BYTES_MAX} bytes");
            return Err(ErrorInfo::new(ErrorCode::InvalidCredentialForm, what));
        }
        let outer = Jwt::parse(text)?;
        let Some(carried) = &outer.claims.token else {
            return self.of_jwt(outer, wanted, now_ms);
        };
        let inner = Jwt::parse(carried)?;
        if inner.claims.token.is_some() {
            return Err(jwt::invalid("the token in the JWT carries a further one"));
        }
        let mut identity = self.of_jwt(inner, wanted, now_ms)?;
        let end = outer
            .claims
            .exp
            .map(|exp| time(Some(exp), "exp"))
            .transpose()?;
        if let (Some(end), Some(token)) = (end, &mut identity.token) {
            token.expires_at_ms = token.expires_at_ms.min(end);
            if token.expires_at_ms <= now_ms {
                return Err(ErrorCode::TokenExpired.into());
            }
        }
        Ok(identity)
    }

    fn of_jwt(
        &self,
        jwt: Jwt<'_>,
        wanted: Option<&str>,
        now_ms: u64,
    ) -> Result<Identity, ErrorInfo> {
        let name = jwt.header.kid.as_deref().and_then(KeyName::parse);
        let name = name.ok_or_else(|| jwt::invalid("the JWT's `kid` is not a key's name"))?;
        let key = self.key(&name.app, &name.key_id)?;
        let key = key.ok_or_else(|| refused("no such key as the JWT's `kid`"))?;
        let claims = jwt.verify(&key.secret.signer())?;
        let token = lifetime(&claims, key, now_ms)?;
        let capability = match &claims.capability {
            None => key.capability.clone(),
            Some(text) => narrowed(key, text)?,
        };
        Ok(Identity {
            app: name.app,
            key_id: name.key_id,
            secret: key.secret.clone(),
            client_id: ClientId::of_token(claims.client_id.as_deref(), wanted)?,
            capability,
            token: Some(token),
        })
    }
}

/// What the key may of what is asked for.
///
/// # Errors
/// `BadRequest` when that is no capability; `CapabilityDenied` when it is nothing.
pub(super) fn narrowed(key: &Key, text: &str) -> Result<Arc<Capability>, ErrorInfo> {
    let common = key.capability.intersect(&Capability::parse(text)?)?;
    common.map(Arc::new).ok_or_else(|| {
        let what = "the key permits nothing of the capability asked for";
        ErrorInfo::new(ErrorCode::CapabilityDenied, what)
    })
}

/// From when to when the token counts. One that can be revoked counts for an hour, whatever it says.
fn lifetime(claims: &Claims, key: &Key, now_ms: u64) -> Result<TokenClaims, ErrorInfo> {
    let issued_at_ms = time(claims.iat, "iat")?;
    let expires_at_ms = time(claims.exp, "exp")?;
    let starts = claims.nbf.map(|nbf| time(Some(nbf), "nbf")).transpose()?;
    let latest = now_ms.saturating_add(CLOCK_SKEW_MAX_MS);
    if issued_at_ms > latest || starts.is_some_and(|starts| starts > latest) {
        return Err(jwt::invalid("the JWT is from the future"));
    }
    if expires_at_ms.saturating_sub(issued_at_ms) > TTL_MAX_MS {
        let what = "token lives for more than 24 hours";
        return Err(ErrorInfo::new(ErrorCode::InvalidParameter, what));
    }
    let revocable = key.revocable_tokens;
    let expires_at_ms = match revocable {
        true => expires_at_ms.min(issued_at_ms + REVOCABLE_TTL_MAX_MS),
        false => expires_at_ms,
    };
    if expires_at_ms <= now_ms {
        return Err(ErrorCode::TokenExpired.into());
    }
    Ok(TokenClaims {
        issued_at_ms,
        expires_at_ms,
        revocation_key: claims.revocation_key.clone(),
        revocable,
        any_client: claims.client_id.as_deref() == Some("*"),
    })
}

fn time(seconds: Option<f64>, claim: &str) -> Result<u64, ErrorInfo> {
    let ms = seconds.and_then(jwt::to_ms);
    ms.ok_or_else(|| jwt::invalid(&format!("the JWT's `{claim}` is not a time in seconds")))
}

#[cfg(test)]
mod tests;
