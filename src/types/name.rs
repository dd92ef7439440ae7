//! Channel names: what a client may call a channel.

use std::fmt;
use std::sync::Arc;

use crate::types::AppId;

/// Longest channel name in bytes of UTF-8.
const NAME_BYTES_MAX: usize = 2048;

/// What the name of a metachannel begins with: the server tells of itself there, and nobody else publishes.
const META: &str = "[meta]";

/// Metachannels of every app, without [`META`].
const METACHANNELS: &[&str] = &["channel.lifecycle", "connection.lifecycle"];

/// A channel name that the protocol allows, without qualifier; or a metachannel's.
///
/// Invariant: 1 to 2048 bytes; does not start with `:`, `,`, `[` or white space, metachannels aside; holds no control or
/// line-separating character (client protocol §2.5.1).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelName(Arc<str>);

/// Why a text cannot name a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidChannelName {
    #[error("channel name is empty")]
    Empty,
    #[error("channel name is longer than {NAME_BYTES_MAX} bytes")]
    TooLong,
    #[error("channel name may not start with `{0}`")]
    Start(char),
    #[error("channel name may not contain control or line-separating characters")]
    Control,
}

impl ChannelName {
    /// # Errors
    /// When the text is not a legal channel name; the error says why.
    pub fn parse(text: &str) -> Result<Self, InvalidChannelName> {
        let first = text.chars().next().ok_or(InvalidChannelName::Empty)?;
        if text.len() > NAME_BYTES_MAX {
            return Err(InvalidChannelName::TooLong);
        }
        let path = text.strip_prefix(META);
        let is_meta = path.is_some_and(|path| METACHANNELS.contains(&path));
        if !is_meta && (matches!(first, ':' | ',' | '[') || first.is_whitespace()) {
            return Err(InvalidChannelName::Start(first));
        }
        let separates = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
        if text.chars().any(separates) {
            return Err(InvalidChannelName::Control);
        }
        Ok(Self(text.into()))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where channels tell that they open and close.
    #[must_use]
    pub fn channel_lifecycle() -> Self {
        Self(format!("{META}{}", METACHANNELS[0]).into())
    }

    /// Where connections tell that they open and close.
    #[must_use]
    pub fn connection_lifecycle() -> Self {
        Self(format!("{META}{}", METACHANNELS[1]).into())
    }

    /// The name after `[meta]`, of a metachannel.
    #[must_use]
    pub fn metachannel(&self) -> Option<&str> {
        self.0.strip_prefix(META)
    }

    /// The text before the first `:`; the whole name where there is none.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.0.split(':').next().unwrap_or(&self.0)
    }
}

impl fmt::Display for ChannelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A channel of one app: what the replicated state is keyed by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelKey {
    pub app: AppId,
    pub name: ChannelName,
}

impl fmt::Display for ChannelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.app, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_not_trusted() {
        for good in ["a", "ns:ch/1", "/matches/football/5", "a b", "é", "a[b"] {
            assert_eq!(ChannelName::parse(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            ":a",
            ",a",
            " a",
            "[meta]x",
            "a\nb",
            "a\u{2028}b",
            "\u{7f}",
        ] {
            assert!(ChannelName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(ChannelName::parse(&"x".repeat(2049)).is_err());
    }

    #[test]
    fn metachannels_are_those_that_there_are() {
        for name in [
            ChannelName::channel_lifecycle(),
            ChannelName::connection_lifecycle(),
        ] {
            assert_eq!(ChannelName::parse(name.as_str()).as_ref(), Ok(&name));
            assert!(
                name.metachannel()
                    .is_some_and(|name| name.ends_with(".lifecycle"))
            );
        }
        assert_eq!(ChannelName::parse("meta").unwrap().metachannel(), None);
    }

    #[test]
    fn a_namespace_ends_at_the_first_colon() {
        assert_eq!(ChannelName::parse("ns:a:b").unwrap().namespace(), "ns");
        assert_eq!(ChannelName::parse("plain").unwrap().namespace(), "plain");
    }
}
