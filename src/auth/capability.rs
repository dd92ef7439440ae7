//! Capabilities: which operations on which channels a credential allows (§3.7.4).

mod pattern;

use std::collections::BTreeMap;

use crate::auth::capability::pattern::Pattern;
use crate::types::{ChannelName, ErrorCode, ErrorInfo};

/// Longest text of a capability, in bytes.
const TEXT_BYTES_MAX: usize = 64 * 1024;

/// Resources of one capability. Intersecting two meets every pair.
const RESOURCES_MAX: usize = 256;

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

    const fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    const fn either(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// In the order of their names; `*` where it is everything there is and will be.
    fn names(self) -> Vec<&'static str> {
        if self == Self::EVERY {
            return vec!["*"];
        }
        let held = Operation::ALL.iter().filter(|one| self.has(**one));
        let mut names: Vec<_> = held.map(|one| one.text()).collect();
        names.sort_unstable();
        names
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
    #[error("capability is longer than {TEXT_BYTES_MAX} bytes")]
    TooLong,
    #[error("capability names more than {RESOURCES_MAX} resources")]
    TooMany,
}

impl From<InvalidCapability> for ErrorInfo {
    fn from(error: InvalidCapability) -> Self {
        Self::new(ErrorCode::BadRequest, error.to_string())
    }
}

/// What a credential allows. Nothing is allowed that no resource of it names.
///
/// Invariant: 1 to 256 resources, in the order of their texts, each with at least one operation.
#[derive(Clone, Debug)]
pub struct Capability {
    text: String,
    resources: Vec<(Pattern, Operations)>,
}

/// Alike when they allow the same by the same resources, however they are written.
impl PartialEq for Capability {
    fn eq(&self, other: &Self) -> bool {
        self.resources == other.resources
    }
}

impl Eq for Capability {}

impl Capability {
    /// From JSON: `{"resource": ["operation", ..], ..}`.
    ///
    /// # Errors
    /// When the text is anything else; a capability is never read as less or more than it says.
    pub fn parse(text: &str) -> Result<Self, InvalidCapability> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(InvalidCapability::TooLong);
        }
        let named: BTreeMap<String, Vec<String>> =
            serde_json::from_str(text).map_err(|e| InvalidCapability::Form(e.to_string()))?;
        if named.is_empty() {
            return Err(InvalidCapability::Empty);
        }
        if named.len() > RESOURCES_MAX {
            return Err(InvalidCapability::TooMany);
        }
        let named = named.into_iter();
        let resources = named
            .map(|(resource, names)| Ok((Pattern::parse(&resource), operations(resource, &names)?)))
            .collect::<Result<_, _>>()?;
        let text = text.to_owned();
        Ok(Self { text, resources })
    }

    /// Everything on everything: `{"[*]*":["*"]}`.
    #[must_use]
    pub fn everything() -> Self {
        Self::of(vec![(Pattern::parse("[*]*"), Operations::EVERY)])
    }

    fn of(resources: Vec<(Pattern, Operations)>) -> Self {
        let text = canonical(&resources);
        Self { text, resources }
    }

    /// As it was written; an intersection in its canonical form.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The canonical form: resources and the operations of each in the order of their bytes, no white space.
    #[must_use]
    pub fn canonical(&self) -> String {
        canonical(&self.resources)
    }

    /// The texts of its resources.
    pub fn resources(&self) -> impl Iterator<Item = &str> {
        self.resources.iter().map(|(pattern, _)| pattern.text())
    }

    /// What both allow; `None` where that is nothing.
    ///
    /// Every two resources that can cover a channel in common give one that covers exactly those; where several pairs give
    /// the same, their operations add up. Thus a capability intersected with itself is itself, overlapping resources included.
    ///
    /// # Errors
    /// `TooMany` when the result would have more resources than a capability may have.
    pub fn intersect(&self, other: &Self) -> Result<Option<Self>, InvalidCapability> {
        let mut common: BTreeMap<String, (Pattern, Operations)> = BTreeMap::new();
        for (ours, granted) in &self.resources {
            for (theirs, asked) in &other.resources {
                let operations = granted.both(*asked);
                if operations.is_empty() {
                    continue;
                }
                let Some(meet) = ours.meet(theirs) else {
                    continue;
                };
                let key = meet.text().to_owned();
                let known = common.entry(key).or_insert((meet, operations));
                known.1 = known.1.either(operations);
                if common.len() > RESOURCES_MAX {
                    return Err(InvalidCapability::TooMany);
                }
            }
        }
        let resources: Vec<_> = common.into_values().collect();
        Ok((!resources.is_empty()).then(|| Self::of(resources)))
    }

    /// Whether the operation is allowed on this channel. Metachannels are only read.
    #[must_use]
    pub fn allows(&self, operation: Operation, channel: &ChannelName) -> bool {
        if let Some(name) = channel.metachannel() {
            let is_read = matches!(
                operation,
                Operation::Subscribe | Operation::History | Operation::ChannelMetadata
            );
            return is_read && self.allows_qualified(operation, "meta", name);
        }
        self.granting(operation)
            .any(|pattern| pattern.matches(None, channel.as_str()))
    }

    /// Whether the operation is allowed on `[qualifier]name`, such as a metachannel: no resource for ordinary channels
    /// allows that.
    #[must_use]
    pub fn allows_qualified(&self, operation: Operation, qualifier: &str, name: &str) -> bool {
        self.granting(operation)
            .any(|pattern| pattern.matches(Some(qualifier), name))
    }

    /// Whether the operation is allowed on the app as a whole: on the resource `*` or `[*]*`.
    #[must_use]
    pub fn allows_app_wide(&self, operation: Operation) -> bool {
        self.granting(operation).any(Pattern::is_every_channel)
    }

    fn granting(&self, operation: Operation) -> impl Iterator<Item = &Pattern> {
        let granting = self.resources.iter();
        let granting = granting.filter(move |(_, granted)| granted.has(operation));
        granting.map(|(pattern, _)| pattern)
    }
}

