//! API keys: `app.key:secret`, as clients present them and as the registry holds them (§3.7.1).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
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
    fn equals(&self, other: &Self) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"firth secret comparison");
        let tag = hmac::sign(&key, self.0.as_bytes());
        hmac::verify(&key, other.0.as_bytes(), tag.as_ref()).is_ok()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
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
        let (app, key_id) = name.split_once('.').ok_or_else(malformed)?;
        let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        let is_key_id = KEY_ID_BYTES.contains(&key_id.len()) && key_id.bytes().all(legal);
        if !is_key_id || secret.is_empty() || secret.len() > SECRET_BYTES_MAX {
            return Err(malformed());
        }
        Ok(Self {
            app: app.parse().map_err(|_| malformed())?,
            key_id: key_id.to_owned(),
            secret: Secret::new(secret),
        })
    }

    /// From the value of an `Authorization` header.
    ///
    /// # Errors
    /// `InvalidCredentials` when it is not `Basic` with base64 of a key. Tokens (`Bearer`) are refused in so many
    /// words, with a code that does not send client libraries for another token.
    pub fn from_header(value: &str) -> Result<Self, ErrorInfo> {
        let (scheme, rest) = value.trim().split_once(' ').unwrap_or((value, ""));
        if scheme.eq_ignore_ascii_case("bearer") {
            return Err(tokens_unsupported());
        }
        if !scheme.eq_ignore_ascii_case("basic") {
            return Err(refused("Authorization header is not `Basic`"));
        }
        let key = STANDARD.decode(rest.trim()).ok();
        let key = key.and_then(|bytes| String::from_utf8(bytes).ok());
        Self::parse(&key.ok_or_else(|| refused("Authorization header is not base64 of a key"))?)
    }

    /// From whatever a request brought: its header, or `key`, or a token in its query.
    ///
    /// # Errors
    /// `InvalidCredentials` when there is none, or the first of these is not a key.
    pub fn from_request(
        header: Option<&str>,
        key: Option<&str>,
        token: Option<&str>,
    ) -> Result<Self, ErrorInfo> {
        match (header, key, token) {
            (Some(header), _, _) => Self::from_header(header),
            (None, Some(key), _) => Self::parse(key),
            (None, None, Some(_)) => Err(tokens_unsupported()),
            (None, None, None) => Err(refused("no credential was given")),
        }
    }
}

/// A key as the registry knows it.
#[derive(Clone, Debug)]
pub struct Key {
    pub app: AppId,
    pub id: String,
    pub secret: Secret,
    pub capability: Arc<Capability>,
}

/// Every app of the cluster with its keys.
#[derive(Clone, Debug, Default)]
pub struct Keyring(BTreeMap<AppId, BTreeMap<String, Key>>);

impl Keyring {
    /// An app is known from here on, with or without keys.
    pub fn add_app(&mut self, app: AppId) {
        self.0.entry(app).or_default();
    }

    /// Adds the key, or replaces the one with its id.
    pub fn add_key(&mut self, key: Key) {
        self.0
            .entry(key.app.clone())
            .or_default()
            .insert(key.id.clone(), key);
    }

    /// The key that the credential proves.
    ///
    /// # Errors
    /// `NotFound` for an app that does not exist; `InvalidCredentials` alike for an unknown key and a
    /// wrong secret, so that nobody learns which keys exist.
    pub fn authenticate(&self, credential: &Credential) -> Result<&Key, ErrorInfo> {
        let keys = self.0.get(&credential.app).ok_or_else(|| {
            ErrorInfo::new(ErrorCode::NotFound, format!("no app `{}`", credential.app))
        })?;
        let wrong = || refused("no such key, or its secret is another");
        let key = keys.get(&credential.key_id).ok_or_else(wrong)?;
        key.secret
            .equals(&credential.secret)
            .then_some(key)
            .ok_or_else(wrong)
    }
}

impl FromIterator<Key> for Keyring {
    fn from_iter<I: IntoIterator<Item = Key>>(keys: I) -> Self {
        let mut ring = Self::default();
        keys.into_iter().for_each(|key| ring.add_key(key));
        ring
    }
}

fn refused(what: &str) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::InvalidCredentials, what)
}

fn tokens_unsupported() -> ErrorInfo {
    refused("tokens are not supported by this server yet; use a key")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyring() -> Keyring {
        let key = |app: &str, secret: &str| Key {
            app: app.parse().unwrap(),
            id: "key".into(),
            secret: Secret::new(secret),
            capability: Arc::new(Capability::everything()),
        };
        let mut ring: Keyring = [key("app", "s:e.cret"), key("other", "x")]
            .into_iter()
            .collect();
        ring.add_app("bare".parse().unwrap());
        ring
    }

    fn code(text: &str) -> Result<AppId, ErrorCode> {
        let credential = Credential::parse(text).map_err(|e| e.code)?;
        let ring = keyring();
        ring.authenticate(&credential)
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
    fn headers_carry_keys_and_no_tokens_yet() {
        let parsed = Credential::from_header("Basic YXBwLmtleTpzZWNyZXQ=").unwrap();
        assert_eq!(
            (parsed.app.as_str(), &*parsed.key_id, parsed.secret.expose()),
            ("app", "key", "secret")
        );
        assert!(Credential::from_header("basic  YXBwLmtleTpzZWNyZXQ= ").is_ok());
        for bad in [
            "",
            "Basic",
            "Basic !",
            "Basic /w==",
            "Digest x",
            "Bearer x",
            "bearer",
        ] {
            assert_eq!(
                Credential::from_header(bad).unwrap_err().code,
                ErrorCode::InvalidCredentials,
                "{bad}"
            );
        }
        let token = Credential::from_request(None, None, Some("t")).unwrap_err();
        assert_eq!(
            (token.code.code(), token.message.contains("tokens")),
            (40101, true)
        );
        assert!(Credential::from_request(None, None, None).is_err());
        assert!(Credential::from_request(None, Some("app.key:s"), Some("t")).is_ok());
        assert!(Credential::from_request(Some("Bearer t"), Some("app.key:s"), None).is_err());
    }

    #[test]
    fn secrets_are_never_shown() {
        let credential = Credential::parse("app.key:hidden").unwrap();
        assert!(!format!("{credential:?}").contains("hidden"));
        let error = keyring().authenticate(&credential).unwrap_err();
        assert!(!format!("{error:?}").contains("hidden"));
    }
}
