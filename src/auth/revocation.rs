//! Tokens that are taken back before they expire (§3.7.5).
//!
//! What is kept is whose tokens issued before when no longer count, not tokens: a token carries everything itself, so there is
//! no list of those that exist.

use std::collections::BTreeMap;
use std::fmt;

use crate::auth::key::KeyName;
use crate::auth::{ClientId, Identity, REVOCABLE_TTL_MAX_MS};
use crate::types::{AppId, ErrorCode, ErrorInfo};

/// Targets that one app may have revoked at a time; each is forgotten after an hour.
const TARGETS_MAX: usize = 10_000;

/// Longest target in bytes: a channel's name and then some.
const TARGET_BYTES_MAX: usize = 2_100;

/// Marks that one target may have whose moment has not come; further ones come with the last of them.
const MARKS_MAX: usize = 4;

/// Which of a key's tokens are meant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    ClientId(String),
    /// Tokens with this `x-ably-revocation-key`.
    RevocationKey(String),
    /// Tokens whose capability names this very resource.
    Channel(String),
}

impl Target {
    /// From `type:value`.
    ///
    /// # Errors
    /// `InvalidParameter` for another type, or a value that is empty or too long.
    pub fn parse(text: &str) -> Result<Self, ErrorInfo> {
        let refuse = |what: &str| ErrorInfo::new(ErrorCode::InvalidParameter, what);
        let (kind, value) = (text.split_once(':'))
            .ok_or_else(|| refuse("target is not of the form `type:value`"))?;
        if value.is_empty() || value.len() > TARGET_BYTES_MAX {
            return Err(refuse("target's value is empty or too long"));
        }
        let value = value.to_owned();
        match kind {
            "clientId" => Ok(Self::ClientId(value)),
            "revocationKey" => Ok(Self::RevocationKey(value)),
            "channel" => Ok(Self::Channel(value)),
            _ => Err(refuse(
                "target's type is not `clientId`, `revocationKey` or `channel`",
            )),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClientId(value) => write!(f, "clientId:{value}"),
            Self::RevocationKey(value) => write!(f, "revocationKey:{value}"),
            Self::Channel(value) => write!(f, "channel:{value}"),
        }
    }
}

/// From `applies_at_ms` on, no token of the key that is the target's and was issued before `issued_before_ms` counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revocation {
    pub key: KeyName,
    pub target: Target,
    pub issued_before_ms: u64,
    pub applies_at_ms: u64,
}

/// An app has revoked as much as it may at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "more than {TARGETS_MAX} targets are revoked; each is forgotten an hour after its tokens were issued"
)]
pub struct TooManyRevocations;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    issued_before_ms: u64,
    applies_at_ms: u64,
}

impl Mark {
    /// Every token that it could cover has expired: revocable ones live an hour at most.
    const fn is_over(&self, now_ms: u64) -> bool {
        self.issued_before_ms.saturating_add(REVOCABLE_TTL_MAX_MS) <= now_ms
    }

    /// Whatever the other covers at any time, this one does.
    const fn includes(&self, other: &Self) -> bool {
        self.issued_before_ms >= other.issued_before_ms && self.applies_at_ms <= other.applies_at_ms
    }
}

type Targets = BTreeMap<Target, Vec<Mark>>;

/// What is revoked at present. Bounded: 10,000 targets an app, each with at most five marks, each for an hour.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revocations(BTreeMap<AppId, BTreeMap<String, Targets>>);

