//! Apps as operators write and read them: one JSON object with keys and namespaces.
//!
//! Read by hand, field by field, so that whatever is wrong is named by its path; a request is taken whole or not at all.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::auth::{Capability, is_key_id};
use crate::broker::Broker;
use crate::types::{AppId, ParseIdError};
use crate::wire::control;

/// Longest retention in milliseconds: 365 days.
pub const RETENTION_MS_MAX: u64 = 365 * 24 * 3_600_000;

/// Keys of one app.
const KEYS_MAX: usize = 100;

/// Namespaces of one app.
const NAMESPACES_MAX: usize = 1_000;

/// Longest id of a namespace in bytes.
const NAMESPACE_BYTES_MAX: usize = 256;

/// Characters of a secret that is given: enough to sign with, few enough to present.
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 16..=256;

/// What a key may that says nothing of it.
const CAPABILITY_DEFAULT: &str = r#"{"*":["*"]}"#;

/// A description of an app that cannot be used, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {reason}")]
pub(super) struct InvalidApp {
    path: String,
    reason: String,
}

/// An app as it is shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct App {
    pub id: String,
    pub keys: Vec<Key>,
    pub namespaces: Vec<Namespace>,
}

/// A key as it is shown.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Key {
    pub id: String,
    /// `app.key`.
    pub name: String,
    /// `app.key:secret`, in answer to the creation only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// JSON: resource to operations.
    pub capability: String,
    pub revocable_tokens: bool,
}

/// Without the secret.
impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// A rule for channels whose name begins with `id:`, as it is shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Namespace {
    pub id: String,
    pub retention_ms: u64,
    pub retention_bytes: u64,
    pub last_only: bool,
    pub ephemeral: bool,
}

impl App {
    pub(super) fn of(app: &control::App, with_secrets: bool) -> Self {
        let key = |key: &control::Key| Key {
            id: key.id.clone(),
            name: format!("{}.{}", app.id, key.id),
            key: with_secrets.then(|| format!("{}.{}:{}", app.id, key.id, key.secret)),
            capability: key.capability.clone(),
            revocable_tokens: key.revocable_tokens,
        };
        let namespace = |namespace: &control::Namespace| Namespace {
            id: namespace.id.clone(),
            retention_ms: namespace.retention_ms,
            retention_bytes: namespace.retention_bytes,
            last_only: namespace.last_only,
            ephemeral: namespace.ephemeral,
        };
        Self {
            id: app.id.clone(),
            keys: app.keys.iter().map(key).collect(),
            namespaces: app.namespaces.iter().map(namespace).collect(),
        }
    }
}

/// The app that a request describes. What it leaves out is made up: an id, keys' ids and secrets by `random`, which gives that
/// many random bytes as URL-safe text; without `keys` there is one that may do everything.
///
/// # Errors
/// With the path of the first field that is wrong.
pub(super) fn read(
    text: &[u8],
    mut random: impl FnMut(usize) -> String,
) -> Result<control::App, InvalidApp> {
    let value = serde_json::from_slice(text);
    let value = value.map_err(|err| invalid("request", format!("not JSON: {err}")))?;
    let mut fields = Fields::of(value, String::new())?;
    let id = fields.text("id")?.unwrap_or_else(|| random(9));
    let app = id.parse::<AppId>();
    let app = app.map_err(|err: ParseIdError| invalid("id", err.to_string()))?;
    if Broker::is_internal(&app) {
        return Err(invalid("id", format!("`{id}` is the cluster's own")));
    }
    let keys = match fields.list("keys", KEYS_MAX)? {
        None => vec![read_key(Fields::default(), &mut random)?],
        Some(list) => (list.into_iter())
            .map(|fields| read_key(fields, &mut random))
            .collect::<Result<_, _>>()?,
    };
    let namespaces = fields.list("namespaces", NAMESPACES_MAX)?;
    let namespaces = namespaces.unwrap_or_default().into_iter();
    let namespaces: Vec<_> = namespaces.map(read_namespace).collect::<Result<_, _>>()?;
    fields.finish()?;
    unique("keys", keys.iter().map(|key| &*key.id))?;
    unique(
        "namespaces",
        namespaces.iter().map(|namespace| &*namespace.id),
    )?;
    Ok(control::App {
        id,
        keys,
        namespaces,
    })
}

