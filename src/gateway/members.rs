//! Pages of a channel's members.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::gateway::page::{self, Page};
use crate::types::ErrorInfo;
use crate::wire::ably::PresenceMessage;

/// Which members a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Query {
    limit: usize,
    client_id: Option<String>,
    connection_id: Option<String>,
    cursor: Option<Cursor>,
}

/// The last member of a page: client id and connection id, which members are ordered by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cursor(String, String);

impl Cursor {
    fn of(member: &PresenceMessage) -> Self {
        let text = |id: &Option<String>| id.clone().unwrap_or_default();
        Self(text(&member.client_id), text(&member.connection_id))
    }

    /// The connection id, which has no `:`, stands first.
    fn text(&self) -> String {
        URL_SAFE_NO_PAD.encode(format!("{}:{}", self.1, self.0))
    }

    fn parse(text: &str) -> Option<Self> {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
        let (connection_id, client_id) = text.split_once(':')?;
        Some(Self(client_id.to_owned(), connection_id.to_owned()))
    }
}

impl Query {
    /// From the pairs of a request's query; unknown ones are ignored.
    ///
    /// # Errors
    /// `InvalidParameter`, naming the one that is wrong.
    pub(super) fn parse(pairs: &[(String, String)]) -> Result<Self, ErrorInfo> {
        let mut query = Self {
            limit: page::LIMIT_DEFAULT,
            client_id: None,
            connection_id: None,
            cursor: None,
        };
        for (name, value) in pairs {
            match name.as_str() {
                "limit" => query.limit = page::limit(value)?,
                "clientId" => query.client_id = Some(value.clone()),
                "connectionId" => query.connection_id = Some(value.clone()),
                "cursor" => {
                    let cursor = Cursor::parse(value);
                    query.cursor = Some(cursor.ok_or_else(|| page::invalid(name, value))?);
                }
                _ => {}
            }
        }
        Ok(query)
    }

    /// The page of these members, all of a channel, in the order of client id and connection id. A member that comes or
    /// goes between two pages is on the later one or is not; every other is on exactly one.
    pub(super) fn page(&self, members: Vec<PresenceMessage>) -> Page<PresenceMessage> {
        let is = |wanted: &Option<String>, id: &Option<String>| wanted.is_none() || wanted == id;
        let mut items: Vec<_> = members
            .into_iter()
            .filter(|it| {
                is(&self.client_id, &it.client_id) && is(&self.connection_id, &it.connection_id)
            })
            .filter(|it| {
                self.cursor
                    .as_ref()
                    .is_none_or(|cursor| Cursor::of(it) > *cursor)
            })
            .take(self.limit + 1)
            .collect();
        let more = items.len() > self.limit;
        items.truncate(self.limit);
        let last = items.last().filter(|_| more).map(Cursor::of);
        let mut query = vec![("limit", self.limit.to_string())];
        query.extend(self.client_id.clone().map(|id| ("clientId", id)));
        query.extend(self.connection_id.clone().map(|id| ("connectionId", id)));
        let current = self.cursor.as_ref().map(Cursor::text);
        Page {
            links: page::links("presence", &query, current, last.map(|last| last.text())),
            items,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::rest::pairs;
    use crate::types::ErrorCode;

    fn member(client_id: &str, connection_id: &str) -> PresenceMessage {
        PresenceMessage {
            client_id: Some(client_id.into()),
            connection_id: Some(connection_id.into()),
            ..PresenceMessage::default()
        }
    }

    fn names(page: &Page<PresenceMessage>) -> Vec<String> {
        let name = |it: &PresenceMessage| {
            format!(
                "{}@{}",
                it.client_id.clone().unwrap(),
                it.connection_id.clone().unwrap()
            )
        };
        page.items.iter().map(name).collect()
    }

    fn next(page: &Page<PresenceMessage>) -> Option<Query> {
        let link = page
            .links
            .iter()
            .find(|link| link.contains("rel=\"next\""))?;
        let query = link.strip_prefix("<./presence?")?.split_once('>')?.0;
        Some(Query::parse(&pairs(Some(query))).unwrap())
    }

    #[test]
    fn pages_hold_every_member_once() {
        let all = || {
            vec![
                member("a", "1"),
                member("a", "2"),
                member("a:b", "1"),
                member("ü", "1"),
            ]
        };
        let mut seen = Vec::new();
        let mut query = Some(Query::parse(&pairs(Some("limit=1"))).unwrap());
        while let Some(asked) = query {
            let page = asked.page(all());
            seen.extend(names(&page));
            query = next(&page);
        }
        assert_eq!(seen, ["a@1", "a@2", "a:b@1", "ü@1"]);
    }

    #[test]
    fn who_goes_between_pages_takes_nobody_along() {
        let query = Query::parse(&pairs(Some("limit=2"))).unwrap();
        let first = query.page(vec![member("a", "1"), member("b", "1"), member("c", "1")]);
        let second = next(&first).unwrap().page(vec![member("c", "1")]);
        assert_eq!(names(&second), ["c@1"]);
        assert!(next(&second).is_none());
    }

    #[test]
    fn members_are_found_by_client_and_connection() {
        let all = || vec![member("a", "1"), member("a", "2"), member("b", "2")];
        let found = |query: &str| names(&Query::parse(&pairs(Some(query))).unwrap().page(all()));
        assert_eq!(found("clientId=a"), ["a@1", "a@2"]);
        assert_eq!(found("connectionId=2"), ["a@2", "b@2"]);
        assert_eq!(found("connectionId=2&clientId=b"), ["b@2"]);
        assert!(found("connectionId=nobody").is_empty());
        let page = Query::parse(&pairs(Some("clientId=a&limit=1")))
            .unwrap()
            .page(all());
        assert_eq!(names(&next(&page).unwrap().page(all())), ["a@2"]);
    }

    #[test]
    fn wrong_parameters_are_refused() {
        for bad in ["limit=0", "cursor=!", "cursor=YWI"] {
            let error = Query::parse(&pairs(Some(bad))).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidParameter, "{bad}");
        }
    }
}