impl Revocations {
    /// Revokes. The same a second time changes nothing. What is over counts for the bound until [`Self::expire`].
    ///
    /// # Errors
    /// When the app has too many targets; nothing changed.
    pub fn add(&mut self, revocation: Revocation, now_ms: u64) -> Result<(), TooManyRevocations> {
        let mark = Mark {
            issued_before_ms: revocation.issued_before_ms,
            applies_at_ms: revocation.applies_at_ms,
        };
        if mark.is_over(now_ms) {
            return Ok(());
        }
        let KeyName { app, key_id } = revocation.key;
        let known = self.0.get(&app);
        let is_known = known
            .and_then(|keys| keys.get(&key_id))
            .is_some_and(|targets| targets.contains_key(&revocation.target));
        let targets = known.map_or(0, |keys| keys.values().map(BTreeMap::len).sum());
        if !is_known && targets >= TARGETS_MAX {
            return Err(TooManyRevocations);
        }
        let targets = self.0.entry(app).or_default().entry(key_id).or_default();
        insert(targets.entry(revocation.target).or_default(), mark, now_ms);
        Ok(())
    }

    /// Forgets what is over.
    pub fn expire(&mut self, now_ms: u64) {
        self.0.retain(|_, keys| {
            keys.retain(|_, targets| {
                targets.retain(|_, marks| {
                    marks.retain(|mark| !mark.is_over(now_ms));
                    !marks.is_empty()
                });
                !targets.is_empty()
            });
            !keys.is_empty()
        });
    }

