//! A shard's derived state as bytes: in full for this replica's restart, as an outline for its peers.

use std::sync::Arc;

use bytes::Bytes;
use prost::Message as _;

use crate::channel::archive::{Archive, Archived, Place};
use crate::channel::held::{Held, UINT48_MAX};
use crate::channel::index::{Aged, Cold, Front, Index, channel_id};
use crate::channel::ledger::{Counts, Live};
use crate::channel::presence::{self, Attendant, MemberKey, Presence};
use crate::channel::shard::{Late, Options, Shard, SourceState};
use crate::types::{ChannelKey, ChannelName};
use crate::wire::checkpoint as wire;

/// Bytes that are no checkpoint for this build or this node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCheckpoint {
    #[error("checkpoint has version {0}; this build reads {max}", max = wire::VERSION)]
    OtherVersion(u32),
    #[error("checkpoint cannot be decoded: {0}")]
    Undecodable(String),
    /// An outline still serves, with the log above its horizon.
    #[error("checkpoint relies on mark {needed} of the archive, which is at {found}")]
    ArchiveBehind { needed: u64, found: u64 },
    #[error("the archive cannot be cleared: {0}")]
    Archive(String),
}

impl Shard {
    /// The whole state as bytes, but for what lies in the archive: that must be sealed before these bytes count.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let channels = self.channels.iter();
        let channels = channels.map(|(key, index)| wire::Channel {
            records: (index.records.iter_from(0))
                .map(|held| record_out(&index.full(held)))
                .collect(),
            archived: index.cold.as_ref().map(|cold| cold_out(index, cold)),
            ..outline(key, index)
        });
        let shard = wire::Shard {
            channels: channels.collect(),
            applied: self.applied,
            decided: if self.is_rebuilding() {
                self.decided
            } else {
                0
            },
            archive: self.archive_out(),
            ..self.meta()
        };
        shard.encode_to_vec().into()
    }

    /// The state without its records, which the entries above the horizon bring back: what goes to peers.
    #[must_use]
    pub fn outline(&self) -> Bytes {
        let channels = self.channels.iter();
        let decided = self.decided();
        let shard = wire::Shard {
            channels: channels.map(|(key, index)| outline(key, index)).collect(),
            applied: self.horizon,
            decided: if decided > self.horizon { decided } else { 0 },
            ..self.meta()
        };
        shard.encode_to_vec().into()
    }

    /// The state that `encode` gave, over the same archive as it was then or later.
    ///
    /// # Errors
    /// When the bytes are damaged or of another version; when the archive lacks what the state relies on.
    pub fn decode(
        bytes: Bytes,
        options: Options,
        archive: Arc<dyn Archive>,
    ) -> Result<Self, InvalidCheckpoint> {
        let wire = parse(bytes)?;
        let found = archive.mark();
        let needed = wire.archive.as_ref().map_or(0, |archive| archive.mark);
        if found < needed {
            return Err(InvalidCheckpoint::ArchiveBehind { needed, found });
        }
        let relies = wire.archive.is_some();
        let shard = Self::restore(wire, options, archive.clone(), true)?;
        if !relies {
            // What lies there was put by a state that came to nothing. A state that is being rebuilt would count it.
            (archive.clear()).map_err(|err| InvalidCheckpoint::Archive(err.to_string()))?;
        }
        Ok(shard)
    }

    /// The state that any checkpoint describes, as of its horizon: its records come back from the log. Clears the
    /// archive.
    ///
    /// # Errors
    /// When the bytes are damaged or of another version, or the archive fails.
    pub fn decode_outline(
        bytes: Bytes,
        options: Options,
        archive: Arc<dyn Archive>,
    ) -> Result<Self, InvalidCheckpoint> {
        let mut wire = parse(bytes)?;
        wire.decided = wire.decided.max(wire.applied);
        wire.applied = wire.horizon;
        wire.archive = None;
        let shard = Self::restore(wire, options, archive.clone(), false)?;
        // Last, so that bytes that are no checkpoint do no harm.
        (archive.clear()).map_err(|err| InvalidCheckpoint::Archive(err.to_string()))?;
        Ok(shard)
    }

    fn meta(&self) -> wire::Shard {
        let sources = self.sources.iter().map(|(key, state)| wire::Source {
            bridge: key.0.clone(),
            topic: key.1.clone(),
            partition: key.2,
            offset: state.offset,
            epoch: state.epoch,
        });
        let dropped = self.dropped.iter().map(|(index, position)| wire::Place {
            index: *index,
            position: u32::from(*position),
        });
        let late = self.late.iter().map(|late| wire::Late {
            from: late.from,
            through: late.through,
            stamp_ms: late.stamp_ms,
        });
        wire::Shard {
            version: wire::VERSION,
            incarnation: u32::from(self.incarnation),
            stamp_ms: self.clock_ms,
            sources: sources.collect(),
            dropped: dropped.collect(),
            late: late.collect(),
            forgotten: self.forgotten.map(place_out),
            horizon: self.horizon,
            ..Default::default()
        }
    }

    /// What the archived records add up to: the whole without what memory holds.
    fn archive_out(&self) -> Option<wire::Archive> {
        if self.ledger.archived == 0 {
            return None;
        }
        let mut rest = self.ledger.clone();
        for index in self.channels.values() {
            for held in index.records.iter_from(0) {
                rest.remove(index.hash, &index.full(held));
            }
        }
        while rest.live.counts.pop_back_if(|count| *count == 0).is_some() {}
        Some(wire::Archive {
            mark: self.mark,
            bytes: rest.bytes,
            digest: rest.digest,
            live_from: rest.live.from,
            live: rest.live.counts.into(),
        })
    }

    fn restore(
        wire: wire::Shard,
        options: Options,
        archive: Arc<dyn Archive>,
        with_records: bool,
    ) -> Result<Self, InvalidCheckpoint> {
        let incarnation =
            u16::try_from(wire.incarnation).map_err(|_| undecodable("incarnation"))?;
        let mut shard = Self::new(incarnation, options, archive);
        shard.clock_ms = wire.stamp_ms;
        shard.applied = wire.applied;
        shard.decided = wire.decided;
        shard.horizon = wire.horizon;
        shard.forgotten = wire.forgotten.map(place_in).transpose()?;
        for place in wire.dropped {
            let place = place_in(place)?;
            shard.dropped.insert((place.index, place.position));
        }
        shard.late = (wire.late.into_iter())
            .map(|late| Late {
                from: late.from,
                through: late.through,
                stamp_ms: late.stamp_ms,
            })
            .collect();
        for source in wire.sources {
            let key = (source.bridge, source.topic, source.partition);
            let (epoch, offset) = (source.epoch, source.offset);
            shard.sources.insert(key, SourceState { epoch, offset });
        }
        if let Some(archived) = wire.archive {
            shard.mark = archived.mark;
            shard.ledger.bytes = archived.bytes;
            shard.ledger.digest = archived.digest;
            shard.ledger.live = live_in(archived.live_from, archived.live)?;
        }
        for channel in wire.channels {
            shard.restore_channel(channel, with_records)?;
        }
        if !shard.is_rebuilding() {
            shard.derive();
        }
        Ok(shard)
    }

    fn restore_channel(
        &mut self,
        channel: wire::Channel,
        with_records: bool,
    ) -> Result<(), InvalidCheckpoint> {
        let key = ChannelKey {
            app: channel.app.parse().map_err(|_| undecodable("app"))?,
            name: ChannelName::parse(&channel.name).map_err(|_| undecodable("channel"))?,
        };
        let mut index = Index::new(&key, channel.floor.map(place_in).transpose()?);
        index.head = channel.head.map(place_in).transpose()?;
        index.forget_ms = channel.forget_ms;
        index.retention_bytes = channel.retention_bytes;
        index.last_only = channel.last_only;
        index.aged = channel.aged.map(aged_in).transpose()?.map(Box::new);
        index.presence = (channel.presence.map(presence_in).transpose()?).map(Box::new);
        for (connection_id, attendance) in index.presence.iter().flat_map(|it| it.attendances()) {
            let of_node = self.attending.entry(attendance.by).or_default();
            of_node.insert((key.clone(), connection_id.clone()));
        }
        if let Some(archived) = channel.archived.filter(|_| with_records)
            && self.restore_archived(&key, &mut index, archived)?
        {
            self.moved_cold.insert(key.clone());
        }
        for record in channel.records.into_iter().filter(|_| with_records) {
            let record = record_in(record)?;
            let newest = index.newest().max(index.floor);
            if Some(record.first) <= newest || Some(record.first) > index.head {
                return Err(undecodable("order of records"));
            }
            self.ledger.in_memory += 1;
            self.ledger.add(index.hash, &record);
            index.insert(&record);
        }
        self.channels_digest = self.channels_digest.wrapping_add(index.digest());
        self.channels.insert(key, index);
        Ok(())
    }

    /// Whether some of the channel's archived records were moved.
    fn restore_archived(
        &mut self,
        key: &ChannelKey,
        index: &mut Index,
        archived: wire::Archived,
    ) -> Result<bool, InvalidCheckpoint> {
        let front = archived.front.ok_or_else(|| undecodable("archived"))?;
        let through = place_in(archived.through.ok_or_else(|| undecodable("archived"))?)?;
        let counts = Counts {
            ephemeral: archived.ephemeral,
            presence: archived.presence,
            ephemeral_presence: archived.ephemeral_presence,
        };
        index.counts = counts;
        index.cold = Some(Box::new(Cold {
            id: channel_id(key),
            through,
            count: archived.count,
            counts,
            front: Front {
                first: place_in(front.place.ok_or_else(|| undecodable("archived"))?)?,
                stamp_ms: front.stamp_ms,
                retention_s: front.retention_s,
            },
        }));
        let count = usize::try_from(archived.count).map_err(|_| undecodable("archived"))?;
        self.ledger.archived += count;
        let moves = !archived.moved.is_empty();
        for step in archived.moved {
            let (Some(first), Some(now)) = (step.first, step.now) else {
                return Err(undecodable("move"));
            };
            let moved = index.moved.get_or_insert_default();
            moved.insert(place_in(first)?, place_in(now)?);
        }
        Ok(moves)
    }
}

