//! What can be read of a channel: its messages, its members, what became of them, and what it is at present (§3.2).

use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;

use crate::auth::Operation;
use crate::gateway::answer::{self, answer};
use crate::gateway::occupancy::Shown;
use crate::gateway::page::{self, Page};
use crate::gateway::rest::Answer;
use crate::gateway::rest::asked::Asked;
use crate::gateway::{Door, history, members};
use crate::types::{ChannelName, ErrorCode, ErrorInfo, Metrics};

pub(super) async fn history(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::History)?;
            let query = history::Query::parse(&asked.pairs)?;
            let page = query.messages(&door.broker, &key).await?;
            Ok(answer::page(asked.format, &page))
        })
        .await
}

pub(super) async fn presence_history(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::History)?;
            let query = history::Query::parse(&asked.pairs)?;
            let page = query.presence(&door.broker, &key).await?;
            Ok(answer::page(asked.format, &page))
        })
        .await
}

pub(super) async fn message(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::History)?;
            let found = history::message(&door.broker, &key, asked.segment("serial")).await?;
            Ok(answer(StatusCode::OK, asked.format, &found))
        })
        .await
}

/// A message has the one version that it was published as.
pub(super) async fn versions(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::History)?;
            let found = history::message(&door.broker, &key, asked.segment("serial")).await?;
            Ok(answer(StatusCode::OK, asked.format, &[found]))
        })
        .await
}

/// Refused: no channel's messages can be changed.
pub(super) async fn change(State(door): State<Door>, asked: Asked) -> Answer {
    use Operation::{MessageDeleteAny, MessageDeleteOwn, MessageUpdateAny, MessageUpdateOwn};
    // Which of these is needed the action says, which makes no difference here.
    let any = [
        MessageUpdateAny,
        MessageUpdateOwn,
        MessageDeleteAny,
        MessageDeleteOwn,
    ];
    refuse(&door, &asked, &any)
}

/// Refused: no channel's messages can be annotated.
pub(super) async fn annotate(State(door): State<Door>, asked: Asked) -> Answer {
    refuse(&door, &asked, &[Operation::AnnotationPublish])
}

/// Refused, likewise.
pub(super) async fn annotations(State(door): State<Door>, asked: Asked) -> Answer {
    use Operation::{AnnotationSubscribe, History, Subscribe};
    refuse(&door, &asked, &[AnnotationSubscribe, History, Subscribe])
}

/// To who may do one of these it says that nobody can, to others that they may not.
fn refuse(door: &Door, asked: &Asked, operations: &[Operation]) -> Answer {
    let admitted = |operation: &Operation| asked.admit_to(door, *operation);
    let mut refusals = operations.iter().map(admitted).map(Result::err);
    let refusal = refusals.next().flatten();
    let permitted = refusal.is_none() || refusals.any(|refusal| refusal.is_none());
    let error = refusal.filter(|_| !permitted);
    asked.finish(Err(error.unwrap_or(ErrorCode::MessagesUnchangeable.into())))
}

pub(super) async fn members(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::Subscribe)?;
            let query = members::Query::parse(&asked.pairs)?;
            let page = query.page(door.broker.members(&key).await?);
            Ok(answer::page(asked.format, &page))
        })
        .await
}

/// What a channel is at present.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Details<'a> {
    channel_id: &'a str,
    status: Status,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    is_active: bool,
    occupancy: Occupancy,
}

#[derive(Debug, Serialize)]
struct Occupancy {
    metrics: Shown,
}

impl<'a> Details<'a> {
    fn of(name: &'a ChannelName, metrics: &Metrics) -> Self {
        Self {
            channel_id: name.as_str(),
            status: Status {
                is_active: metrics.counts.connections > 0 || metrics.presence_members > 0,
                occupancy: Occupancy {
                    metrics: Shown::of(metrics),
                },
            },
        }
    }
}

pub(super) async fn details(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let (_, key) = asked.admit_to(&door, Operation::ChannelMetadata)?;
            let metrics = door.broker.metrics(&key).await?;
            let details = Details::of(&key.name, &metrics);
            Ok(answer(StatusCode::OK, asked.format, &details))
        })
        .await
}

/// Channels that somebody is attached to, in the order of their names.
pub(super) async fn list(State(door): State<Door>, asked: Asked) -> Answer {
    asked
        .respond(async {
            let identity = asked.identity(&door)?;
            if !identity
                .capability
                .allows_app_wide(Operation::ChannelMetadata)
            {
                return Err(ErrorCode::CapabilityDenied.into());
            }
            let query = Enumeration::parse(&asked.pairs)?;
            let (prefix, after) = (query.prefix.as_str(), query.cursor.as_ref());
            let found = (door.broker)
                .active_channels(&identity.app, prefix, after, query.limit + 1)
                .await?;
            let (found, links) = query.page(found);
            let page = |items| Page { items, links };
            Ok(match query.by_value {
                true => {
                    let details = found
                        .iter()
                        .map(|(name, metrics)| Details::of(name, metrics));
                    answer::page(asked.format, &page(details.map(Listed::Details).collect()))
                }
                false => {
                    let names = found.iter().map(|(name, _)| Listed::Name(name.as_str()));
                    answer::page(asked.format, &page(names.collect()))
                }
            })
        })
        .await
}

