//! Channel names as clients write them: `[?rewind=1&modes=subscribe]name` is the channel `name` with parameters (§2.5.1).

use std::collections::BTreeMap;

use percent_encoding::percent_decode_str;

use crate::types::{ChannelName, ErrorCode, ErrorInfo};

/// Longest qualifier in bytes, brackets included: attachments remember what they are called.
const QUALIFIER_BYTES_MAX: usize = 1024;

/// A channel and what its qualifier says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QualifiedName {
    pub name: ChannelName,
    /// Percent-decoded; of a repeated parameter the last.
    pub params: BTreeMap<String, String>,
}

impl QualifiedName {
    /// # Errors
    /// `InvalidChannelName` for a name that is not legal or a qualifier that is not understood.
    pub fn parse(text: &str) -> Result<Self, ErrorInfo> {
        let plain = |name| Self {
            name,
            params: BTreeMap::new(),
        };
        if let Ok(metachannel) = ChannelName::parse(text) {
            return Ok(plain(metachannel));
        }
        let Some(rest) = text.strip_prefix('[') else {
            return parse_name(text).map(plain);
        };
        let Some((qualifier, name)) = rest.split_once(']') else {
            return Err(invalid("channel qualifier has no closing bracket"));
        };
        let Some(query) = qualifier.strip_prefix('?') else {
            return Err(invalid(
                "channel qualifier is not supported; only parameters (`[?name=value]`) are",
            ));
        };
        if qualifier.len() + 2 > QUALIFIER_BYTES_MAX {
            return Err(invalid("channel qualifier is too long"));
        }
        let params = query.split('&').filter(|pair| !pair.is_empty());
        Ok(Self {
            name: parse_name(name)?,
            params: params.map(decode_pair).collect::<Result<_, _>>()?,
        })
    }
}

fn decode_pair(pair: &str) -> Result<(String, String), ErrorInfo> {
    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
    let decode = |text: &str| {
        let decoded = percent_decode_str(text).decode_utf8();
        decoded
            .map(|text| text.into_owned())
            .map_err(|_| invalid("channel qualifier is not UTF-8"))
    };
    Ok((decode(name)?, decode(value)?))
}

fn parse_name(text: &str) -> Result<ChannelName, ErrorInfo> {
    ChannelName::parse(text).map_err(|error| invalid(&error.to_string()))
}

fn invalid(what: &str) -> ErrorInfo {
    ErrorInfo::new(ErrorCode::InvalidChannelName, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qualifier_says_parameters() {
        type Row = (
            &'static str,
            &'static str,
            &'static [(&'static str, &'static str)],
        );
        let table: &[Row] = &[
            ("c", "c", &[]),
            ("a[b]", "a[b]", &[]),
            ("[meta]channel.lifecycle", "[meta]channel.lifecycle", &[]),
            ("[?]c", "c", &[]),
            ("[?rewind=1]ns:c/1", "ns:c/1", &[("rewind", "1")]),
            (
                "[?modes=publish,subscribe&rewind=2m&x&&y=%5D=]c]",
                "c]",
                &[
                    ("modes", "publish,subscribe"),
                    ("rewind", "2m"),
                    ("x", ""),
                    ("y", "]="),
                ],
            ),
        ];
        for (text, name, params) in table {
            let parsed = QualifiedName::parse(text).unwrap();
            assert_eq!(parsed.name.as_str(), *name, "{text}");
            let expected = params
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            assert_eq!(parsed.params, expected.collect(), "{text}");
        }
        let long = format!("[?{}]c", "x".repeat(1024));
        let bad = [
            "",
            "[",
            "[]",
            "[]c",
            "[?a=1",
            "[?a=1]",
            "[?a=1]:c",
            "[?a=%ff]c",
            "[meta]log",
            "[filter=eA==]c",
            "[?a][?b]c",
            &long,
        ];
        for text in bad {
            let error = QualifiedName::parse(text).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidChannelName, "{text}");
        }
    }
}
