//! Pages of a channel's history.

use crate::broker::Broker;
use crate::types::{ChannelKey, ErrorCode, ErrorInfo, Kinds, MessageSerial, Range, Serial};
use crate::wire::ably::Message;
use crate::wire::body::record_messages;

const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 1000;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Query {
    limit: usize,
    forwards: bool,
    start_ms: u64,
    end_ms: u64,
    /// Records up to this one only: where an attachment began.
    until: Option<Serial>,
    /// The last message of the page before.
    cursor: Option<MessageSerial>,
}

/// One page, and how to ask for others.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) messages: Vec<Message>,
    /// Values of `Link` headers.
    pub(super) links: Vec<String>,
}

impl Query {
    /// From the pairs of a request's query; unknown ones are ignored.
    ///
    /// # Errors
    /// `InvalidParameter`, naming the one that is wrong.
    pub(super) fn parse(pairs: &[(String, String)]) -> Result<Self, ErrorInfo> {
        let mut query = Self {
            limit: LIMIT_DEFAULT,
            forwards: false,
            start_ms: 0,
            end_ms: u64::MAX,
            until: None,
            cursor: None,
        };
        for (name, value) in pairs {
            let invalid = || {
                let what = format!("`{name}` cannot be `{}`", value.escape_debug());
                ErrorInfo::new(ErrorCode::InvalidParameter, what)
            };
            match name.as_str() {
                "limit" => {
                    let limit = value.parse().ok().filter(|n| (1..=LIMIT_MAX).contains(n));
                    query.limit = limit.ok_or_else(invalid)?;
                }
                "direction" => {
                    query.forwards = match value.as_str() {
                        "forwards" => true,
                        "backwards" => false,
                        _ => return Err(invalid()),
                    }
                }
                "start" => query.start_ms = value.parse().map_err(|_| invalid())?,
                "end" => query.end_ms = value.parse().map_err(|_| invalid())?,
                "from_serial" | "fromSerial" => {
                    query.until = Some(value.parse().map_err(|_| invalid())?);
                }
                "cursor" => query.cursor = Some(cursor(value).ok_or_else(invalid)?),
                _ => {}
            }
        }
        match query.until.is_some() && query.forwards {
            true => Err(ErrorInfo::new(
                ErrorCode::InvalidParameter,
                "`from_serial` reads backwards only",
            )),
            false => Ok(query),
        }
    }

    fn range(&self) -> Range {
        let cursor = self.cursor.map(|cursor| cursor.record);
        let (from, to) = match self.forwards {
            true => (cursor, self.until),
            false => (None, [cursor, self.until].into_iter().flatten().min()),
        };
        Range {
            from,
            to,
            start_ms: self.start_ms,
            end_ms: self.end_ms,
            newest_first: !self.forwards,
        }
    }

    /// Whether a message lies beyond the page before.
    fn is_wanted(&self, serial: MessageSerial) -> bool {
        match (self.cursor, self.forwards) {
            (None, _) => true,
            (Some(cursor), true) => serial > cursor,
            (Some(cursor), false) => serial < cursor,
        }
    }

    /// The page that the query asks for.
    ///
    /// # Errors
    /// When the broker cannot answer.
    pub(super) async fn page(&self, broker: &Broker, key: &ChannelKey) -> Result<Page, ErrorInfo> {
        // The cursor's own record may be spent, and one message more tells whether there is a next page.
        let (records, cut) = broker
            .history(key, &self.range(), Kinds::Messages, self.limit + 2)
            .await?;
        let mut messages: Vec<(MessageSerial, Message)> = Vec::new();
        for record in records {
            let serial = record.at.serial;
            let found = record_messages(serial, &record.publish, record.at.stamp_ms)?;
            let found = (0..)
                .zip(found)
                .map(|(offset, message)| (serial.message(offset), message));
            let mut found: Vec<_> = found
                .filter(|(serial, _)| self.is_wanted(*serial))
                .collect();
            if !self.forwards {
                found.reverse();
            }
            messages.extend(found);
            if messages.len() > self.limit {
                break;
            }
        }
        let more = messages.len() > self.limit || cut;
        messages.truncate(self.limit);
        let last = messages.last().map(|(serial, _)| *serial).filter(|_| more);
        Ok(Page {
            links: self.links(last),
            messages: messages.into_iter().map(|(_, message)| message).collect(),
        })
    }

    fn links(&self, last: Option<MessageSerial>) -> Vec<String> {
        let link = |rel: &str, cursor: Option<MessageSerial>| {
            let direction = if self.forwards {
                "forwards"
            } else {
                "backwards"
            };
            let mut query = format!("limit={}&direction={direction}", self.limit);
            if self.start_ms > 0 {
                query += &format!("&start={}", self.start_ms);
            }
            if self.end_ms < u64::MAX {
                query += &format!("&end={}", self.end_ms);
            }
            if let Some(until) = self.until {
                query += &format!("&from_serial={until}");
            }
            if let Some(cursor) = cursor {
                query += &format!("&cursor={cursor}");
            }
            format!("<./messages?{query}>; rel=\"{rel}\"")
        };
        let mut links = vec![link("first", None), link("current", self.cursor)];
        links.extend(last.map(|last| link("next", Some(last))));
        links
    }
}

fn cursor(text: &str) -> Option<MessageSerial> {
    let (record, offset) = text.split_once(':')?;
    Some(MessageSerial {
        record: record.parse().ok()?,
        offset: offset.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Query, ErrorInfo> {
        let pairs: Vec<_> = pairs
            .iter()
            .map(|(a, b)| ((*a).into(), (*b).into()))
            .collect();
        Query::parse(&pairs)
    }

    #[test]
    fn wrong_parameters_are_named() {
        for (name, value) in [
            ("limit", "0"),
            ("limit", "1001"),
            ("direction", "up"),
            ("start", "x"),
            ("cursor", "1"),
        ] {
            let err = parse(&[(name, value)]).unwrap_err();
            assert_eq!(err.code, ErrorCode::InvalidParameter);
            assert!(err.message.contains(name), "{}", err.message);
        }
        assert!(parse(&[("unknown", "x"), ("limit", "1000")]).is_ok());
    }

    #[test]
    fn a_link_leads_to_the_same_query_further_on() {
        let query = parse(&[("limit", "5"), ("end", "77"), ("direction", "forwards")]).unwrap();
        let last = Serial::default().message(3);
        let links = query.links(Some(last));
        let (_, next) = links[2].split_once("<./messages?").unwrap();
        let (next, rel) = next.split_once(">; ").unwrap();
        assert_eq!(rel, "rel=\"next\"");
        let pairs: Vec<_> = next
            .split('&')
            .map(|pair| pair.split_once('=').unwrap())
            .collect();
        let again = parse(&pairs).unwrap();
        assert_eq!(
            again,
            Query {
                cursor: Some(last),
                ..query
            }
        );
    }
}
