//! Requests for tokens, signed by whoever has the key or sent by them, and the tokens that answer them (§3.7.2).

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::hmac;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::auth::authenticate::narrowed;
use crate::auth::jwt::{self, Claims};
use crate::auth::key::refused;
use crate::auth::{
    CLOCK_SKEW_MAX_MS, Key, KeyName, Keyring, Presented, REVOCABLE_TTL_MAX_MS, Secret,
    TTL_DEFAULT_MS, TTL_MAX_MS, client_id,
};
use crate::types::{ErrorCode, ErrorInfo};

/// Longest nonce in bytes.
const NONCE_BYTES_MAX: usize = 256;

/// A request for a token as it arrived. Each field is the text that was signed: numbers in decimal.
#[derive(Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TokenRequest {
    #[serde(deserialize_with = "text")]
    pub key_name: Option<String>,
    /// Milliseconds.
    #[serde(deserialize_with = "text")]
    pub ttl: Option<String>,
    /// JSON.
    #[serde(deserialize_with = "text")]
    pub capability: Option<String>,
    #[serde(deserialize_with = "text")]
    pub client_id: Option<String>,
    /// Milliseconds since 1970.
    #[serde(deserialize_with = "text")]
    pub timestamp: Option<String>,
    #[serde(deserialize_with = "text")]
    pub nonce: Option<String>,
    /// Base64.
    #[serde(deserialize_with = "text")]
    pub mac: Option<String>,
}

/// Who has it can have the token, so its proof is not shown.
impl fmt::Debug for TokenRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenRequest")
            .field("key_name", &self.key_name)
            .field("client_id", &self.client_id)
            .finish_non_exhaustive()
    }
}

/// A text, or what has one: a number, or an object's JSON.
fn text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(match Value::deserialize(from)? {
        Value::Null => None,
        Value::String(text) => Some(text),
        Value::Number(number) => Some(match number.as_f64() {
            // Some encoders write large integers as floating point numbers.
            Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() < 9e15 => {
                format!("{float:.0}")
            }
            _ => number.to_string(),
        }),
        Value::Object(object) => Some(Value::Object(object).to_string()),
        Value::Bool(_) | Value::Array(_) => {
            return Err(D::Error::custom("expected a text or a number"));
        }
    })
}

impl TokenRequest {
    fn signed_text(&self, ttl: &str) -> String {
        let field = |field: &Option<String>| field.clone().unwrap_or_default();
        let fields = [
            field(&self.key_name),
            ttl.to_owned(),
            field(&self.capability),
            field(&self.client_id),
            field(&self.timestamp),
            field(&self.nonce),
        ];
        fields.map(|field| field + "\n").concat()
    }

    fn has_line_breaks(&self) -> bool {
        let fields = [
            &self.key_name,
            &self.ttl,
            &self.client_id,
            &self.timestamp,
            &self.nonce,
        ];
        let mut fields = fields.into_iter().flatten();
        fields.any(|field| field.contains('\n'))
    }

    /// Whether the key signed this. A `ttl` of 0 is sent as that and signed as nothing by some client libraries.
    fn is_signed(&self, mac: &str, key: &hmac::Key) -> bool {
        let Ok(mac) = STANDARD.decode(mac) else {
            return false;
        };
        let ttl = self.ttl.as_deref().unwrap_or_default();
        let forms: &[&str] = if ttl == "0" { &["", "0"] } else { &[ttl] };
        let signed = |ttl: &&str| hmac::verify(key, self.signed_text(ttl).as_bytes(), &mac).is_ok();
        forms.iter().any(signed)
    }

    fn ttl_ms(&self, key: &Key) -> Result<u64, ErrorInfo> {
        let asked = match self.ttl.as_deref() {
            None | Some("") => 0,
            Some(text) => text
                .parse()
                .map_err(|_| parameter("ttl is not a count of milliseconds"))?,
        };
        if asked > TTL_MAX_MS {
            return Err(parameter("ttl is longer than 24 hours"));
        }
        let ttl = if asked == 0 { TTL_DEFAULT_MS } else { asked };
        Ok(if key.revocable_tokens {
            ttl.min(REVOCABLE_TTL_MAX_MS)
        } else {
            ttl
        })
    }

    /// When it was made.
    fn made_at_ms(&self, now_ms: u64) -> Result<u64, ErrorInfo> {
        let at = match self.timestamp.as_deref() {
            None | Some("") if self.mac.is_none() => now_ms,
            None | Some("") => return Err(parameter("timestamp is missing")),
            Some(text) => {
                (text.parse()).map_err(|_| parameter("timestamp is not a count of milliseconds"))?
            }
        };
        if now_ms.abs_diff(at) > CLOCK_SKEW_MAX_MS {
            return Err(ErrorCode::TokenRequestTimestamp.into());
        }
        Ok(at)
    }
}

