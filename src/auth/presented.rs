//! What a request brings to prove who it is: a key or a token, in a header or in its query (§3.1).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::auth::key::{Credential, Secret, refused};
use crate::types::ErrorInfo;

/// What a client presents, not yet believed.
#[derive(Clone, Debug)]
pub enum Presented {
    Key(Credential),
    Token(Secret),
}

impl Presented {
    /// From whatever a request brought: the value of its `Authorization` header, or else `key` or `accessToken` (also
    /// spelled `access_token`) of its query.
    ///
    /// # Errors
    /// `InvalidCredentials` when there is none, or the first of these has not the form of a credential.
    pub fn from_request(
        header: Option<&str>,
        key: Option<&str>,
        token: Option<&str>,
    ) -> Result<Self, ErrorInfo> {
        match (header, key, token) {
            (Some(header), _, _) => Self::from_header(header),
            (None, Some(key), _) => Credential::parse(key).map(Self::Key),
            (None, None, Some(token)) => Ok(Self::token(token)),
            (None, None, None) => Err(refused("no credential was given")),
        }
    }

    /// A token as it is, such as in an AUTH frame.
    pub fn token(text: impl Into<String>) -> Self {
        Self::Token(Secret::new(text))
    }

    /// `Basic` with base64 of a key, or `Bearer` with a token: client libraries send base64 of it, people a JWT as it is.
    fn from_header(value: &str) -> Result<Self, ErrorInfo> {
        let value = value.trim();
        let (scheme, rest) = value.split_once(' ').unwrap_or((value, ""));
        let rest = rest.trim();
        if scheme.eq_ignore_ascii_case("bearer") {
            if rest.is_empty() {
                return Err(refused("Authorization header has no token"));
            }
            let encoded = if looks_like_jwt(rest) {
                None
            } else {
                decode(rest)
            };
            return Ok(Self::token(encoded.unwrap_or_else(|| rest.to_owned())));
        }
        if !scheme.eq_ignore_ascii_case("basic") {
            return Err(refused(
                "Authorization header is neither `Basic` nor `Bearer`",
            ));
        }
        let key =
            decode(rest).ok_or_else(|| refused("Authorization header is not base64 of a key"))?;
        Credential::parse(&key).map(Self::Key)
    }
}

fn decode(text: &str) -> Option<String> {
    String::from_utf8(STANDARD.decode(text).ok()?).ok()
}

/// Base64 of a JWT never does: it has no `.`.
fn looks_like_jwt(text: &str) -> bool {
    text.starts_with("ey") && text.matches('.').count() >= 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ErrorCode;
    use proptest::prelude::*;

    fn token(presented: Result<Presented, ErrorInfo>) -> String {
        match presented.unwrap() {
            Presented::Token(token) => token.expose().to_owned(),
            Presented::Key(key) => panic!("{key:?}"),
        }
    }

    #[test]
    fn headers_come_before_queries_and_keys_before_tokens() {
        let basic = "Basic YXBwLmtleTpzZWNyZXQ=";
        for header in [basic, "basic  YXBwLmtleTpzZWNyZXQ= "] {
            match Presented::from_request(Some(header), None, Some("t")).unwrap() {
                Presented::Key(key) => assert_eq!(
                    (key.app.as_str(), &*key.key_id, key.secret.expose()),
                    ("app", "key", "secret")
                ),
                Presented::Token(_) => panic!("a key was given"),
            }
        }
        let both = Presented::from_request(None, Some("app.key:s"), Some("t")).unwrap();
        assert!(matches!(both, Presented::Key(_)));
        assert_eq!(token(Presented::from_request(None, None, Some("t"))), "t");
        let bearer = Presented::from_request(Some("Bearer dA=="), Some("app.key:s"), None);
        assert_eq!(token(bearer), "t");
    }

    #[test]
    fn a_bearer_token_may_be_encoded_or_not() {
        for (header, expected) in [
            ("Bearer ZXlKLmEuYg==", "eyJ.a.b"),
            ("bearer  eyJ.a.b ", "eyJ.a.b"),
            ("Bearer app.opaque", "app.opaque"),
            ("Bearer eyJ", "eyJ"),
        ] {
            assert_eq!(token(Presented::from_header(header)), expected, "{header}");
        }
    }

    #[test]
    fn what_is_no_credential_is_refused_for_good() {
        for bad in [
            "",
            "Basic",
            "Basic !",
            "Basic /w==",
            "Digest x",
            "Bearer",
            "bearer ",
        ] {
            let error = Presented::from_header(bad).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidCredentials, "{bad}");
        }
        assert!(Presented::from_request(None, None, None).is_err());
    }

    #[test]
    fn neither_keys_nor_tokens_are_shown() {
        for presented in [
            Presented::from_request(None, Some("app.key:hidden"), None),
            Presented::from_request(None, None, Some("hidden")),
        ] {
            assert!(!format!("{:?}", presented.unwrap()).contains("hidden"));
        }
    }

    proptest! {
        #[test]
        fn any_header_is_read_or_refused(scheme in "(Basic |Bearer |)", text in "\\PC*") {
            let header = format!("{scheme}{text}");
            if let Err(error) = Presented::from_header(&header) {
                prop_assert_eq!(error.code, ErrorCode::InvalidCredentials);
            }
        }
    }
}
