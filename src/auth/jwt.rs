//! JSON Web Tokens as far as Firth speaks them: HS256 under a key's secret, compact form (RFC 7519, RFC 7515).
//!
//! Own code on `ring`'s HMAC, because every library at hand would cost more than it saves: `jsonwebtoken` signs through a
//! process-wide provider of which both ready-made ones are a second crypto library, its older versions read the clock
//! themselves, and all of them answer a failure in their own terms where clients need one of five codes.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use serde::{Deserialize, Serialize};

use crate::types::{ErrorCode, ErrorInfo};

const HS256: &str = "HS256";

/// What is said of the token itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Header {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) typ: Option<String>,
    pub(super) alg: String,
    /// `app.key` of the key that signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) kid: Option<String>,
    /// Extensions that must be understood; none is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    crit: Option<serde_json::Value>,
}

/// What the token says. Times are seconds since 1970, with fractions.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Claims {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) iat: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) nbf: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) exp: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) jti: Option<String>,
    #[serde(
        default,
        rename = "x-ably-capability",
        skip_serializing_if = "Option::is_none"
    )]
    pub(super) capability: Option<String>,
    #[serde(
        default,
        rename = "x-ably-clientId",
        skip_serializing_if = "Option::is_none"
    )]
    pub(super) client_id: Option<String>,
    #[serde(
        default,
        rename = "x-ably-revocation-key",
        skip_serializing_if = "Option::is_none"
    )]
    pub(super) revocation_key: Option<String>,
    /// Another token, which counts instead.
    #[serde(
        default,
        rename = "x-ably-token",
        skip_serializing_if = "Option::is_none"
    )]
    pub(super) token: Option<String>,
}

/// A token taken apart, not yet believed.
pub(super) struct Jwt<'a> {
    pub(super) header: Header,
    pub(super) claims: Claims,
    signed: &'a str,
    signature: Vec<u8>,
}

impl<'a> Jwt<'a> {
    /// Takes a token apart.
    ///
    /// # Errors
    /// `TokenUnrecognized` for a text that is no JWT at all, `InvalidJwt` for one that is not as it should be. Neither
    /// repeats any of it.
    pub(super) fn parse(text: &'a str) -> Result<Self, ErrorInfo> {
        let (signed, signature) = text.rsplit_once('.').ok_or_else(unrecognized)?;
        let (header, claims) = signed.split_once('.').ok_or_else(unrecognized)?;
        let header = decode(header).ok_or_else(unrecognized)?;
        let header: Header = serde_json::from_slice(&header).map_err(|_| unrecognized())?;
        if claims.contains('.') {
            return Err(invalid("encrypted JWTs are not supported"));
        }
        let claims = decode(claims).and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let claims = claims.ok_or_else(|| invalid("the JWT's claims cannot be read"))?;
        let signature = URL_SAFE_NO_PAD.decode(signature).ok();
        let signature = signature.ok_or_else(|| invalid("the JWT's signature is not base64url"))?;
        Ok(Self {
            header,
            claims,
            signed,
            signature,
        })
    }

    /// Believes it if this key signed it. Compares in constant time.
    ///
    /// # Errors
    /// `InvalidJwt` when it is not signed with HS256 under this key.
    pub(super) fn verify(self, key: &hmac::Key) -> Result<Claims, ErrorInfo> {
        if self.header.alg != HS256 {
            return Err(invalid("the JWT is not signed with HS256"));
        }
        if self.header.crit.is_some() {
            return Err(invalid("the JWT has extensions that are not supported"));
        }
        hmac::verify(key, self.signed.as_bytes(), &self.signature)
            .map_err(|_| invalid("the JWT's signature does not verify"))?;
        Ok(self.claims)
    }
}

/// The token that says this, signed with this key.
pub(super) fn sign(key_name: &str, key: &hmac::Key, claims: &Claims) -> String {
    let header = Header {
        typ: Some("JWT".to_owned()),
        alg: HS256.to_owned(),
        kid: Some(key_name.to_owned()),
        crit: None,
    };
    let header = serde_json::to_vec(&header).expect("a header is JSON");
    let claims = serde_json::to_vec(claims).expect("claims are JSON");
    let mut text = URL_SAFE_NO_PAD.encode(header);
    text.push('.');
    URL_SAFE_NO_PAD.encode_string(claims, &mut text);
    let signature = hmac::sign(key, text.as_bytes());
    text.push('.');
    URL_SAFE_NO_PAD.encode_string(signature, &mut text);
    text
}

/// Milliseconds of a time in seconds; `None` for what is no time between 1970 and the year 9999.
pub(super) fn to_ms(seconds: f64) -> Option<u64> {
    const YEAR_10000: f64 = 253_402_300_800.0;
    if !(0.0..YEAR_10000).contains(&seconds) {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 2^48, and fractions of a millisecond are not meant"
    )]
    Some((seconds * 1000.0).round() as u64)
}

/// Seconds of a time in milliseconds. Exact to the millisecond: fewer than 53 bits.
#[expect(clippy::cast_precision_loss, reason = "times have 48 bits")]
pub(super) fn to_seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