/// What makes a signed request usable once: whoever answers it must refuse a second one with the same, on any node, with
/// [`ErrorCode::TokenRequestReplayed`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nonce {
    pub key: KeyName,
    pub text: String,
    /// From then on the request's timestamp refuses it.
    pub until_ms: u64,
}

/// A token and what it says, as clients are told.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenDetails {
    #[serde(serialize_with = "exposed")]
    pub token: Secret,
    pub key_name: String,
    /// Milliseconds since 1970.
    pub issued: u64,
    pub expires: u64,
    /// JSON: the key's own as it was written, or what the key may of what was asked for.
    pub capability: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_id: Option<String>,
}

fn exposed<S: Serializer>(secret: &Secret, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(secret.expose())
}

impl Keyring {
    /// The token that answers a request, and of a signed one the nonce, which the caller must find unused before it hands the
    /// token out.
    ///
    /// A request without `mac` is for whoever presents the key itself. A token does not do: it could live for ever, and
    /// outlive its revocation. `random` tells tokens of one moment apart.
    ///
    /// # Errors
    /// `NotFound` for an app or key that does not exist; `InvalidCredentials` when the request is neither signed by the
    /// key nor sent with it; `TokenRequestTimestamp`; `InvalidParameter` for a `ttl`, `timestamp` or `nonce` that cannot be,
    /// `InvalidClientId`, `BadRequest` for what is no capability or for a request for another key; `CapabilityDenied` when the
    /// key may nothing of what is asked for.
    pub fn request_token(
        &self,
        key_name: &str,
        request: &TokenRequest,
        presented: Option<&Presented>,
        now_ms: u64,
        random: [u8; 16],
    ) -> Result<(TokenDetails, Option<Nonce>), ErrorInfo> {
        let none = || ErrorInfo::new(ErrorCode::NotFound, "there is no such key");
        let name = KeyName::parse(key_name).ok_or_else(none)?;
        let key = self.key(&name.app, &name.key_id)?.ok_or_else(none)?;
        if request
            .key_name
            .as_deref()
            .is_some_and(|asked| asked != key_name)
        {
            let what = "keyName is not the key that is asked";
            return Err(ErrorInfo::new(ErrorCode::BadRequest, what));
        }
        if request.has_line_breaks() {
            // Signed is one text of lines: what is in which of them must not be for who asks to choose.
            let what = "a field of the token request holds a line break";
            return Err(ErrorInfo::new(ErrorCode::BadRequest, what));
        }
        match (&request.mac, presented) {
            (Some(mac), _) if request.is_signed(mac, &key.secret.signer()) => {}
            (Some(_), _) => return Err(refused("mac is not the key's over this request")),
            (None, Some(Presented::Key(credential))) if self.prove(credential)?.name() == name => {}
            (None, _) => {
                return Err(refused("a request without mac needs the key it is for"));
            }
        }
        let made_at_ms = request.made_at_ms(now_ms)?;
        let nonce = nonce(request, name, made_at_ms)?;
        Ok((issue(key, request, now_ms, random)?, nonce))
    }
}

fn nonce(
    request: &TokenRequest,
    key: KeyName,
    made_at_ms: u64,
) -> Result<Option<Nonce>, ErrorInfo> {
    if request.mac.is_none() {
        return Ok(None);
    }
    let text = request.nonce.clone().unwrap_or_default();
    if text.is_empty() || text.len() > NONCE_BYTES_MAX {
        return Err(parameter("nonce is empty or too long"));
    }
    Ok(Some(Nonce {
        key,
        text,
        until_ms: made_at_ms.saturating_add(CLOCK_SKEW_MAX_MS + 1),
    }))
}

fn issue(
    key: &Key,
    request: &TokenRequest,
    now_ms: u64,
    random: [u8; 16],
) -> Result<TokenDetails, ErrorInfo> {
    let expires = now_ms + request.ttl_ms(key)?;
    if request.client_id.as_deref() == Some("") {
        let what = "client id is empty";
        return Err(ErrorInfo::new(ErrorCode::InvalidClientId, what));
    }
    let client_id = request.client_id.as_deref().map(client_id::checked);
    let client_id = client_id.transpose()?.map(str::to_owned);
    let capability = match request.capability.as_deref() {
        None | Some("") => key.capability.clone(),
        Some(asked) => narrowed(key, asked)?,
    };
    let claims = Claims {
        iat: Some(jwt::to_seconds(now_ms)),
        exp: Some(jwt::to_seconds(expires)),
        jti: Some(URL_SAFE_NO_PAD.encode(random)),
        capability: Some(capability.text().to_owned()),
        client_id: client_id.clone(),
        ..Claims::default()
    };
    let key_name = key.name().to_string();
    Ok(TokenDetails {
        token: Secret::new(jwt::sign(&key_name, &key.secret.signer(), &claims)),
        key_name,
        issued: now_ms,
        expires,
        capability: capability.text().to_owned(),
        client_id,
    })
}

fn parameter(what: &str) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::InvalidParameter, what)
}

#[cfg(test)]
mod tests;