    /// Forgets an app.
    pub fn remove_app(&mut self, app: &AppId) {
        self.0.remove(app);
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Everything that is revoked, in the same order for the same content.
    pub fn iter(&self) -> impl Iterator<Item = Revocation> {
        let keys = self.0.iter();
        let keys = keys.flat_map(|(app, keys)| keys.iter().map(move |key| (app, key)));
        keys.flat_map(|(app, (key_id, targets))| {
            let marks = targets.iter();
            let marks = marks.flat_map(|(target, marks)| marks.iter().map(move |m| (target, m)));
            marks.map(move |(target, mark)| Revocation {
                key: KeyName {
                    app: app.clone(),
                    key_id: key_id.clone(),
                },
                target: target.clone(),
                issued_before_ms: mark.issued_before_ms,
                applies_at_ms: mark.applies_at_ms,
            })
        })
    }

    /// Whether the identity rests on a token that counts no more.
    #[must_use]
    pub fn covers(&self, identity: &Identity, now_ms: u64) -> bool {
        self.applies_at(identity).is_some_and(|at| at <= now_ms)
    }

    /// From when on the identity's token counts no more; `None` when nothing is said against it. A connection whose moment
    /// has not come yet should be asked for another token.
    #[must_use]
    pub fn applies_at(&self, identity: &Identity) -> Option<u64> {
        let token = identity.token.as_ref().filter(|token| token.revocable)?;
        let targets = self.0.get(&identity.app)?.get(&identity.key_id)?;
        let client_id = match &identity.client_id {
            ClientId::Exactly(id) => Some(id.clone()),
            ClientId::Any | ClientId::Anonymous => None,
        };
        let any_client = token.any_client.then(|| "*".to_owned());
        let channels = identity.capability.resources().map(str::to_owned);
        let own = (client_id
            .into_iter()
            .chain(any_client)
            .map(Target::ClientId))
        .chain(token.revocation_key.clone().map(Target::RevocationKey))
        .chain(channels.map(Target::Channel));
        let marks = own.filter_map(|target| targets.get(&target)).flatten();
        marks
            .filter(|mark| token.issued_at_ms < mark.issued_before_ms)
            .map(|mark| mark.applies_at_ms)
            .min()
    }
}

/// Keeps the marks few: one that holds already, and those to come that say more than it, in the order of their moments.
fn insert(marks: &mut Vec<Mark>, mark: Mark, now_ms: u64) {
    if marks.iter().any(|known| known.includes(&mark)) {
        return;
    }
    marks.retain(|known| !mark.includes(known));
    marks.push(mark);
    // What holds already holds alike, whenever it began.
    let holds = |mark: &Mark| mark.applies_at_ms <= now_ms;
    let holding = marks.iter().filter(|mark| holds(mark));
    let newest = holding.max_by_key(|mark| mark.issued_before_ms).copied();
    marks.retain(|mark| !holds(mark) || Some(*mark) == newest);
    marks.sort_unstable_by_key(|mark| mark.applies_at_ms);
    if marks.len() > MARKS_MAX + 1 {
        // Too eager for the last one by less than its margin, never too late.
        let last = marks.pop().map_or(0, |mark| mark.issued_before_ms);
        if let Some(before) = marks.last_mut() {
            before.issued_before_ms = before.issued_before_ms.max(last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::{Capability, Secret, TokenClaims};
    use proptest::prelude::*;
    use std::sync::Arc;

    const HOUR: u64 = 3_600_000;
    const NOW: u64 = 100 * HOUR;

    fn revocation(target: &str, issued_before_ms: u64, applies_at_ms: u64) -> Revocation {
        Revocation {
            key: KeyName::parse("app.key").unwrap(),
            target: Target::parse(target).unwrap(),
            issued_before_ms,
            applies_at_ms,
        }
    }

    fn revoked(target: &str, issued_before_ms: u64) -> Revocations {
        let mut set = Revocations::default();
        set.add(revocation(target, issued_before_ms, NOW), NOW)
            .unwrap();
        set
    }

    fn identity(client_id: ClientId, issued_at_ms: u64) -> Identity {
        Identity {
            app: "app".parse().unwrap(),
            key_id: "key".into(),
            secret: Secret::new("secret"),
            client_id,
            capability: Arc::new(Capability::parse(r#"{"a:*":["*"],"b":["*"]}"#).unwrap()),
            token: Some(TokenClaims {
                issued_at_ms,
                expires_at_ms: issued_at_ms + HOUR,
                revocation_key: Some("group".into()),
                revocable: true,
                any_client: false,
            }),
        }
    }

    /// The bearer of a token for every client, who took this id.
    fn any(client_id: ClientId) -> Identity {
        let mut identity = identity(client_id, NOW - 1);
        identity.token.as_mut().unwrap().any_client = true;
        identity
    }

    fn me(issued_at_ms: u64) -> Identity {
        identity(ClientId::Exactly("me".into()), issued_at_ms)
    }

    #[test]
    fn what_was_issued_before_counts_no_more() {
        for target in [
            "clientId:me",
            "revocationKey:group",
            "channel:a:*",
            "channel:b",
        ] {
            let set = revoked(target, NOW);
            assert!(set.covers(&me(NOW - 1), NOW), "{target}");
            assert!(!set.covers(&me(NOW), NOW), "{target}");
        }
        for target in [
            "clientId:you",
            "clientId:*",
            "revocationKey:me",
            "channel:a:x",
            "channel:c",
        ] {
            assert!(!revoked(target, NOW).covers(&me(NOW - 1), NOW), "{target}");
        }
        for bearer in [ClientId::Any, ClientId::Exactly("me".into())] {
            assert!(revoked("clientId:*", NOW).covers(&any(bearer), NOW));
        }
        let me = any(ClientId::Exactly("me".into()));
        assert!(revoked("clientId:me", NOW).covers(&me, NOW));
    }

    #[test]
    fn only_revocable_tokens_of_the_key_are_meant() {
        let set = revoked("clientId:me", NOW);
        let mut others = [me(1), me(1), me(1), me(1)];
        others[0].key_id = "other".into();
        others[1].app = "other".parse().unwrap();
        others[2].token = None;
        others[3].token.as_mut().unwrap().revocable = false;
        for other in &others {
            assert!(!set.covers(other, NOW), "{other:?}");
        }
    }

    #[test]
    fn a_margin_lets_a_client_renew_and_a_later_one_revives_nobody() {
        let mut set = Revocations::default();
        set.add(revocation("clientId:me", NOW, NOW + 30_000), NOW)
            .unwrap();
        let old = me(NOW - 5);
        assert_eq!(set.applies_at(&old), Some(NOW + 30_000));
        assert!(!set.covers(&old, NOW + 29_999));
        assert!(set.covers(&old, NOW + 30_000));
        set.add(revocation("clientId:me", NOW - 3, NOW), NOW)
            .unwrap();
        set.add(revocation("clientId:me", NOW + 10, NOW + 40_000), NOW + 10)
            .unwrap();
        assert!(set.covers(&old, NOW + 10), "at once, as was said");
        assert!(!set.covers(&me(NOW - 1), NOW + 10));
        assert_eq!(set.applies_at(&me(NOW + 5)), Some(NOW + 40_000));
    }

    #[test]
    fn what_is_over_is_forgotten() {
        let mut set = revoked("clientId:me", NOW);
        set.expire(NOW + HOUR - 1);
        assert!(!set.is_empty());
        set.expire(NOW + HOUR);
        assert!(set.is_empty());
        set.add(revocation("clientId:me", NOW - HOUR, NOW), NOW)
            .unwrap();
        assert!(set.is_empty(), "no token can be that old");
    }

    #[test]
    fn an_app_may_revoke_so_much_and_no_more() {
        let mut set = Revocations::default();
        let of = |n: usize| revocation(&format!("clientId:{n}"), NOW, NOW);
        for n in 0..TARGETS_MAX {
            insert_raw(&mut set, of(n));
        }
        assert_eq!(set.add(of(TARGETS_MAX), NOW), Err(TooManyRevocations));
        assert_eq!(set.add(of(0), NOW), Ok(()), "known already");
        let mut other = of(0);
        other.key.app = "other".parse().unwrap();
        assert_eq!(
            set.add(other, NOW),
            Ok(()),
            "another app's count is its own"
        );
        set.expire(NOW + HOUR);
        let later = revocation("clientId:me", NOW + HOUR, NOW + HOUR);
        assert_eq!(set.add(later, NOW + HOUR), Ok(()));
    }

    /// As `add`, without counting what there is.
    fn insert_raw(set: &mut Revocations, revocation: Revocation) {
        let targets = set.0.entry(revocation.key.app).or_default();
        let targets = targets.entry(revocation.key.key_id).or_default();
        let mark = Mark {
            issued_before_ms: revocation.issued_before_ms,
            applies_at_ms: revocation.applies_at_ms,
        };
        targets.insert(revocation.target, vec![mark]);
    }

    #[test]
    fn targets_are_read_and_shown_alike() {
        for text in ["clientId:a:b", "revocationKey:x", "channel:ns:*"] {
            assert_eq!(Target::parse(text).unwrap().to_string(), text);
        }
        for bad in [
            "",
            "me",
            "clientId:",
            "invalidType:abc",
            &format!("channel:{}", "x".repeat(2101)),
        ] {
            let error = Target::parse(bad).unwrap_err();
            assert_eq!(error.code.status(), 400, "{bad}");
        }
    }

    proptest! {
        /// Against the plain list of everything that was ever revoked: nothing counts again, and at most what exceeds the
        /// bound of marks is early.
        #[test]
        fn a_revocation_holds_until_its_tokens_are_over(
            added in prop::collection::vec((0_u64..100, 0_u64..40, 0_u64..8), 1..30), issued in 0_u64..200,
        ) {
            let mut set = Revocations::default();
            let mut list = Vec::new();
            let mut now = NOW;
            for (back, margin, pause) in added {
                now += pause;
                let one = revocation("clientId:me", now - back, now + margin);
                list.push(one.clone());
                set.expire(now);
                set.add(one, now).unwrap();
                let token = me(NOW - 100 + issued);
                let by_list = list.iter().any(|one| NOW - 100 + issued < one.issued_before_ms && one.applies_at_ms <= now);
                prop_assert!(!by_list || set.covers(&token, now));
                prop_assert!(set.iter().count() <= MARKS_MAX + 1);
                if list.len() <= MARKS_MAX {
                    prop_assert_eq!(set.covers(&token, now), by_list);
                }
            }
            prop_assert!(set.iter().all(|one| one.issued_before_ms + HOUR > now));
        }
    }
}
