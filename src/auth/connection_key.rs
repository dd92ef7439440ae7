//! Connection keys: the secret with which a client resumes its connection on any node.
//!
//! `<connectionId>!<salt>.<base64url of a MAC>`, and `!<base64url of the client id>` after it when the connection is one
//! client and no other: whoever publishes on behalf of the connection is that client, on any node. The MAC is under a
//! secret of the cluster, over all parts and the app: a node that never heard of the connection can tell that this
//! cluster minted the key, without any table. By the salt a client that recovers a connection gets another key than the
//! one it came with. Rejected: random keys, which every node would have to learn before a client can come back to it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;

use crate::auth::ClientId;
use crate::types::{AppId, ErrorCode, ErrorInfo};

/// First byte under the MAC: what the rest is. Another form gets another number.
const VERSION: u8 = 2;
const VERSION_OF_CLIENT: u8 = 3;

/// Longest connection id in bytes.
const CONNECTION_ID_BYTES_MAX: usize = 64;

/// Longest salt in bytes.
const SALT_BYTES_MAX: usize = 40;

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

/// Whose key it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub connection_id: String,
    /// The one client that the connection was when the key was minted; `None` when it was none or could be any.
    pub client_id: Option<String>,
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
    /// `salt` is 1 to 40 characters that a connection id may have too.
    #[must_use]
    pub fn mint(&self, app: &AppId, connection_id: &str, salt: &str, client: &ClientId) -> String {
        debug_assert!(is_connection_id(connection_id), "{connection_id}");
        debug_assert!(is_salt(salt), "{salt}");
        let client_id = match client {
            ClientId::Exactly(client_id) => Some(client_id.as_str()),
            ClientId::Any | ClientId::Anonymous => None,
        };
        let signed = signed_bytes(app, connection_id, salt, client_id);
        let tag = URL_SAFE_NO_PAD.encode(hmac::sign(&self.0, &signed));
        match client_id {
            None => format!("{connection_id}!{salt}.{tag}"),
            Some(client_id) => {
                let client_id = URL_SAFE_NO_PAD.encode(client_id);
                format!("{connection_id}!{salt}.{tag}!{client_id}")
            }
        }
    }

    /// The id of the connection that the key resumes. Compares in constant time.
    ///
    /// # Errors
    /// When the key was not minted for this app under this secret.
    pub fn verify(&self, app: &AppId, key: &str) -> Result<String, InvalidConnectionKey> {
        Ok(self.holder(app, key)?.connection_id)
    }

    /// Whose key it is. Compares in constant time.
    ///
    /// # Errors
    /// When the key was not minted for this app under this secret.
    pub fn holder(&self, app: &AppId, key: &str) -> Result<Holder, InvalidConnectionKey> {
        let (id, rest) = key.split_once('!').ok_or(InvalidConnectionKey)?;
        let (salt, rest) = rest.split_once('.').ok_or(InvalidConnectionKey)?;
        if !is_connection_id(id) || !is_salt(salt) {
            return Err(InvalidConnectionKey);
        }
        let (tag, client_id) = match rest.split_once('!') {
            None => (rest, None),
            Some((tag, client_id)) => (tag, Some(decode(client_id)?)),
        };
        let client_id = client_id.map(String::from_utf8).transpose();
        let client_id = client_id.map_err(|_| InvalidConnectionKey)?;
        let signed = signed_bytes(app, id, salt, client_id.as_deref());
        hmac::verify(&self.0, &signed, &decode(tag)?).map_err(|_| InvalidConnectionKey)?;
        Ok(Holder {
            connection_id: id.to_owned(),
            client_id,
        })
    }
}

fn is_salt(text: &str) -> bool {
    text.len() <= SALT_BYTES_MAX && is_connection_id(text)
}

fn decode(text: &str) -> Result<Vec<u8>, InvalidConnectionKey> {
    (URL_SAFE_NO_PAD.decode(text)).map_err(|_| InvalidConnectionKey)
}

