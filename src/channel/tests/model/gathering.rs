//! Who is present, as it should be: a list that is copied, changed and looked through.

use std::collections::BTreeMap;

use proptest::prelude::*;
use prost::Message as _;

use super::{At, Expected, at};
use crate::channel::{Attendant, Member};
use crate::wire::entry;

/// One presence event of a publish.
#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) action: u32,
    client: u8,
    /// 0: the publisher's.
    connection: u8,
    data: u8,
}

pub(super) fn event() -> impl Strategy<Value = Event> {
    let action = prop_oneof![8 => 2..5_u32, 1 => Just(3), 1 => Just(1)];
    (action, 0..4_u8, 0..8_u8, any::<u8>()).prop_map(|(action, client, connection, data)| Event {
        action,
        client,
        connection,
        data,
    })
}

impl Event {
    pub(super) fn change(&self) -> entry::Change {
        let connection_id = match self.connection {
            1 => "x",
            2 => "y",
            _ => "",
        };
        entry::Change {
            action: self.action,
            // One in four has none, where it is anybody's.
            client_id: match (self.client, self.data % 4) {
                (3, 0) => String::new(),
                (client, _) => format!("client{client}"),
            },
            connection_id: connection_id.into(),
        }
    }

    pub(super) fn message(&self) -> entry::Message {
        entry::Message {
            presence_action: self.action,
            data: Some(entry::message::Data::Text(format!("data{}", self.data))),
            ..entry::Message::default()
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Present {
    event: Vec<u8>,
    id: String,
    offset: u32,
    at: At,
    stamp_ms: u64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Gathering {
    /// By client id and connection id.
    members: BTreeMap<(String, String), Present>,
    attends: BTreeMap<String, (u64, u64)>,
}

fn number(id: &str, connection: &str) -> Option<u64> {
    let (before, number) = id.split_once(':')?;
    (before == connection).then(|| number.parse().unwrap())
}

impl Gathering {
    pub(super) fn attend(&mut self, publish: &entry::Publish, asked: &entry::Presence) {
        if let Some(by) = self.attends.get_mut(&publish.connection_id)
            && !asked.if_attended
        {
            *by = (asked.node, asked.boot);
        }
    }

    pub(super) fn change(
        &mut self,
        place: At,
        stamp_ms: u64,
        publish: &entry::Publish,
        asked: &entry::Presence,
    ) -> Result<(), Expected> {
        let body = entry::Body::decode(publish.body.clone()).unwrap();
        let by = (asked.node, asked.boot);
        let (mut members, mut touched) = (self.members.clone(), Vec::new());
        let mut alone = false;
        for (offset, (change, event)) in (0..).zip(asked.changes.iter().zip(&body.messages)) {
            let connection = match change.connection_id.as_str() {
                "" => publish.connection_id.clone(),
                other => other.to_owned(),
            };
            let enters = [2, 4].contains(&change.action);
            let bad = change.client_id.is_empty() || !(enters || change.action == 3);
            if bad || (enters && asked.if_attended) {
                return Err(Expected::Invalid);
            }
            alone |= asked.if_attended && self.attends.get(&connection) != Some(&by);
            let key = (change.client_id.clone(), connection.clone());
            let known = self.members.get(&key).map(|known| known.id.as_str());
            let known = known.and_then(|known| number(known, &connection));
            let this = number(&publish.id, &publish.connection_id);
            let stale = known.zip(this).is_some_and(|(known, this)| known > this);
            if stale && publish.connection_id == connection {
                continue;
            }
            if enters {
                let new = !members.contains_key(&key);
                let present = Present {
                    event: event.encode_to_vec(),
                    id: publish.id.clone(),
                    offset,
                    at: place,
                    stamp_ms,
                };
                members.insert(key, present);
                let max = asked.members_max as usize;
                if new && max > 0 && members.len() > max {
                    return Err(Expected::Full);
                }
                touched.push(connection);
            } else if members.remove(&key).is_some() {
                touched.push(connection);
            }
        }
        if touched.is_empty() || alone {
            return Err(Expected::Unchanged);
        }
        let enters = members.values().any(|present| present.at == place);
        self.members = members;
        for connection in touched {
            if !asked.if_attended && enters {
                self.attends.insert(connection, by);
            }
        }
        let members = &self.members;
        self.attends.retain(|connection, _| {
            let mut keys = members.keys();
            keys.any(|(_, of)| of == connection)
        });
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(super) fn members(&self) -> Vec<Member> {
        let members = self.members.iter();
        let members = members.map(|((client_id, connection_id), present)| Member {
            connection_id: connection_id.clone(),
            client_id: client_id.clone(),
            event: present.event.clone().into(),
            id: present.id.clone(),
            offset: present.offset,
            serial: at(present.at.0, present.at.1),
            stamp_ms: present.stamp_ms,
        });
        members.collect()
    }

    /// Connections, each with who attends it and its members.
    pub(super) fn attended(&self) -> impl Iterator<Item = (Attendant, String, Vec<Member>)> {
        self.attends.iter().map(|(connection, (node, boot))| {
            let mut members = self.members();
            members.retain(|member| member.connection_id == *connection);
            let (node, boot) = (*node, *boot);
            (Attendant { node, boot }, connection.clone(), members)
        })
    }
}
