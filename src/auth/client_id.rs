//! Which client a connection or request is, and in whose name it may publish (§2.4.2).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::types::{ErrorCode, ErrorInfo};

/// Longest client id in bytes.
const CLIENT_ID_BYTES_MAX: usize = 256;

/// The name a client proved or chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientId {
    /// It may take any name, message by message; without one it is nobody.
    Any,
    /// It is this client and no other.
    Exactly(String),
    /// It is nobody and can take no name.
    Anonymous,
}

impl ClientId {
    /// For a client that proved a key: it is whoever it says.
    ///
    /// # Errors
    /// When the wanted id is too long.
    pub fn of_key(wanted: Option<&str>) -> Result<Self, ErrorInfo> {
        match wanted {
            None | Some("" | "*") => Ok(Self::Any),
            Some(id) => checked(id).map(|id| Self::Exactly(id.to_owned())),
        }
    }

    /// From the value of an `X-Ably-ClientId` header: base64 of the id.
    ///
    /// # Errors
    /// When the value is not base64 of UTF-8, or the id is too long.
    pub fn of_key_and_header(value: Option<&str>) -> Result<Self, ErrorInfo> {
        let Some(value) = value else {
            return Self::of_key(None);
        };
        let bytes = STANDARD.decode(value.trim()).ok();
        let id = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
        let id = id.ok_or_else(|| invalid("X-Ably-ClientId is not base64 of a client id"))?;
        Self::of_key(Some(&id))
    }

    /// What CONNECTED tells the client it is.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Any => "*",
            Self::Exactly(id) => id,
            Self::Anonymous => "",
        }
    }

    /// The client id that a message of this client gets, given the one it asks for.
    ///
    /// # Errors
    /// When it asks for a name that is not its own, or for one that nobody can have.
    pub fn assign(&self, asked: Option<&str>) -> Result<Option<String>, ErrorInfo> {
        match (self, asked) {
            (_, Some("*")) => Err(invalid("`*` is not a client id that a message can have")),
            (_, Some("")) => Err(invalid("client id is empty")),
            (Self::Any, asked) => asked.map(|id| checked(id).map(str::to_owned)).transpose(),
            (Self::Exactly(own), None) => Ok(Some(own.clone())),
            (Self::Exactly(own), Some(id)) if own == id => Ok(Some(own.clone())),
            (Self::Anonymous, None) => Ok(None),
            (Self::Anonymous, Some(_)) => Err(invalid("an anonymous client can take no client id")),
            (Self::Exactly(_), Some(_)) => {
                Err(invalid("message has another client id than its connection"))
            }
        }
    }
}

fn checked(id: &str) -> Result<&str, ErrorInfo> {
    if id.len() > CLIENT_ID_BYTES_MAX {
        return Err(invalid(&format!(
            "client id is longer than {CLIENT_ID_BYTES_MAX} bytes"
        )));
    }
    Ok(id)
}

fn invalid(what: &str) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::InvalidClientId, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_be_any_client() {
        assert_eq!(ClientId::of_key(None).unwrap().as_str(), "*");
        assert_eq!(ClientId::of_key(Some("*")).unwrap(), ClientId::Any);
        assert_eq!(ClientId::of_key(Some("me")).unwrap().as_str(), "me");
        assert_eq!(
            ClientId::of_key_and_header(Some("bWU=")).unwrap().as_str(),
            "me"
        );
        assert_eq!(ClientId::of_key_and_header(None).unwrap(), ClientId::Any);
        for bad in ["b", "/w==", &STANDARD.encode("x".repeat(257))] {
            let error = ClientId::of_key_and_header(Some(bad)).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidClientId, "{bad}");
        }
    }

    #[test]
    fn messages_speak_in_a_name_the_client_may_have() {
        let (any, me) = (ClientId::Any, ClientId::Exactly("me".into()));
        let id = |id: &str| Ok(Some(id.to_owned()));
        assert_eq!(any.assign(None), Ok(None));
        assert_eq!(any.assign(Some("you")), id("you"));
        assert_eq!(me.assign(None), id("me"));
        assert_eq!(me.assign(Some("me")), id("me"));
        for (client, asked) in [(&me, "you"), (&me, "*"), (&any, "*"), (&any, "")] {
            assert_eq!(
                client.assign(Some(asked)).unwrap_err().code,
                ErrorCode::InvalidClientId
            );
        }
        assert!(any.assign(Some(&"x".repeat(257))).is_err());
    }
}