fn canonical(resources: &[(Pattern, Operations)]) -> String {
    let named = resources.iter();
    let named = named.map(|(pattern, granted)| (pattern.text(), granted.names()));
    let named: BTreeMap<&str, Vec<&str>> = named.collect();
    serde_json::to_string(&named).expect("a map of texts is JSON")
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    /// What the key allows, what is asked for, and what comes out: by what client libraries' tests expect of the app they
    /// set up. `None`: nothing in common.
    const INTERSECTIONS: &[(&str, &str, Option<&str>)] = &[
        (MIXED, MIXED, Some(MIXED)),
        (MIXED, r#"{"canpublish:test":["subscribe"]}"#, None),
        (PLAIN, r#"{"channelx":["publish"]}"#, None),
        (
            PLAIN,
            r#"{"channel2":["presence","subscribe"]}"#,
            Some(r#"{"channel2":["subscribe"]}"#),
        ),
        (
            PLAIN,
            r#"{"channel2":["presence","subscribe"],"channelx":["presence","subscribe"]}"#,
            Some(r#"{"channel2":["subscribe"]}"#),
        ),
        (
            PLAIN,
            r#"{"channel2":["*"]}"#,
            Some(r#"{"channel2":["publish","subscribe"]}"#),
        ),
        (
            PLAIN,
            r#"{"channel6":["publish","subscribe"]}"#,
            Some(r#"{"channel6":["publish","subscribe"]}"#),
        ),
        (
            r#"{"*":["subscribe"]}"#,
            r#"{"cansubscribe":["subscribe"]}"#,
            Some(r#"{"cansubscribe":["subscribe"]}"#),
        ),
        (
            MIXED,
            r#"{"canpublish:check":["publish"]}"#,
            Some(r#"{"canpublish:check":["publish"]}"#),
        ),
        (
            r#"{"*":["subscribe"]}"#,
            r#"{"cansubscribe:*":["subscribe"]}"#,
            Some(r#"{"cansubscribe:*":["subscribe"]}"#),
        ),
        (
            r#"{"[*]*":["*"]}"#,
            r#"{"*":["*"]}"#,
            Some(r#"{"*":["*"]}"#),
        ),
        (
            r#"{"*":["*"]}"#,
            r#"{"[*]*":["*"]}"#,
            Some(r#"{"*":["*"]}"#),
        ),
        (r#"{"*":["*"]}"#, r#"{"[meta]*":["subscribe"]}"#, None),
        (r#"{"*":["*"]}"#, r#"{"[*][meta]*":["subscribe"]}"#, None),
        (
            r#"{"a:*":["publish"]}"#,
            r#"{"*:b":["publish"]}"#,
            Some(r#"{"a:b":["publish"]}"#),
        ),
    ];
    const MIXED: &str = r#"{"canpublish:*":["publish"],"canpublish:andpresence":["presence","publish"],"cansubscribe:*":["subscribe"],"pushenabled:*":["publish","push-subscribe","subscribe"],"pushenabled:admin:*":["publish","push-admin","subscribe"]}"#;
    const PLAIN: &str = r#"{"channel0":["publish"],"channel1":["publish"],"channel2":["publish","subscribe"],"channel3":["subscribe"],"channel4":["presence","publish","subscribe"],"channel5":["presence"],"channel6":["*"]}"#;

    #[test]
    fn a_token_gets_what_it_asks_for_and_its_key_has() {
        for (key, asked, expected) in INTERSECTIONS {
            let (key, asked) = (
                Capability::parse(key).unwrap(),
                Capability::parse(asked).unwrap(),
            );
            for (a, b) in [(&key, &asked), (&asked, &key)] {
                let common = a.intersect(b).unwrap();
                assert_eq!(common.as_ref().map(Capability::text), *expected);
            }
        }
    }

    #[test]
    fn a_capability_is_shown_as_it_was_written_and_has_one_canonical_form() {
        let written = r#"{ "b":["subscribe", "publish"], "a":["*"] }"#;
        let capability = Capability::parse(written).unwrap();
        assert_eq!(capability.text(), written);
        let canonical = r#"{"a":["*"],"b":["publish","subscribe"]}"#;
        assert_eq!(capability.canonical(), canonical);
        assert_eq!(Capability::parse(canonical).unwrap(), capability);
        assert_eq!(capability.resources().collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn qualified_names_need_a_qualified_resource() {
        let allows = |resource: &str, qualifier, name| {
            let capability = format!(r#"{{"{resource}":["subscribe"]}}"#);
            let capability = Capability::parse(&capability).unwrap();
            capability.allows_qualified(Operation::Subscribe, qualifier, name)
        };
        assert!(allows("[meta]*", "meta", "log"));
        let lifecycle = ChannelName::channel_lifecycle();
        for (text, subscribe) in [
            (r#"{"*":["*"]}"#, false),
            (r#"{"[meta]*":["subscribe"]}"#, true),
            (r#"{"[meta]channel.lifecycle":["*"]}"#, true),
            (r#"{"[*]*":["*"]}"#, true),
        ] {
            let capability = Capability::parse(text).unwrap();
            assert_eq!(
                capability.allows(Operation::Subscribe, &lifecycle),
                subscribe,
                "{text}"
            );
            assert!(!capability.allows(Operation::Publish, &lifecycle), "{text}");
            assert!(
                !capability.allows(Operation::Presence, &lifecycle),
                "{text}"
            );
        }
        assert!(allows("[*]*", "meta", "log"));
        assert!(allows("[meta]log:*", "meta", "log:a"));
        assert!(!allows("[meta]log:*", "meta", "other:a"));
        assert!(!allows("*", "meta", "log"));
        assert!(!allows("[queue]*", "meta", "log"));
        assert!(!allows("[meta", "meta", ""), "no qualifier, no resource");
    }

    #[test]
    fn a_capability_is_bounded() {
        let of = |n: usize| {
            let named: Vec<String> = (0..n).map(|i| format!(r#""c{i}":["publish"]"#)).collect();
            Capability::parse(&format!("{{{}}}", named.join(",")))
        };
        assert!(of(256).is_ok());
        assert_eq!(of(257), Err(InvalidCapability::TooMany));
        let long = format!(r#"{{"{}":["publish"]}}"#, "x".repeat(TEXT_BYTES_MAX));
        assert_eq!(Capability::parse(&long), Err(InvalidCapability::TooLong));
        let across = |form: &dyn Fn(usize) -> String| {
            let named: Vec<String> = (0..20)
                .map(|i| format!(r#""{}":["publish"]"#, form(i)))
                .collect();
            Capability::parse(&format!("{{{}}}", named.join(","))).unwrap()
        };
        let (a, b) = (
            across(&|i| format!("a{i}:*")),
            across(&|i| format!("*:b{i}")),
        );
        assert_eq!(a.intersect(&b), Err(InvalidCapability::TooMany));
    }

    fn resource() -> impl Strategy<Value = String> {
        let segment = prop_oneof![Just("*"), Just("a"), Just("b"), Just("")];
        let qualifier = prop_oneof![3 => Just(""), 1 => Just("[*]"), 1 => Just("[meta]")];
        (qualifier, prop::collection::vec(segment, 1..4))
            .prop_map(|(qualifier, segments)| format!("{qualifier}{}", segments.join(":")))
    }

    fn capability() -> impl Strategy<Value = Capability> {
        let operations = prop::sample::subsequence(vec!["publish", "subscribe", "history"], 1..=3);
        let operations = prop_oneof![Just(vec!["*"]), operations];
        prop::collection::btree_map(resource(), operations, 1..4).prop_map(|named| {
            let text = serde_json::to_string(&named).unwrap();
            Capability::parse(&text).unwrap()
        })
    }

    proptest! {
        /// The intersection allows exactly what both allow: never more, never less.
        #[test]
        fn an_intersection_allows_what_both_allow(
            a in capability(), b in capability(),
            name in prop::collection::vec(prop_oneof![Just("a"), Just("b"), Just(""), Just("*")], 1..5),
        ) {
            let name = name.join(":");
            let common = a.intersect(&b).unwrap();
            for operation in Operation::ALL {
                let both = |of: &dyn Fn(&Capability) -> bool| of(&a) && of(&b);
                let by = |of: &dyn Fn(&Capability) -> bool| common.as_ref().is_some_and(of);
                let meta = |c: &Capability| c.allows_qualified(*operation, "meta", &name);
                prop_assert_eq!(by(&meta), both(&meta));
                if let Ok(channel) = ChannelName::parse(&name) {
                    let plain = |c: &Capability| c.allows(*operation, &channel);
                    prop_assert_eq!(by(&plain), both(&plain));
                }
            }
        }

        #[test]
        fn canonical_text_says_the_same(a in capability()) {
            prop_assert_eq!(&Capability::parse(&a.canonical()).unwrap(), &a);
            let both = a.intersect(&a).unwrap().unwrap();
            prop_assert!(a.resources().all(|ours| both.resources().any(|kept| kept == ours)));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*") {
            let _ = Capability::parse(&text);
            let _ = Pattern::parse(&text).meet(&Pattern::parse("[*]*"));
        }
    }
}
