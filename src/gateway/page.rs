//! Pages: what of a list one answer holds, and the links to the rest of it (§3.1).

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::types::{ErrorCode, ErrorInfo};

/// Items of a page that is not asked to be shorter or longer.
pub(super) const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 1000;

/// What stands in a link's query as it is. Client libraries split links at commas and take them apart at `&` and `=`.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b':');

/// One page, and how to ask for others.
#[derive(Debug)]
pub(super) struct Page<T> {
    pub(super) items: Vec<T>,
    /// Values of `Link` headers, of which each stands alone.
    pub(super) links: Vec<String>,
}

/// The links of a page: `query` is what was asked for, without a cursor; `current` the cursor of this page, if it is not the
/// first, and `next` that of the one after, if there is one. `segment` is the last of the path: all that client libraries
/// look at.
pub(super) fn links(
    segment: &str,
    query: &[(&str, String)],
    current: Option<String>,
    next: Option<String>,
) -> Vec<String> {
    let link = |rel: &str, cursor: Option<String>| {
        let cursor = cursor.map(|cursor| ("cursor", cursor));
        let pairs = query.iter().chain(&cursor);
        let pairs =
            pairs.map(|(name, value)| format!("{name}={}", utf8_percent_encode(value, ESCAPED)));
        let query = pairs.collect::<Vec<_>>().join("&");
        format!("<./{segment}?{query}>; rel=\"{rel}\"")
    };
    let mut links = vec![link("first", None), link("current", current)];
    links.extend(next.map(|next| link("next", Some(next))));
    links
}

/// The value of `limit`.
///
/// # Errors
/// `InvalidParameter` when it is not a number from 1 to 1000.
pub(super) fn limit(text: &str) -> Result<usize, ErrorInfo> {
    let limit = text.parse().ok().filter(|n| (1..=LIMIT_MAX).contains(n));
    limit.ok_or_else(|| invalid("limit", text))
}

pub(super) fn invalid(name: &str, value: &str) -> ErrorInfo {
    let value: String = value.chars().take(64).collect();
    let what = format!("`{name}` cannot be `{}`", value.escape_debug());
    ErrorInfo::new(ErrorCode::InvalidParameter, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::rest::pairs;

    #[test]
    fn links_have_the_form_that_client_libraries_parse() {
        let query = [
            ("limit", "2".to_owned()),
            ("clientId", "a,b&c=d>e ü".to_owned()),
        ];
        let links = links("presence", &query, None, Some("x:y".into()));
        assert_eq!(links.len(), 3);
        for (link, rel) in links.iter().zip(["first", "current", "next"]) {
            let (target, rest) = link.split_once(">; ").unwrap();
            assert_eq!(rest, format!("rel=\"{rel}\""));
            assert!(!target.contains(','), "{target}");
            let read = pairs(target.strip_prefix("<./presence?"));
            assert_eq!(read[1], ("clientId".into(), "a,b&c=d>e ü".into()));
            assert_eq!(read.get(2).is_some(), rel == "next");
        }
    }

    #[test]
    fn limits_are_from_one_to_a_thousand() {
        assert_eq!(limit("1").unwrap(), 1);
        assert_eq!(limit("1000").unwrap(), 1000);
        for bad in ["", "0", "-1", "0x", "1001", "1.5"] {
            assert_eq!(
                limit(bad).unwrap_err().code,
                ErrorCode::InvalidParameter,
                "{bad}"
            );
        }
    }
}
