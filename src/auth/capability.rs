//! Capabilities: which operations on which channels a credential allows (§3.7.4).

use std::collections::BTreeMap;

use crate::types::{ChannelName, ErrorCode, ErrorInfo};

macro_rules! operations {
    ($($name:ident = $text:literal,)*) => {
        /// One thing that a client may be allowed to do.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Operation { $(#[doc = $text] $name,)* }

        impl Operation {
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The name in capabilities.
            #[must_use]
            pub const fn text(self) -> &'static str { match self { $(Self::$name => $text,)* } }

            /// The operation with this name.
            #[must_use]
            pub fn from_text(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|operation| operation.text() == text)
            }
        }
    };
}

operations! {
    Subscribe = "subscribe", Publish = "publish", Presence = "presence", History = "history", Stats = "stats",
    PushSubscribe = "push-subscribe", PushAdmin = "push-admin", ChannelMetadata = "channel-metadata",
    ObjectSubscribe = "object-subscribe", ObjectPublish = "object-publish",
    AnnotationSubscribe = "annotation-subscribe", AnnotationPublish = "annotation-publish",
    MessageUpdateOwn = "message-update-own", MessageUpdateAny = "message-update-any",
    MessageDeleteOwn = "message-delete-own", MessageDeleteAny = "message-delete-any",
    PrivilegedHeaders = "privileged-headers",
}

/// A set of operations, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Operations(u32);

impl Operations {
    const EVERY: Self = Self(u32::MAX);

    const fn with(self, operation: Operation) -> Self {
        Self(self.0 | 1 << operation as u32)
    }

    const fn has(self, operation: Operation) -> bool {
        self.0 & 1 << operation as u32 != 0
    }
}

/// A text that is not a capability.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCapability {
    #[error("capability is not a JSON object of arrays of operations: {0}")]
    Form(String),
    #[error("capability names no resource")]
    Empty,
    #[error("capability gives no operation on `{0}`")]
    NoOperation(String),
    #[error("capability names the unknown operation `{0}`")]
    UnknownOperation(String),
    #[error("capability gives `*` together with other operations on `{0}`")]
    Mixed(String),
}

impl From<InvalidCapability> for ErrorInfo {
    fn from(error: InvalidCapability) -> Self {
        Self::new(ErrorCode::BadRequest, error.to_string())
    }
}

/// What a credential allows. Nothing is allowed that no resource of it names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability(Vec<(Pattern, Operations)>);

impl Capability {
    /// From JSON: `{"resource": ["operation", ..], ..}`.
    ///
    /// # Errors
    /// When the text is anything else; a capability is never read as less or more than it says.
    pub fn parse(text: &str) -> Result<Self, InvalidCapability> {
        let resources: BTreeMap<String, Vec<String>> =
            serde_json::from_str(text).map_err(|e| InvalidCapability::Form(e.to_string()))?;
        if resources.is_empty() {
            return Err(InvalidCapability::Empty);
        }
        let resources = resources.into_iter();
        resources
            .map(|(resource, names)| Ok((Pattern::parse(&resource), operations(resource, &names)?)))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Everything on everything: `{"[*]*":["*"]}`.
    #[must_use]
    pub fn everything() -> Self {
        Self(vec![(Pattern::parse("[*]*"), Operations::EVERY)])
    }

    /// Whether the operation is allowed on this channel.
    #[must_use]
    pub fn allows(&self, operation: Operation, channel: &ChannelName) -> bool {
        let mut granting = self.0.iter().filter(|(_, granted)| granted.has(operation));
        granting.any(|(pattern, _)| pattern.matches(channel.as_str()))
    }

    /// Whether the operation is allowed on the app as a whole: on the resource `*` or `[*]*`.
    #[must_use]
    pub fn allows_app_wide(&self, operation: Operation) -> bool {
        let mut granting = self.0.iter().filter(|(_, granted)| granted.has(operation));
        granting.any(|(pattern, _)| pattern.is_every_channel())
    }
}

fn operations(resource: String, names: &[String]) -> Result<Operations, InvalidCapability> {
    if names.is_empty() {
        return Err(InvalidCapability::NoOperation(resource));
    }
    if names.iter().any(|name| name == "*") {
        return match names {
            [_] => Ok(Operations::EVERY),
            _ => Err(InvalidCapability::Mixed(resource)),
        };
    }
    names.iter().try_fold(Operations::default(), |all, name| {
        let unknown = || InvalidCapability::UnknownOperation(name.chars().take(64).collect());
        Operation::from_text(name)
            .map(|one| all.with(one))
            .ok_or_else(unknown)
    })
}

/// A resource of a capability.
///
/// Segments are split by `:`. `*` stands for one whole segment, as the last one for one or more; anywhere
/// else it is a plain character. A qualifier `[meta]` or `[queue]` keeps a resource from ordinary channels; `[*]` is
/// any qualifier or none.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pattern {
    ordinary: bool,
    segments: Vec<String>,
}

