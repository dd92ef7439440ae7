//! How long a client's credential lasts, and the change to a new one in the middle of a conversation (§2.4.5).

use crate::auth::{ClientId, Identity, Secret, TokenClaims};
use crate::types::{ErrorCode, ErrorInfo};

/// How long before its token expires a client is asked for a new one.
const PROMPT_BEFORE_MS: u64 = 30_000;

/// With less time than this left, asking makes no sense.
const PROMPT_MIN_MS: u64 = 5_500;

/// Least time between a new token and being asked for the next.
const PAUSE_MIN_MS: u64 = 5_000;

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Ask the client for a new token.
    Prompt,
    /// The credential is good for nothing any more.
    End(ErrorCode),
}

/// Invariant: at most one token is being checked and one waits.
#[derive(Debug)]
pub(super) struct Credential {
    prompt_at_ms: Option<u64>,
    ends: Option<(u64, ErrorCode)>,
    checking: bool,
    next: Option<Secret>,
    /// For the sake of which revocation the client was asked for a new token.
    asked_ms: Option<u64>,
}

impl Credential {
    pub(super) fn new(claims: Option<&TokenClaims>, now_ms: u64) -> Self {
        let mut credential = Self {
            prompt_at_ms: None,
            ends: None,
            checking: false,
            next: None,
            asked_ms: None,
        };
        credential.accept(claims, now_ms);
        credential
    }

    /// From now on this is what the client proved itself with; `None`: a key.
    pub(super) fn accept(&mut self, claims: Option<&TokenClaims>, now_ms: u64) {
        let expires = claims.map(|claims| claims.expires_at_ms);
        self.ends = expires.map(|at| (at, ErrorCode::TokenExpired));
        self.prompt_at_ms = expires.and_then(|at| {
            let left = at.saturating_sub(now_ms);
            // A client whose tokens live no longer would be asked again as soon as it has answered.
            let short = left < PROMPT_BEFORE_MS + PAUSE_MIN_MS;
            let before = if short { left / 2 } else { PROMPT_BEFORE_MS };
            (before >= PROMPT_MIN_MS).then(|| at - before)
        });
    }

    /// The credential will be good for nothing at `at_ms`, if it is not replaced before. Gives whether the client is to be
    /// asked for another: once for each revocation, so that one that answers with the same token is not asked for ever.
    pub(super) fn revoke_at(&mut self, at_ms: u64) -> bool {
        if self.ends.is_none_or(|(ends, _)| at_ms < ends) {
            self.ends = Some((at_ms, ErrorCode::TokenRevoked));
        }
        self.prompt_at_ms = None;
        self.asked_ms.replace(at_ms) != Some(at_ms)
    }

    /// The client brings a token: the one to check now, if none is being checked.
    pub(super) fn offer(&mut self, token: Secret) -> Option<Secret> {
        if self.checking {
            // Who sends another token meanwhile wants that one to count.
            self.next = Some(token);
            return None;
        }
        self.checking = true;
        Some(token)
    }

    /// A check is through. `Err`: its result does not count; the token to check instead, if there is one.
    pub(super) fn checked(&mut self) -> Result<(), Option<Secret>> {
        match self.next.take() {
            Some(token) => Err(Some(token)),
            None if std::mem::take(&mut self.checking) => Ok(()),
            None => Err(None),
        }
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        let ends = self.ends.map(|(at, _)| at);
        self.prompt_at_ms.into_iter().chain(ends).min()
    }

    pub(super) fn take_due(&mut self, now_ms: u64) -> Option<Due> {
        if let Some((at, code)) = self.ends
            && at <= now_ms
        {
            return Some(Due::End(code));
        }
        let due = self.prompt_at_ms.is_some_and(|at| at <= now_ms);
        if !due {
            return None;
        }
        self.prompt_at_ms = None;
        let left = self.ends.map_or(u64::MAX, |(at, _)| at - now_ms);
        (left >= PROMPT_MIN_MS).then_some(Due::Prompt)
    }
}

/// Who the client is after it proved itself anew.
///
/// # Errors
/// `IncompatibleCredentials` when that is somebody else: the app of a connection never changes, nor a client id it has.
pub(super) fn succeed(former: &Identity, new: Identity) -> Result<Identity, ErrorInfo> {
    let refused = |what| Err(ErrorInfo::new(ErrorCode::IncompatibleCredentials, what));
    if former.app != new.app {
        return refused("the new credential is another app's");
    }
    let client_id = match (&former.client_id, new.client_id) {
        (ClientId::Exactly(own), ClientId::Any) => ClientId::Exactly(own.clone()),
        (ClientId::Exactly(own), ClientId::Exactly(id)) if *own == id => ClientId::Exactly(id),
        (ClientId::Exactly(_), _) => {
            return refused("the new credential is not this client's");
        }
        (ClientId::Any | ClientId::Anonymous, id) => id,
    };
    Ok(Identity { client_id, ..new })
}