fn parse(bytes: Bytes) -> Result<wire::Shard, InvalidCheckpoint> {
    let wire = wire::Shard::decode(bytes).map_err(|err| undecodable(&err.to_string()))?;
    if wire.version != wire::VERSION {
        return Err(InvalidCheckpoint::OtherVersion(wire.version));
    }
    Ok(wire)
}

fn undecodable(what: &str) -> InvalidCheckpoint {
    InvalidCheckpoint::Undecodable(what.to_owned())
}

/// A channel without its records.
fn outline(key: &ChannelKey, index: &Index) -> wire::Channel {
    wire::Channel {
        app: key.app.to_string(),
        name: key.name.to_string(),
        head: index.head.map(place_out),
        floor: index.floor.map(place_out),
        forget_ms: index.forget_ms,
        retention_bytes: index.retention_bytes,
        last_only: index.last_only,
        aged: index.aged.as_ref().map(|aged| wire::Aged {
            through: aged.through.map(place_out),
            bytes: aged.bytes,
            next_ms: aged.next_ms,
        }),
        presence: index.presence.as_deref().map(presence_out),
        ..Default::default()
    }
}

fn cold_out(index: &Index, cold: &Cold) -> wire::Archived {
    let moved = index.moved.iter();
    let moved = moved.flat_map(|moved| moved.range(..=cold.through));
    let moved = moved.map(|(first, now)| wire::Move {
        first: Some(place_out(*first)),
        now: Some(place_out(*now)),
    });
    wire::Archived {
        through: Some(place_out(cold.through)),
        count: cold.count,
        ephemeral: cold.counts.ephemeral,
        presence: cold.counts.presence,
        ephemeral_presence: cold.counts.ephemeral_presence,
        front: Some(wire::Record {
            place: Some(place_out(cold.front.first)),
            stamp_ms: cold.front.stamp_ms,
            retention_s: cold.front.retention_s,
            ..Default::default()
        }),
        moved: moved.collect(),
    }
}