/// The bytes of an object's JSON, at least by its beginning: `serde` would read an array as well.
fn decode(part: &str) -> Option<Vec<u8>> {
    let bytes = URL_SAFE_NO_PAD.decode(part).ok()?;
    bytes.starts_with(b"{").then_some(bytes)
}

fn unrecognized() -> ErrorInfo {
    ErrorInfo::new(ErrorCode::TokenUnrecognized, "token is not a JWT")
}

pub(super) fn invalid(what: &str) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::InvalidJwt, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, b"secret")
    }

    // b64() { basenc --base64url -w0 | tr -d =; }
    // S="$(printf '{"typ":"JWT","alg":"HS256","kid":"app.key"}' | b64).$(printf '{"iat":1.5,"exp":3601}' | b64)"
    // echo "$S.$(printf %s "$S" | openssl dgst -sha256 -hmac secret -binary | b64)"
    const KNOWN: &str = "eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiIsImtpZCI6ImFwcC5rZXkifQ.eyJpYXQiOjEuNSwiZXhwIjozNjAxfQ.052oGDzrRp2NTwo85VrDdBP6z43vsrhANOt8VyzKyiw";

    #[test]
    fn the_form_is_everybodys() {
        let claims = Claims {
            iat: Some(1.5),
            exp: Some(3601.0),
            ..Claims::default()
        };
        let ours = sign("app.key", &key(), &claims);
        let (ours, known) = (Jwt::parse(&ours).unwrap(), Jwt::parse(KNOWN).unwrap());
        for jwt in [ours, known] {
            assert_eq!(jwt.header.kid.as_deref(), Some("app.key"));
            let claims = jwt.verify(&key()).unwrap();
            assert_eq!((claims.iat, claims.exp), (Some(1.5), Some(3601.0)));
        }
    }

    #[test]
    fn only_hs256_under_the_key_is_believed() {
        let with = |header: &str| {
            let text = format!("{}.e30", URL_SAFE_NO_PAD.encode(header));
            let signature = hmac::sign(&key(), text.as_bytes());
            let text = format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature));
            Jwt::parse(&text)
                .unwrap()
                .verify(&key())
                .err()
                .map(|err| err.code)
        };
        assert_eq!(with(r#"{"alg":"HS256"}"#), None);
        for header in [
            r#"{"alg":"none"}"#,
            r#"{"alg":"hs256"}"#,
            r#"{"alg":"HS512"}"#,
            r#"{"alg":"RS256"}"#,
            r#"{"alg":"HS256","crit":["b64"]}"#,
        ] {
            assert_eq!(with(header), Some(ErrorCode::InvalidJwt), "{header}");
        }
        let other = hmac::Key::new(hmac::HMAC_SHA256, b"other");
        assert!(Jwt::parse(KNOWN).unwrap().verify(&other).is_err());
    }

    #[test]
    fn what_is_no_jwt_is_told_from_a_bad_one() {
        let code = |text: &str| Jwt::parse(text).err().map(|err| err.code.code());
        for (text, expected) in [
            ("", 40143),
            ("opaque", 40143),
            ("app.opaque", 40143),
            ("a.b.c", 40143),
            ("e30.e30.", 40143),
            ("eyJhbGciOiJIUzI1NiJ9.e30.!", 40144),
            ("eyJhbGciOiJIUzI1NiJ9.!.AA", 40144),
            ("eyJhbGciOiJIUzI1NiJ9.W10.AA", 40144),
            ("eyJhbGciOiJkaXIifQ..iv.text.tag", 40144),
        ] {
            assert_eq!(code(text), Some(expected), "{text}");
        }
    }

    #[test]
    fn times_keep_their_milliseconds() {
        for ms in [0, 1, 999, 1_795_309_503_139, 253_402_300_799_999] {
            assert_eq!(to_ms(to_seconds(ms)), Some(ms));
            let text = serde_json::to_string(&to_seconds(ms)).unwrap();
            assert_eq!(
                to_ms(serde_json::from_str(&text).unwrap()),
                Some(ms),
                "{text}"
            );
        }
        for bad in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
            assert_eq!(to_ms(bad), None);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*") {
            let _ = Jwt::parse(&text).and_then(|jwt| jwt.verify(&key()));
        }

        #[test]
        fn any_parts_are_read_or_refused(parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..6)) {
            let parts: Vec<String> = parts.iter().map(|part| URL_SAFE_NO_PAD.encode(part)).collect();
            let _ = Jwt::parse(&parts.join(".")).and_then(|jwt| jwt.verify(&key()));
        }

        #[test]
        fn a_changed_token_is_not_believed(at in any::<prop::sample::Index>(), to in "[A-Za-z0-9._-]") {
            let at = at.index(KNOWN.len());
            let changed = format!("{}{to}{}", &KNOWN[..at], &KNOWN[at + 1..]);
            let believed = Jwt::parse(&changed).and_then(|jwt| jwt.verify(&key()));
            prop_assert!(changed == KNOWN || believed.is_err());
        }
    }
}