/// A channel in a list: as much of it as was asked for.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Listed<'a> {
    Name(&'a str),
    Details(Details<'a>),
}

/// Which channels a client asks for.
#[derive(Debug)]
struct Enumeration {
    limit: usize,
    prefix: String,
    by_value: bool,
    /// The last of the page before.
    cursor: Option<ChannelName>,
}

impl Enumeration {
    /// From the pairs of a request's query; unknown ones are ignored.
    ///
    /// # Errors
    /// `InvalidParameter`, naming the one that is wrong.
    fn parse(pairs: &[(String, String)]) -> Result<Self, ErrorInfo> {
        let mut query = Self {
            limit: page::LIMIT_DEFAULT,
            prefix: String::new(),
            by_value: true,
            cursor: None,
        };
        for (name, value) in pairs {
            match (name.as_str(), value.as_str()) {
                ("limit", _) => query.limit = page::limit(value)?,
                ("prefix", _) => query.prefix.clone_from(value),
                ("by", "id") => query.by_value = false,
                ("by", "value") => query.by_value = true,
                ("by", _) => return Err(page::invalid(name, value)),
                ("cursor", _) => {
                    let cursor = ChannelName::parse(value);
                    query.cursor = Some(cursor.map_err(|_| page::invalid(name, value))?);
                }
                _ => {}
            }
        }
        Ok(query)
    }

    /// Of one more than the page holds, those that it does hold, and its links.
    fn page(&self, mut found: Found) -> (Found, Vec<String>) {
        let more = found.len() > self.limit;
        found.truncate(self.limit);
        let last = found.last().filter(|_| more);
        let last = last.map(|(name, _)| name.as_str().to_owned());
        let by = if self.by_value { "value" } else { "id" };
        let mut query = vec![("limit", self.limit.to_string()), ("by", by.to_owned())];
        if !self.prefix.is_empty() {
            query.push(("prefix", self.prefix.clone()));
        }
        let current = self.cursor.as_ref().map(|name| name.as_str().to_owned());
        let links = page::links("channels", &query, current, last);
        (found, links)
    }
}

type Found = Vec<(ChannelName, Metrics)>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::rest::pairs;
    use crate::types::Counts;
    use crate::wire::ably::{Format, encode_value};

    fn metrics(subscribers: u32, presence_members: u32) -> Metrics {
        Metrics {
            counts: Counts {
                connections: subscribers,
                subscribers,
                ..Counts::default()
            },
            presence_members,
        }
    }

    #[test]
    fn a_channel_is_active_while_somebody_is_there() {
        let name = ChannelName::parse("c").unwrap();
        for (subscribers, members, active) in [(0, 0, false), (1, 0, true), (0, 1, true)] {
            let details = Details::of(&name, &metrics(subscribers, members));
            let told = encode_value(Format::Json, &details);
            let told: serde_json::Value = serde_json::from_slice(&told).unwrap();
            assert_eq!(told["channelId"], "c");
            assert_eq!(told["status"]["isActive"], active);
            let shown = &told["status"]["occupancy"]["metrics"];
            assert_eq!(
                [&shown["subscribers"], &shown["presenceMembers"]],
                [subscribers, members]
            );
        }
    }

    #[test]
    fn pages_of_channels_follow_on_each_other() {
        let all =
            ["x:a", "x:b,c", "x:c"].map(|name| (ChannelName::parse(name).unwrap(), metrics(1, 0)));
        let mut seen = Vec::new();
        let mut query = Some("limit=1&prefix=x:&by=id".to_owned());
        while let Some(text) = query {
            let asked = Enumeration::parse(&pairs(Some(&text))).unwrap();
            assert_eq!((asked.prefix.as_str(), asked.by_value), ("x:", false));
            let after =
                |name: &ChannelName| asked.cursor.as_ref().is_none_or(|cursor| name > cursor);
            let found = all
                .iter()
                .filter(|(name, _)| after(name))
                .take(2)
                .cloned()
                .collect();
            let (found, links) = asked.page(found);
            seen.extend(found.into_iter().map(|(name, _)| name.as_str().to_owned()));
            let next = links.iter().find(|link| link.contains("rel=\"next\""));
            query = next.map(|link| link.split(['?', '>']).nth(1).unwrap().to_owned());
        }
        assert_eq!(seen, ["x:a", "x:b,c", "x:c"]);
    }

    #[test]
    fn wrong_parameters_are_refused() {
        for bad in ["limit=0", "by=name", "cursor=:"] {
            let error = Enumeration::parse(&pairs(Some(bad))).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidParameter, "{bad}");
        }
    }
}
