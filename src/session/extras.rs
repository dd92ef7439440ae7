//! What `extras` of a message or presence event may hold (§2.3.6).

use serde_json::{Map, Value};

use crate::types::{ErrorCode, ErrorInfo};

/// Keys that a client may set, and whether their value must be an object.
const KNOWN: &[(&str, bool)] = &[
    ("headers", true),
    ("push", true),
    ("ref", true),
    ("delta", true),
    ("privileged", false),
    ("ephemeral", false),
];

/// # Errors
/// `InvalidExtras` for a key that the protocol does not know, or a value of the wrong type.
pub(super) fn check(extras: Option<&Map<String, Value>>) -> Result<(), ErrorInfo> {
    for (key, value) in extras.into_iter().flatten() {
        let Some((_, object)) = KNOWN.iter().find(|(known, _)| known == key) else {
            let key: String = key.chars().take(64).collect();
            return Err(invalid(format!("extras hold the unknown key `{key}`")));
        };
        if *object && !value.is_object() {
            return Err(invalid(format!("extras.{key} is not an object")));
        }
        if key == "ephemeral" && !value.is_boolean() {
            return Err(invalid(
                "extras.ephemeral is neither true nor false".to_owned(),
            ));
        }
    }
    Ok(())
}

pub(super) fn is_ephemeral(extras: Option<&Map<String, Value>>) -> bool {
    extras.and_then(|extras| extras.get("ephemeral")) == Some(&Value::Bool(true))
}

pub(super) fn is_privileged(extras: Option<&Map<String, Value>>) -> bool {
    extras.is_some_and(|extras| extras.contains_key("privileged"))
}

pub(super) fn invalid(what: String) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::InvalidExtras, what)
}
