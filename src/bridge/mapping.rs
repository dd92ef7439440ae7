//! The convention between channels and topics: `/matches/football/5` is topic `matches`, key `football/5`.
//!
//! It is one-to-one where it applies: `/matches` has no key, `/matches/` an empty one. A channel that does not start
//! with `/`, or whose first segment is not a legal, ordinary topic name, is not part of the convention.

use crate::types::{ChannelName, InvalidChannelName};

/// Every topic that starts so holds cursors of some Firth cluster, and is mirrored in neither direction: a client that
/// could publish into one could move a cursor.
pub const CURSOR_TOPIC_PREFIX: &str = "firth-cursors-";

/// Kafka's limit on a topic name, in bytes.
const TOPIC_BYTES_MAX: usize = 249;

/// Why a Kafka record's key cannot be part of a channel name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnmappableKey {
    #[error("key is not UTF-8")]
    NotText,
    #[error("key does not make a channel: {0}")]
    Name(#[from] InvalidChannelName),
}

/// Whether Kafka allows the name: 1 to 249 of `a-z A-Z 0-9 . _ -`, neither `.` nor `..`.
///
/// Source: `org.apache.kafka.common.internals.Topic#validate`.
#[must_use]
pub fn is_legal_topic(name: &str) -> bool {
    let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=TOPIC_BYTES_MAX).contains(&name.len())
        && name.bytes().all(legal)
        && name != "."
        && name != ".."
}

/// Whether the topic takes part in the convention: legal, not internal to Kafka, not one of Firth's cursor topics.
#[must_use]
pub fn is_mirrored_topic(name: &str) -> bool {
    is_legal_topic(name) && !name.starts_with("__") && !name.starts_with(CURSOR_TOPIC_PREFIX)
}

/// The topic and key of a channel; `None` when the channel is not part of the convention.
#[must_use]
pub fn topic_of(channel: &str) -> Option<(&str, Option<&str>)> {
    let path = channel.strip_prefix('/')?;
    let (topic, key) = match path.split_once('/') {
        Some((topic, key)) => (topic, Some(key)),
        None => (path, None),
    };
    is_mirrored_topic(topic).then_some((topic, key))
}

/// The channel of a record.
///
/// # Errors
/// When the key cannot be part of a channel name; the error says why.
pub fn channel_of(topic: &str, key: Option<&[u8]>) -> Result<ChannelName, UnmappableKey> {
    let name = match key {
        None => format!("/{topic}"),
        Some(key) => {
            let key = std::str::from_utf8(key).map_err(|_| UnmappableKey::NotText)?;
            format!("/{topic}/{key}")
        }
    };
    Ok(ChannelName::parse(&name)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_convention() {
        let cases = [
            ("/matches/football/5", Some(("matches", Some("football/5")))),
            ("/matches", Some(("matches", None))),
            ("/matches/", Some(("matches", Some("")))),
            ("/matches//x", Some(("matches", Some("/x")))),
            ("matches/football", None),
            ("/", None),
            ("//x", None),
            ("/a topic/x", None),
            ("/./x", None),
            ("/../x", None),
            ("/__consumer_offsets/x", None),
            ("/firth-cursors-c-b/x", None),
        ];
        for (channel, expected) in cases {
            assert_eq!(topic_of(channel), expected, "{channel}");
        }
        assert!(topic_of(&format!("/{}", "t".repeat(249))).is_some());
        assert!(topic_of(&format!("/{}", "t".repeat(250))).is_none());
    }

    #[test]
    fn keys_that_make_no_channel_are_named() {
        assert_eq!(channel_of("t", Some(&[0xff])), Err(UnmappableKey::NotText));
        assert_eq!(
            channel_of("t", Some(b"a\nb")),
            Err(UnmappableKey::Name(InvalidChannelName::Control))
        );
        assert_eq!(
            channel_of("t", Some(&[b'x'; 2048])),
            Err(UnmappableKey::Name(InvalidChannelName::TooLong))
        );
        assert_eq!(channel_of("t", None).unwrap().as_str(), "/t");
    }

    proptest! {
        #[test]
        fn a_key_comes_back(topic in "[a-zA-Z0-9._-]{1,20}", key in proptest::option::of("\\PC{0,40}")) {
            prop_assume!(is_mirrored_topic(&topic));
            let channel = channel_of(&topic, key.as_deref().map(str::as_bytes));
            if let Ok(channel) = channel {
                prop_assert_eq!(topic_of(channel.as_str()), Some((topic.as_str(), key.as_deref())));
            }
        }

        #[test]
        fn a_channel_comes_back(name in "/?[a-z_./ -]{0,30}") {
            if let (Ok(channel), Some((topic, key))) = (ChannelName::parse(&name), topic_of(&name)) {
                prop_assert_eq!(channel_of(topic, key.map(str::as_bytes)), Ok(channel));
            }
        }
    }
}