fn presence_out(presence: &Presence) -> wire::Presence {
    let members = presence.members().iter().map(|(key, held)| wire::Member {
        connection_id: key.connection_id.clone(),
        client_id: key.client_id.clone(),
        place: Some(place_out(held.place)),
        stamp_ms: held.stamp_ms,
        id: held.id.clone(),
        offset: held.offset,
        event: held.event.clone(),
    });
    let attendances = (presence.attendances().iter()).map(|(connection_id, attendance)| {
        let Attendant { node, boot } = attendance.by;
        wire::Attendance {
            connection_id: connection_id.clone(),
            node,
            boot,
        }
    });
    wire::Presence {
        message: presence.message.map(place_out),
        members: members.collect(),
        attendances: attendances.collect(),
    }
}

fn presence_in(wire: wire::Presence) -> Result<Presence, InvalidCheckpoint> {
    let mut presence = Presence::new(wire.message.map(place_in).transpose()?);
    for member in wire.members {
        let key = MemberKey {
            client_id: member.client_id,
            connection_id: member.connection_id,
        };
        let held = presence::Held {
            // A slice would keep the whole checkpoint in memory.
            event: Bytes::copy_from_slice(&member.event),
            id: member.id,
            offset: member.offset,
            place: place_in(member.place.ok_or_else(|| undecodable("member"))?)?,
            stamp_ms: member.stamp_ms,
        };
        presence.restore(key, held);
    }
    if wire.attendances.len() != presence.attendances().len() {
        return Err(undecodable("attendances"));
    }
    for attendance in wire.attendances {
        let (node, boot) = (attendance.node, attendance.boot);
        let restored =
            presence.restore_attendance(&attendance.connection_id, Attendant { node, boot });
        restored.ok_or_else(|| undecodable("attendance"))?;
    }
    Ok(presence)
}

