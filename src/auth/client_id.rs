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
    /// It has no name and may take none.
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

    /// For a client that proved a token with this client id, by the table of §2.4.2.
    ///
    /// # Errors
    /// `IncompatibleCredentials` when it wants to be somebody whom its token does not let it be; `InvalidClientId` when
    /// an id is too long.
    pub fn of_token(token: Option<&str>, wanted: Option<&str>) -> Result<Self, ErrorInfo> {
        let token = token.filter(|id| !id.is_empty());
        let wanted = wanted.filter(|id| !id.is_empty());
        match (token, wanted) {
            (Some("*"), wanted) => Self::of_key(wanted),
            (None, None) => Ok(Self::Anonymous),
            (Some(id), wanted) if wanted.is_none_or(|wanted| wanted == id) => {
                checked(id).map(|id| Self::Exactly(id.to_owned()))
            }
            (None, Some(_)) => Err(mismatch("the token has no client id, so none can be taken")),
            (Some(_), _) => Err(mismatch("the token is for another client id")),
        }
    }

    /// Who a connection is after it brought another credential. One that was identified stays who it is.
    ///
    /// # Errors
    /// `IncompatibleCredentials` when the other credential is for another client, or for nobody.
    pub fn renewed_by(&self, next: Self) -> Result<Self, ErrorInfo> {
        match (self, next) {
            (Self::Exactly(own), Self::Exactly(other)) if *own != other => {
                Err(mismatch("the connection belongs to another client id"))
            }
            (Self::Exactly(_), Self::Anonymous) => Err(mismatch(
                "the connection has a client id and the token has none",
            )),
            (Self::Exactly(own), _) => Ok(Self::Exactly(own.clone())),
            (Self::Any | Self::Anonymous, next) => Ok(next),
        }
    }

    /// The client id in the value of an `X-Ably-ClientId` header: base64 of it.
    ///
    /// # Errors
    /// `InvalidClientId` when the value is not base64 of UTF-8.
    pub fn in_header(value: &str) -> Result<String, ErrorInfo> {
        let bytes = STANDARD.decode(value.trim()).ok();
        let id = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
        id.ok_or_else(|| invalid("X-Ably-ClientId is not base64 of a client id"))
    }

    /// What CONNECTED tells the client it is: `*` for any, nothing when it is anonymous.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Any => Some("*"),
            Self::Exactly(id) => Some(id),
            Self::Anonymous => None,
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

/// # Errors
/// `InvalidClientId` when the id is too long.
pub(super) fn checked(id: &str) -> Result<&str, ErrorInfo> {
    if id.len() > CLIENT_ID_BYTES_MAX {
        return Err(invalid(&format!(
            "client id is longer than {CLIENT_ID_BYTES_MAX} bytes"
        )));
    }
    Ok(id)
}

fn mismatch(what: &str) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::IncompatibleCredentials, what)
}

fn invalid(what: &str) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::InvalidClientId, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> ClientId {
        ClientId::Exactly("me".into())
    }

    #[test]
    fn a_key_may_be_any_client() {
        assert_eq!(ClientId::of_key(None).unwrap().as_str(), Some("*"));
        assert_eq!(ClientId::of_key(Some("*")).unwrap(), ClientId::Any);
        assert_eq!(ClientId::of_key(Some("me")).unwrap(), me());
        assert_eq!(ClientId::in_header("bWU=").unwrap(), "me");
        for bad in ["b", "/w=="] {
            let error = ClientId::in_header(bad).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidClientId, "{bad}");
        }
        assert!(ClientId::of_key(Some(&"x".repeat(257))).is_err());
    }

    #[test]
    fn a_token_says_which_client_it_is_for() {
        let wrong = ErrorCode::IncompatibleCredentials;
        let table = [
            (None, None, Ok(ClientId::Anonymous)),
            (Some(""), Some(""), Ok(ClientId::Anonymous)),
            (None, Some("me"), Err(wrong)),
            (None, Some("*"), Err(wrong)),
            (Some("me"), None, Ok(me())),
            (Some("me"), Some("me"), Ok(me())),
            (Some("me"), Some("you"), Err(wrong)),
            (Some("me"), Some("*"), Err(wrong)),
            (Some("*"), None, Ok(ClientId::Any)),
            (Some("*"), Some("*"), Ok(ClientId::Any)),
            (Some("*"), Some("me"), Ok(me())),
        ];
        for (token, wanted, expected) in table {
            let found = ClientId::of_token(token, wanted).map_err(|err| err.code);
            assert_eq!(found, expected, "{token:?} {wanted:?}");
        }
        assert!(ClientId::of_token(Some(&"x".repeat(257)), None).is_err());
    }

    #[test]
    fn a_client_stays_who_it_is_when_it_brings_another_token() {
        let (any, nobody) = (ClientId::Any, ClientId::Anonymous);
        let you = ClientId::Exactly("you".into());
        assert_eq!(me().renewed_by(me()), Ok(me()));
        assert_eq!(me().renewed_by(any.clone()), Ok(me()));
        assert_eq!(any.renewed_by(me()), Ok(me()));
        assert_eq!(nobody.renewed_by(me()), Ok(me()));
        for next in [you, nobody] {
            let error = me().renewed_by(next).unwrap_err();
            assert_eq!(error.code, ErrorCode::IncompatibleCredentials);
        }
    }

    #[test]
    fn messages_speak_in_a_name_the_client_may_have() {
        let (any, me, nobody) = (ClientId::Any, me(), ClientId::Anonymous);
        let id = |id: &str| Ok(Some(id.to_owned()));
        assert_eq!(any.assign(None), Ok(None));
        assert_eq!(any.assign(Some("you")), id("you"));
        assert_eq!(me.assign(None), id("me"));
        assert_eq!(me.assign(Some("me")), id("me"));
        assert_eq!(nobody.assign(None), Ok(None));
        for (client, asked) in [
            (&me, "you"),
            (&me, "*"),
            (&any, "*"),
            (&any, ""),
            (&nobody, "me"),
            (&nobody, "*"),
        ] {
            assert_eq!(
                client.assign(Some(asked)).unwrap_err().code,
                ErrorCode::InvalidClientId
            );
        }
        assert!(any.assign(Some(&"x".repeat(257))).is_err());
    }
}
