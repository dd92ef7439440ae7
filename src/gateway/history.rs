//! Pages of a channel's history: of its messages, or of its presence events.

use crate::broker::Broker;
use crate::gateway::page::{self, Page, invalid};
use crate::types::{ChannelKey, ErrorCode, ErrorInfo, Kinds, MessageSerial, Range, Serial};
use crate::wire::ably::{Message, PresenceMessage};
use crate::wire::body::{BodyError, decode_presence, record_messages};
use crate::wire::entry;

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

/// The items of a record, given with its serial and stamp.
type Read<T> = fn(Serial, &entry::Publish, u64) -> Result<Vec<T>, BodyError>;

impl Query {
    /// From the pairs of a request's query; unknown ones are ignored.
    ///
    /// # Errors
    /// `InvalidParameter`, naming the one that is wrong.
    pub(super) fn parse(pairs: &[(String, String)]) -> Result<Self, ErrorInfo> {
        let mut query = Self {
            limit: page::LIMIT_DEFAULT,
            forwards: false,
            start_ms: 0,
            end_ms: u64::MAX,
            until: None,
            cursor: None,
        };
        for (name, value) in pairs {
            let invalid = || invalid(name, value);
            match name.as_str() {
                "limit" => query.limit = page::limit(value)?,
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
                "cursor" => query.cursor = Some(message_serial(value).ok_or_else(invalid)?),
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

    /// The page of messages that the query asks for.
    ///
    /// # Errors
    /// `AttachPointGone` when it is to end where an attachment began and what came after that is not all retained; else when
    /// the broker cannot answer.
    pub(super) async fn messages(
        &self,
        broker: &Broker,
        key: &ChannelKey,
    ) -> Result<Page<Message>, ErrorInfo> {
        let read: Read<Message> = record_messages;
        self.page(broker, key, Kinds::Messages, read).await
    }

    /// The same of presence events.
    ///
    /// # Errors
    /// As [`Self::messages`].
    pub(super) async fn presence(
        &self,
        broker: &Broker,
        key: &ChannelKey,
    ) -> Result<Page<PresenceMessage>, ErrorInfo> {
        let read: Read<PresenceMessage> = |_, publish, stamp_ms| decode_presence(publish, stamp_ms);
        self.page(broker, key, Kinds::Presence, read).await
    }

    async fn page<T>(
        &self,
        broker: &Broker,
        key: &ChannelKey,
        kinds: Kinds,
        read: Read<T>,
    ) -> Result<Page<T>, ErrorInfo> {
        // The cursor's own record may be spent, and one item more tells whether there is a next page.
        let range = self.range();
        let asked = broker.history(key, &range, kinds, self.limit + 2);
        let (records, cut) = asked.await?;
        if let (Some(until), None) = (self.until, self.cursor)
            && !broker.reaches_back_to(key, until)?
        {
            return Err(ErrorCode::AttachPointGone.into());
        }
        let mut items: Vec<(MessageSerial, T)> = Vec::new();
        for record in records {
            let serial = record.at.serial;
            let found = read(serial, &record.publish, record.at.stamp_ms)?;
            let found = (0..).zip(found);
            let found = found.map(|(offset, item)| (serial.message(offset), item));
            let mut found: Vec<_> = found.filter(|(at, _)| self.is_wanted(*at)).collect();
            if !self.forwards {
                found.reverse();
            }
            items.extend(found);
            if items.len() > self.limit {
                break;
            }
        }
        let more = items.len() > self.limit || cut;
        items.truncate(self.limit);
        let last = items.last().map(|(serial, _)| *serial).filter(|_| more);
        Ok(Page {
            links: self.links(kinds, last),
            items: items.into_iter().map(|(_, item)| item).collect(),
        })
    }

    fn links(&self, kinds: Kinds, last: Option<MessageSerial>) -> Vec<String> {
        let direction = if self.forwards {
            "forwards"
        } else {
            "backwards"
        };
        let mut query = vec![
            ("limit", self.limit.to_string()),
            ("direction", direction.to_owned()),
        ];
        if self.start_ms > 0 {
            query.push(("start", self.start_ms.to_string()));
        }
        if self.end_ms < u64::MAX {
            query.push(("end", self.end_ms.to_string()));
        }
        query.extend(self.until.map(|until| ("from_serial", until.to_string())));
        let segment = match kinds {
            Kinds::Presence => "history",
            Kinds::Messages | Kinds::Both => "messages",
        };
        let cursor = |serial: MessageSerial| serial.to_string();
        page::links(segment, &query, self.cursor.map(cursor), last.map(cursor))
    }
}

/// The message with this serial.
///
/// # Errors
/// `NotFound` when there is none, or it is no longer retained.
pub(super) async fn message(
    broker: &Broker,
    key: &ChannelKey,
    serial: &str,
) -> Result<Message, ErrorInfo> {
    let none = || ErrorInfo::new(ErrorCode::NotFound, "no such message is retained");
    let serial = message_serial(serial).ok_or_else(none)?;
    let range = Range {
        from: Some(serial.record),
        to: Some(serial.record),
        ..Range::ALL
    };
    let (records, _) = broker.history(key, &range, Kinds::Messages, 1).await?;
    let record = records.first().ok_or_else(none)?;
    let messages = record_messages(record.at.serial, &record.publish, record.at.stamp_ms)?;
    let found = messages.into_iter().nth(usize::from(serial.offset));
    found.ok_or_else(none)
}

/// A message's serial has exactly one text.
fn message_serial(text: &str) -> Option<MessageSerial> {
    let (record, offset) = text.split_once(':')?;
    let serial = MessageSerial {
        record: record.parse().ok()?,
        offset: offset.parse().ok()?,
    };
    (serial.to_string() == text).then_some(serial)
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
    fn a_serial_has_one_text() {
        let serial = Serial::default().message(7);
        assert_eq!(message_serial(&serial.to_string()), Some(serial));
        for bad in [
            "",
            "1",
            "x:1",
            &format!("{}:7", Serial::default()),
            &format!("{}:+07", Serial::default()),
        ] {
            assert_eq!(message_serial(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_page_until_an_attachment_goes_backwards_from_it() {
        let serial = Serial {
            index: 9,
            ..Serial::default()
        };
        for name in ["from_serial", "fromSerial"] {
            let query = parse(&[(name, &serial.to_string())]).unwrap();
            assert_eq!(query.range().to, Some(serial));
            let forwards = [(name, &*serial.to_string()), ("direction", "forwards")];
            assert_eq!(
                parse(&forwards).unwrap_err().code,
                ErrorCode::InvalidParameter
            );
        }
    }

    #[test]
    fn a_link_leads_to_the_same_query_further_on() {
        let query = parse(&[("limit", "5"), ("end", "77"), ("direction", "forwards")]).unwrap();
        let last = Serial::default().message(3);
        let links = query.links(Kinds::Messages, Some(last));
        assert!(query.links(Kinds::Presence, None)[0].starts_with("<./history?"));
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