impl Pattern {
    fn parse(resource: &str) -> Self {
        let (ordinary, path) = match resource.strip_prefix("[*]") {
            Some(path) => (true, path),
            None => (!resource.starts_with('['), resource),
        };
        let segments = path.split(':').map(str::to_owned).collect();
        Self { ordinary, segments }
    }

    fn is_every_channel(&self) -> bool {
        self.ordinary && self.segments == ["*"]
    }

    /// One pass over both: a `*` stands for exactly one segment, except the last, so nothing needs retrying.
    fn matches(&self, name: &str) -> bool {
        if !self.ordinary {
            return false;
        }
        let mut names = name.split(':');
        for (place, segment) in self.segments.iter().enumerate() {
            let Some(name) = names.next() else {
                return false;
            };
            if segment == "*" {
                if place + 1 == self.segments.len() {
                    return true;
                }
            } else if segment != name {
                return false;
            }
        }
        names.next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(capability: &str, operation: Operation, channel: &str) -> bool {
        let capability = Capability::parse(capability).unwrap();
        capability.allows(operation, &ChannelName::parse(channel).unwrap())
    }

    #[test]
    fn resources_match_by_whole_segments() {
        // (resource, channels it covers, channels it does not)
        let table: &[(&str, &[&str], &[&str])] = &[
            ("*", &["a", "a:b", "foo*"], &[]),
            ("[*]*", &["a", "a:b:c"], &[]),
            ("[meta]*", &[], &["a", "meta", "a:b"]),
            ("[queue]*", &[], &["a"]),
            ("foo", &["foo"], &["foo:a", "fo", "fooo", "Foo"]),
            ("foo:*", &["foo:a", "foo:a:b", "foo:"], &["foo", "fooo:a"]),
            ("foo*", &["foo*"], &["foo", "fooa", "foo:a"]),
            ("*:bar", &["x:bar", "*:bar"], &["bar", "x:y:bar", "x:bar:z"]),
            ("a:*:c", &["a:b:c", "a::c"], &["a:c", "a:b:b:c", "a:b:c:d"]),
            ("a:*:*", &["a:b:c", "a:b:c:d"], &["a:b", "a"]),
            ("*:*", &["a:b", "a:b:c"], &["a"]),
            ("**", &["**"], &["a", "*"]),
        ];
        for (resource, covered, others) in table {
            let capability = format!(r#"{{"{resource}":["publish"]}}"#);
            for channel in *covered {
                assert!(
                    allows(&capability, Operation::Publish, channel),
                    "{resource} {channel}"
                );
                assert!(
                    !allows(&capability, Operation::Subscribe, channel),
                    "{resource} {channel}"
                );
            }
            for channel in *others {
                assert!(
                    !allows(&capability, Operation::Publish, channel),
                    "{resource} {channel}"
                );
            }
        }
    }

    #[test]
    fn operations_of_all_matching_resources_add_up() {
        let capability = r#"{"a:*":["subscribe"],"*":["history","presence"],"b":["*"]}"#;
        assert!(allows(capability, Operation::Subscribe, "a:x"));
        assert!(allows(capability, Operation::History, "a:x"));
        assert!(!allows(capability, Operation::Publish, "a:x"));
        for operation in Operation::ALL {
            assert!(allows(capability, *operation, "b"));
            assert_eq!(Operation::from_text(operation.text()), Some(*operation));
        }
        let capability = Capability::parse(capability).unwrap();
        assert!(capability.allows_app_wide(Operation::Presence));
        assert!(
            !capability.allows_app_wide(Operation::Stats),
            "`b` is not the app"
        );
        assert!(Capability::everything().allows_app_wide(Operation::Stats));
    }

    #[test]
    fn what_is_not_a_capability_is_refused() {
        for bad in [
            "",
            "[]",
            "{}",
            "null",
            r#"{"a":"publish"}"#,
            r#"{"a":[]}"#,
            r#"{"a":["fly"]}"#,
            r#"{"a":["*","publish"]}"#,
            r#"{"a":["publish"]}x"#,
            r#"{"a":["Publish"]}"#,
        ] {
            assert!(Capability::parse(bad).is_err(), "{bad}");
        }
    }
}
