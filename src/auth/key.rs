//! API keys: `app.key:secret`, as clients present them and as the registry holds them (§3.7.1).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use ring::hmac;

use crate::auth::Capability;
use crate::types::{AppId, ErrorCode, ErrorInfo};

/// Shortest and longest key id in bytes. Client libraries' own tests hold `this.is:wrong` to be ill-formed.
const KEY_ID_BYTES: std::ops::RangeInclusive<usize> = 3..=64;

/// Longest secret in bytes.
const SECRET_BYTES_MAX: usize = 256;

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for whoever must sign with it or store it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Takes as long whatever differs, lengths included: compares MACs instead of the texts.
    pub(super) fn equals(&self, other: &Self) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"firth secret comparison");
        let tag = hmac::sign(&key, self.0.as_bytes());
        hmac::verify(&key, other.0.as_bytes(), tag.as_ref()).is_ok()
    }

    /// What signs in this secret's name.
    pub(super) fn signer(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, self.0.as_bytes())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Which key: `app.key`, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KeyName {
    pub app: AppId,
    pub key_id: String,
}

impl KeyName {
    /// From `app.key`; `None` when the text has not that form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (app, key_id) = text.split_once('.')?;
        Some(Self {
            app: app.parse().ok().filter(|_| is_key_id(key_id))?,
            key_id: key_id.to_owned(),
        })
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.app, self.key_id)
    }
}

/// Whether a text can be the id of a key: 3 to 64 ASCII letters, digits, `-` or `_`.
#[must_use]
pub fn is_key_id(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    KEY_ID_BYTES.contains(&text.len()) && text.bytes().all(legal)
}

/// A key that a client presents, not yet believed.
#[derive(Clone, Debug)]
pub struct Credential {
    pub app: AppId,
    pub key_id: String,
    pub secret: Secret,
}

impl Credential {
    /// From `app.key:secret`, after percent-decoding.
    ///
    /// # Errors
    /// `InvalidCredentials` when the text has not that form.
    pub fn parse(text: &str) -> Result<Self, ErrorInfo> {
        let malformed = || refused("key is not of the form `app.key:secret`");
        let (name, secret) = text.split_once(':').ok_or_else(malformed)?;
        let KeyName { app, key_id } = KeyName::parse(name).ok_or_else(malformed)?;
        if secret.is_empty() || secret.len() > SECRET_BYTES_MAX {
            return Err(malformed());
        }
        Ok(Self {
            app,
            key_id,
            secret: Secret::new(secret),
        })
    }
}

/// A key as the registry knows it.
#[derive(Clone, Debug)]
pub struct Key {
    pub app: AppId,
    pub id: String,
    pub secret: Secret,
    pub capability: Arc<Capability>,
    /// Tokens of this key can be revoked, and live an hour at most for that.
    pub revocable_tokens: bool,
}

impl Key {
    /// `app.key`.
    #[must_use]
    pub fn name(&self) -> KeyName {
        KeyName {
            app: self.app.clone(),
            key_id: self.id.clone(),
        }
    }
}

/// The keys of one app, by id.
#[derive(Clone, Debug, Default)]
pub struct AppKeys(BTreeMap<String, Key>);

impl FromIterator<Key> for AppKeys {
    /// Of two keys with one id the later one counts.
    fn from_iter<I: IntoIterator<Item = Key>>(keys: I) -> Self {
        Self(keys.into_iter().map(|key| (key.id.clone(), key)).collect())
    }
}

/// Every app of the cluster with its keys.
#[derive(Clone, Debug, Default)]
pub struct Keyring(BTreeMap<AppId, Arc<AppKeys>>);

impl Keyring {
    /// Adds an app, which is known from here on, with or without keys; or replaces the one with this id. The keys are of
    /// this app.
    pub fn put(&mut self, app: AppId, keys: Arc<AppKeys>) {
        debug_assert!(keys.0.values().all(|key| key.app == app));
        self.0.insert(app, keys);
    }

    /// The key that the credential proves.
    ///
    /// # Errors
    /// `NotFound` for an app that does not exist; `InvalidCredentials` alike for an unknown key and a
    /// wrong secret, so that nobody learns which keys exist.
    pub(super) fn prove(&self, credential: &Credential) -> Result<&Key, ErrorInfo> {
        let wrong = || refused("no such key, or its secret is another");
        let key = self.key(&credential.app, &credential.key_id)?;
        key.filter(|key| key.secret.equals(&credential.secret))
            .ok_or_else(wrong)
    }

    /// The key with this id; `None` where the app has none.
    ///
    /// # Errors
    /// `NotFound` for an app that does not exist.
    pub(super) fn key(&self, app: &AppId, key_id: &str) -> Result<Option<&Key>, ErrorInfo> {
        let keys = self.0.get(app);
        let keys =
            keys.ok_or_else(|| ErrorInfo::new(ErrorCode::NotFound, format!("no app `{app}`")))?;
        Ok(keys.0.get(key_id))
    }
}

pub(super) fn refused(what: &str) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::InvalidCredentials, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyring() -> Keyring {
        let mut ring = Keyring::default();
        for (app, secret) in [
            ("app", Some("s:e.cret")),
            ("other", Some("x")),
            ("bare", None),
        ] {
            let app: AppId = app.parse().unwrap();
            let key = secret.map(|secret| Key {
                app: app.clone(),
                id: "key".into(),
                secret: Secret::new(secret),
                capability: Arc::new(Capability::everything()),
                revocable_tokens: false,
            });
            ring.put(app, Arc::new(key.into_iter().collect()));
        }
        ring
    }

    fn code(text: &str) -> Result<AppId, ErrorCode> {
        let credential = Credential::parse(text).map_err(|e| e.code)?;
        let ring = keyring();
        ring.prove(&credential)
            .map(|key| key.app.clone())
            .map_err(|e| e.code)
    }

    #[test]
    fn a_key_opens_its_own_app_only() {
        assert_eq!(code("app.key:s:e.cret").unwrap().as_str(), "app");
        assert_eq!(code("other.key:x").unwrap().as_str(), "other");
        let refused = Err(ErrorCode::InvalidCredentials);
        for wrong in [
            "app.key:x",
            "app.key:s:e.cre",
            "app.key:s:e.cret2",
            "app.nokey:x",
            "bare.key:x",
        ] {
            assert_eq!(code(wrong), refused, "{wrong}");
        }
        assert_eq!(code("nobody.key:x"), Err(ErrorCode::NotFound));
        // What client libraries' own tests present as ill-formed comes first.
        let long = format!("app.key:{}", "x".repeat(257));
        for bad in [
            "",
            "this.is:wrong",
            "app.key",
            "app:secret",
            "app.key:",
            ".key:x",
            "a pp.key:x",
            &long,
        ] {
            assert_eq!(code(bad), refused, "{bad}");
        }
    }

    #[test]
    fn secrets_are_never_shown() {
        let credential = Credential::parse("app.key:hidden").unwrap();
        assert!(!format!("{credential:?}").contains("hidden"));
        let error = keyring().prove(&credential).unwrap_err();
        assert!(!format!("{error:?} {error}").contains("hidden"));
        let ring = keyring();
        assert!(!format!("{ring:?}").contains("s:e.cret"));
    }
}