/// Zero bytes, which none but the last part can hold, keep the parts apart.
fn signed_bytes(app: &AppId, connection_id: &str, salt: &str, client_id: Option<&str>) -> Vec<u8> {
    let (app, id, salt) = (
        app.as_str().as_bytes(),
        connection_id.as_bytes(),
        salt.as_bytes(),
    );
    let Some(client_id) = client_id else {
        return [&[VERSION], app, &[0], id, &[0], salt].concat();
    };
    let client_id = client_id.as_bytes();
    [
        &[VERSION_OF_CLIENT],
        app,
        &[0],
        id,
        &[0],
        salt,
        &[0],
        client_id,
    ]
    .concat()
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
        let key = keys.mint(&app("app"), "conn-1_A", "salt", &ClientId::Any);
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

    #[test]
    fn a_key_says_which_client_its_connection_is() {
        let keys = ConnectionKeys::new(&[7; 32]);
        let exactly = |id: &str| ClientId::Exactly(id.to_owned());
        let key = keys.mint(&app("app"), "conn1", "salt", &exactly("grüß!"));
        let holder = keys.holder(&app("app"), &key).unwrap();
        assert_eq!(holder.connection_id, "conn1");
        assert_eq!(holder.client_id.as_deref(), Some("grüß!"));
        assert_eq!(keys.verify(&app("app"), &key).as_deref(), Ok("conn1"));
        for nobody in [ClientId::Any, ClientId::Anonymous] {
            let key = keys.mint(&app("app"), "conn1", "salt", &nobody);
            assert_eq!(keys.holder(&app("app"), &key).unwrap().client_id, None);
        }
        // Neither another client's name nor none can be put under the same MAC.
        let (rest, _) = key.rsplit_once('!').unwrap();
        let other = keys.mint(&app("app"), "conn1", "salt", &exactly("bob"));
        let (_, bob) = other.rsplit_once('!').unwrap();
        for forged in [
            rest.to_owned(),
            format!("{rest}!{bob}"),
            format!("{key}A"),
            format!("{rest}!"),
        ] {
            assert!(keys.holder(&app("app"), &forged).is_err(), "{forged}");
        }
    }

    /// Clients hold keys across upgrades, and nodes of two builds must agree on them.
    #[test]
    fn the_form_is_frozen() {
        let keys = ConnectionKeys::new(b"secret");
        let key = keys.mint(&app("app"), "conn1", "sAlt_-12", &ClientId::Any);
        assert_eq!(key, FROZEN);
        let bob = ClientId::Exactly("bob".into());
        let key = keys.mint(&app("app"), "conn1", "sAlt_-12", &bob);
        assert_eq!(key, FROZEN_OF_CLIENT);
    }

    // printf '\x02app\x00conn1\x00sAlt_-12' | openssl dgst -sha256 -hmac secret -binary | basenc --base64url
    const FROZEN: &str = "conn1!sAlt_-12.joPOMRSLP-TX2jqqwf-f-Jfk2fg1ce9uGz0UCkNxbqY";
    // printf '\x03app\x00conn1\x00sAlt_-12\x00bob' | openssl, as above
    const FROZEN_OF_CLIENT: &str =
        "conn1!sAlt_-12.TkCTFUYjfc0jRUDGnd2iqM4nNCaq02321P-CccL10pU!Ym9i";

    proptest! {
        #[test]
        fn any_text_is_refused(text in "\\PC*") {
            prop_assert!(ConnectionKeys::new(&[7; 32]).verify(&app("app"), &text).is_err());
        }

        #[test]
        fn a_changed_key_is_refused(at in any::<prop::sample::Index>(), to in "[A-Za-z0-9!._-]") {
            let keys = ConnectionKeys::new(&[7; 32]);
            let client = ClientId::Exactly("bob".into());
            let key = keys.mint(&app("app"), "conn1", "salt", &client);
            let at = at.index(key.len());
            let changed = format!("{}{to}{}", &key[..at], &key[at + 1..]);
            prop_assert!(changed == key || keys.verify(&app("app"), &changed).is_err());
        }
    }
}