fn aged_in(aged: wire::Aged) -> Result<Aged, InvalidCheckpoint> {
    Ok(Aged {
        through: aged.through.map(place_in).transpose()?,
        bytes: aged.bytes,
        next_ms: aged.next_ms,
    })
}

fn live_in(from: u64, counts: Vec<u32>) -> Result<Live, InvalidCheckpoint> {
    if counts.first() == Some(&0) || from.checked_add(counts.len() as u64).is_none() {
        return Err(undecodable("live records"));
    }
    let counts = counts.into();
    Ok(Live { from, counts })
}

fn place_out(place: Place) -> wire::Place {
    wire::Place {
        index: place.index,
        position: u32::from(place.position),
    }
}

fn place_in(place: wire::Place) -> Result<Place, InvalidCheckpoint> {
    let position = u16::try_from(place.position).map_err(|_| undecodable("position"))?;
    let index = place.index;
    if index > UINT48_MAX {
        return Err(undecodable("index"));
    }
    Ok(Place { index, position })
}

pub(super) fn record_out(record: &Archived) -> wire::Record {
    wire::Record {
        place: Some(place_out(record.first)),
        stamp_ms: record.stamp_ms,
        count: u32::from(record.count),
        key: record.key.to_vec().into(),
        retention_s: record.retention_s,
        bytes: record.bytes,
        ephemeral: record.ephemeral,
        presence: record.presence,
        now: (record.now != record.first).then(|| place_out(record.now)),
    }
}

fn record_in(record: wire::Record) -> Result<Archived, InvalidCheckpoint> {
    let first = place_in(record.place.ok_or_else(|| undecodable("record"))?)?;
    let record = Archived {
        first,
        now: record.now.map_or(Ok(first), place_in)?,
        stamp_ms: record.stamp_ms,
        retention_s: record.retention_s,
        bytes: record.bytes,
        count: u16::try_from(record.count).map_err(|_| undecodable("count"))?,
        ephemeral: record.ephemeral,
        presence: record.presence,
        key: (record.key.as_ref().try_into()).map_err(|_| undecodable("key"))?,
    };
    // What was not packed once cannot be packed.
    match record.stamp_ms <= UINT48_MAX && Held::new(&record).record(record.now) == record {
        true => Ok(record),
        false => Err(undecodable("record")),
    }
}
