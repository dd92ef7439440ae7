//! Connection keys: the secret with which a client resumes its connection on any node.
//!
//! `<connectionId>!<salt>.<base64url of a MAC>`. The MAC is under a secret of the cluster, over the app, the connection id and
//! the salt, by which a client that recovers a connection gets another key than the one it came with:
//! a node that never heard of the connection can tell that this cluster minted the key, without any table.
//! Rejected: random keys, which every node would have to learn before a client can come back to it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;

use crate::types::{AppId, ErrorCode, ErrorInfo};

/// First byte under the MAC: what the rest is. Another form gets another number.
const VERSION: u8 = 2;

/// Without a salt.
const VERSION_UNSALTED: u8 = 1;

/// Longest salt in bytes.
const SALT_BYTES_MAX: usize = 32;

/// Longest connection id in bytes.
const CONNECTION_ID_BYTES_MAX: usize = 64;

/// A text that is not a connection key of this cluster and app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a connection key of this cluster")]
pub struct InvalidConnectionKey;

impl From<InvalidConnectionKey> for ErrorInfo {
    fn from(error: InvalidConnectionKey) -> Self {
        Self::new(ErrorCode::ResumeImpossible, error.to_string())
    }
}

/// Whether a text can be a connection id: 1 to 64 ASCII letters, digits, `-` or `_`, so that it stays
/// one part of `connectionId:msgSerial` and of a connection key.
#[must_use]
pub fn is_connection_id(text: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    (1..=CONNECTION_ID_BYTES_MAX).contains(&text.len()) && text.bytes().all(legal)
}

/// Mints and verifies connection keys.
#[derive(Clone, Debug)]
pub struct ConnectionKeys(hmac::Key);

impl ConnectionKeys {
    /// `secret` is the cluster's, the same on every node; at least 32 random bytes.
    #[must_use]
    pub fn new(secret: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    /// A key with which this connection is resumed. The same arguments give the same key; all keys of a connection are good.
    /// `salt` is 1 to 32 characters that a connection id may have too.
    #[must_use]
    pub fn mint(&self, app: &AppId, connection_id: &str, salt: &str) -> String {
        debug_assert!(is_connection_id(connection_id), "{connection_id}");
        debug_assert!(is_salt(salt), "{salt}");
        let tag = hmac::sign(&self.0, &signed_bytes(app, connection_id, Some(salt)));
        format!("{connection_id}!{salt}.{}", URL_SAFE_NO_PAD.encode(tag))
    }

    /// The id of the connection that the key resumes. Compares in constant time.
    ///
    /// # Errors
    /// When the key was not minted for this app under this secret.
    pub fn verify(&self, app: &AppId, key: &str) -> Result<String, InvalidConnectionKey> {
        let (id, rest) = key.split_once('!').ok_or(InvalidConnectionKey)?;
        let (salt, tag) = match rest.split_once('.') {
            Some((salt, tag)) => (Some(salt), tag),
            None => (None, rest),
        };
        if !is_connection_id(id) || salt.is_some_and(|salt| !is_salt(salt)) {
            return Err(InvalidConnectionKey);
        }
        let tag = URL_SAFE_NO_PAD
            .decode(tag)
            .map_err(|_| InvalidConnectionKey)?;
        let signed = signed_bytes(app, id, salt);
        hmac::verify(&self.0, &signed, &tag).map_err(|_| InvalidConnectionKey)?;
        Ok(id.to_owned())
    }
}

fn is_salt(text: &str) -> bool {
    text.len() <= SALT_BYTES_MAX && is_connection_id(text)
}

/// Zero bytes, which no part can hold, keep the parts apart.
fn signed_bytes(app: &AppId, connection_id: &str, salt: Option<&str>) -> Vec<u8> {
    let (app, id) = (app.as_str().as_bytes(), connection_id.as_bytes());
    match salt {
        None => [&[VERSION_UNSALTED], app, &[0], id].concat(),
        Some(salt) => [&[VERSION], app, &[0], id, &[0], salt.as_bytes()].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn app(text: &str) -> AppId {
        text.parse().unwrap()
    }

    #[test]
    fn only_this_clusters_keys_for_this_app_resume() {
        let keys = ConnectionKeys::new(&[7; 32]);
        let key = keys.mint(&app("app"), "conn-1_A", "salt");
        assert_eq!(keys.verify(&app("app"), &key).as_deref(), Ok("conn-1_A"));
        assert!(keys.verify(&app("ap"), &key).is_err());
        assert!(
            ConnectionKeys::new(&[8; 32])
                .verify(&app("app"), &key)
                .is_err()
        );
        let tag = key.split_once('!').unwrap().1;
        for bad in [
            "",
            "!",
            "conn-1_A",
            "conn-1_A!",
            &format!("conn-2!{tag}"),
            &format!("a:b!{tag}"),
            &format!("!{tag}"),
            &key[..key.len() - 2],
            &format!("{key}AA"),
        ] {
            assert_eq!(
                keys.verify(&app("app"), bad),
                Err(InvalidConnectionKey),
                "{bad}"
            );
        }
    }

    /// Clients hold keys across upgrades, and nodes of two builds must agree on them.
    #[test]
    fn the_form_is_frozen() {
        let keys = ConnectionKeys::new(b"secret");
        assert_eq!(keys.mint(&app("app"), "conn1", "sAlt_-12"), FROZEN);
        for key in [FROZEN, FROZEN_UNSALTED] {
            assert_eq!(keys.verify(&app("app"), key).as_deref(), Ok("conn1"));
        }
    }

    // printf '\x02app\x00conn1\x00sAlt_-12' | openssl, as below
    const FROZEN: &str = "conn1!sAlt_-12.joPOMRSLP-TX2jqqwf-f-Jfk2fg1ce9uGz0UCkNxbqY";
    // printf '\x01app\x00conn1' | openssl dgst -sha256 -hmac secret -binary | basenc --base64url
    const FROZEN_UNSALTED: &str = "conn1!ChHuZnnf7dVStPLBUlAQx6TGxUc3EFwkLrz2-HIxx6Y";

    proptest! {
        #[test]
        fn any_text_is_refused(text in "\\PC*") {
            prop_assert!(ConnectionKeys::new(&[7; 32]).verify(&app("app"), &text).is_err());
        }

        #[test]
        fn a_changed_key_is_refused(at in any::<prop::sample::Index>(), to in "[A-Za-z0-9!._-]") {
            let keys = ConnectionKeys::new(&[7; 32]);
            let key = keys.mint(&app("app"), "conn1", "salt");
            let at = at.index(key.len());
            let changed = format!("{}{to}{}", &key[..at], &key[at + 1..]);
            prop_assert!(changed == key || keys.verify(&app("app"), &changed).is_err());
        }
    }
}