fn read_key(
    mut fields: Fields,
    random: &mut impl FnMut(usize) -> String,
) -> Result<control::Key, InvalidApp> {
    let id = fields.text("id")?.unwrap_or_else(|| random(6));
    if !is_key_id(&id) {
        let what = "not a key id (3 to 64 letters, digits, `-` or `_`)";
        return Err(fields.wrong("id", what));
    }
    let secret = fields.text("secret")?.unwrap_or_else(|| random(32));
    if !SECRET_BYTES.contains(&secret.len()) || !secret.bytes().all(|b| b.is_ascii_graphic()) {
        let what = "not a secret (16 to 256 visible ASCII characters)";
        return Err(fields.wrong("secret", what));
    }
    let capability = fields.text_or_object("capability")?;
    let capability = capability.unwrap_or_else(|| CAPABILITY_DEFAULT.to_owned());
    Capability::parse(&capability).map_err(|err| fields.wrong("capability", &err.to_string()))?;
    let revocable_tokens = fields.flag("revocable_tokens")?;
    fields.finish()?;
    Ok(control::Key {
        id,
        secret,
        capability,
        revocable_tokens,
    })
}

fn read_namespace(mut fields: Fields) -> Result<control::Namespace, InvalidApp> {
    let id = fields.text("id")?.unwrap_or_default();
    if id.is_empty() || id.len() > NAMESPACE_BYTES_MAX || id.contains(':') {
        let what = "not a namespace (1 to 256 bytes without `:`)";
        return Err(fields.wrong("id", what));
    }
    let retention_ms = fields.count("retention_ms")?;
    if retention_ms > RETENTION_MS_MAX {
        return Err(fields.wrong("retention_ms", "at most 365 days are possible"));
    }
    let namespace = control::Namespace {
        id,
        retention_ms,
        retention_bytes: fields.count("retention_bytes")?,
        last_only: fields.flag("last_only")?,
        ephemeral: fields.flag("ephemeral")?,
    };
    fields.finish()?;
    Ok(namespace)
}

fn unique<'a>(path: &str, ids: impl Iterator<Item = &'a str>) -> Result<(), InvalidApp> {
    let mut seen = BTreeSet::new();
    for (at, id) in ids.enumerate() {
        if !seen.insert(id) {
            return Err(invalid(
                &format!("{path}.{at}.id"),
                format!("`{id}` is there twice"),
            ));
        }
    }
    Ok(())
}

fn invalid(path: &str, reason: impl Into<String>) -> InvalidApp {
    InvalidApp {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

/// An object of the request, whose fields are taken out one by one; what is left in the end is unknown.
#[derive(Default)]
struct Fields {
    /// With a `.` at its end, or empty.
    path: String,
    left: Map<String, Value>,
}

impl Fields {
    fn of(value: Value, path: String) -> Result<Self, InvalidApp> {
        match value {
            Value::Object(left) => Ok(Self { path, left }),
            _ => {
                let path = path.strip_suffix('.').unwrap_or("request");
                Err(invalid(path, "not an object"))
            }
        }
    }

    fn wrong(&self, name: &str, reason: &str) -> InvalidApp {
        invalid(&format!("{}{name}", self.path), reason)
    }

    /// `null` is as good as missing.
    fn take(&mut self, name: &str) -> Option<Value> {
        self.left.remove(name).filter(|value| !value.is_null())
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, InvalidApp> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(name, "not a text")),
        }
    }

    fn text_or_object(&mut self, name: &str) -> Result<Option<String>, InvalidApp> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(object @ Value::Object(_)) => Ok(Some(object.to_string())),
            Some(_) => Err(self.wrong(name, "neither an object nor its JSON as a text")),
        }
    }

    fn count(&mut self, name: &str) -> Result<u64, InvalidApp> {
        let value = self.take(name).unwrap_or(Value::from(0));
        let count = value.as_u64();
        count.ok_or_else(|| self.wrong(name, "not a whole number from 0"))
    }

    fn flag(&mut self, name: &str) -> Result<bool, InvalidApp> {
        let value = self.take(name).unwrap_or(Value::Bool(false));
        let flag = value.as_bool();
        flag.ok_or_else(|| self.wrong(name, "neither true nor false"))
    }

    fn list(&mut self, name: &str, max: usize) -> Result<Option<Vec<Self>>, InvalidApp> {
        let list = match self.take(name) {
            None => return Ok(None),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(self.wrong(name, "not a list")),
        };
        if list.len() > max {
            return Err(self.wrong(name, &format!("more than {max}")));
        }
        let list = list.into_iter().enumerate();
        let list = list.map(|(at, item)| Self::of(item, format!("{}{name}.{at}.", self.path)));
        list.collect::<Result<_, _>>().map(Some)
    }

    fn finish(self) -> Result<(), InvalidApp> {
        match self.left.keys().next() {
            None => Ok(()),
            Some(name) => Err(self.wrong(name, "no such field")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(text: &str) -> Result<control::App, String> {
        let mut n = 0;
        let random = |bytes| {
            n += 1;
            format!("{n:0>bytes$}")
        };
        read(text.as_bytes(), random).map_err(|err| err.to_string())
    }

    #[test]
    fn what_is_left_out_is_made_up() {
        let made = app("{}").unwrap();
        assert_eq!(
            (made.id.len(), made.keys.len(), made.namespaces.len()),
            (9, 1, 0)
        );
        let key = &made.keys[0];
        assert_eq!((key.id.len(), key.secret.len()), (6, 32));
        assert_eq!(
            (&*key.capability, key.revocable_tokens),
            (r#"{"*":["*"]}"#, false)
        );
        assert!(app(r#"{"keys":[]}"#).unwrap().keys.is_empty());
        let ids: BTreeSet<_> = app(r#"{"keys":[{},{},{}]}"#)
            .unwrap()
            .keys
            .into_iter()
            .map(|key| key.id)
            .collect();
        assert_eq!(ids.len(), 3);
    }

    #[test]
    fn what_is_said_is_kept() {
        let made = app(
            r#"{"id":"shop","keys":[{"id":"one","secret":"0123456789abcdef","capability":"{ \"a\":[\"publish\"] }"},
                {"capability":{"b":["*"]},"revocable_tokens":true}],
               "namespaces":[{"id":"persisted","retention_ms":86400000,"retention_bytes":5,"last_only":true,"ephemeral":null}]}"#,
        )
        .unwrap();
        let shown = App::of(&made, true);
        assert_eq!(
            shown.keys[0].key.as_deref(),
            Some("shop.one:0123456789abcdef")
        );
        assert_eq!(shown.keys[0].capability, r#"{ "a":["publish"] }"#);
        assert_eq!(
            (&*shown.keys[1].capability, shown.keys[1].revocable_tokens),
            (r#"{"b":["*"]}"#, true)
        );
        let rule = &made.namespaces[0];
        assert_eq!((rule.retention_ms, rule.retention_bytes), (86_400_000, 5));
        assert_eq!((rule.last_only, rule.ephemeral), (true, false));
        let public = serde_json::to_string(&App::of(&made, false)).unwrap();
        assert!(!public.contains("0123456789abcdef"));
        assert!(!format!("{shown:?}").contains("0123456789abcdef"));
    }

    #[test]
    fn what_is_wrong_is_named_by_its_path() {
        let many = format!(r#"{{"keys":[{}{{}}]}}"#, "{},".repeat(100));
        for (text, path) in [
            ("", "request: "),
            ("[]", "request: "),
            (r#"{"id":"a.b"}"#, "id: "),
            (r#"{"id":"_firth"}"#, "id: `_firth` is the cluster's own"),
            (r#"{"id":5}"#, "id: "),
            (r#"{"name":"x"}"#, "name: no such field"),
            (r#"{"keys":{}}"#, "keys: "),
            (r#"{"keys":[{},5]}"#, "keys.1: "),
            (&many, "keys: more than 100"),
            (r#"{"keys":[{},{"id":"a"}]}"#, "keys.1.id: "),
            (r#"{"keys":[{"secret":"short"}]}"#, "keys.0.secret: "),
            (
                r#"{"keys":[{"secret":"with a space in it"}]}"#,
                "keys.0.secret: ",
            ),
            (
                r#"{"keys":[{"capability":{"a":["fly"]}}]}"#,
                "keys.0.capability: ",
            ),
            (r#"{"keys":[{"capability":["*"]}]}"#, "keys.0.capability: "),
            (
                r#"{"keys":[{"revocableTokens":true}]}"#,
                "keys.0.revocableTokens: no such field",
            ),
            (
                r#"{"keys":[{"revocable_tokens":1}]}"#,
                "keys.0.revocable_tokens: ",
            ),
            (r#"{"keys":[{"id":"one"},{"id":"one"}]}"#, "keys.1.id: "),
            (r#"{"namespaces":[{}]}"#, "namespaces.0.id: "),
            (r#"{"namespaces":[{"id":"a:b"}]}"#, "namespaces.0.id: "),
            (
                r#"{"namespaces":[{"id":"a"},{"id":"a"}]}"#,
                "namespaces.1.id: ",
            ),
            (
                r#"{"namespaces":[{"id":"a","retention_ms":31536000001}]}"#,
                "namespaces.0.retention_ms: ",
            ),
            (
                r#"{"namespaces":[{"id":"a","retention_ms":-1}]}"#,
                "namespaces.0.retention_ms: ",
            ),
            (
                r#"{"namespaces":[{"id":"a","persisted":true}]}"#,
                "namespaces.0.persisted: no such field",
            ),
        ] {
            let complaint = app(text).unwrap_err();
            assert!(complaint.starts_with(path), "{text}: {complaint}");
        }
    }
}
