//! A shard's derived state as bytes: what a snapshot carries.

use bytes::Bytes;
use prost::Message as _;

use crate::channel::index::{Held, Index};
use crate::channel::shard::{Shard, SourceState};
use crate::types::{ChannelKey, ChannelName, Serial};
use crate::wire::checkpoint as wire;

/// Bytes that are not a checkpoint this build reads.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCheckpoint {
    #[error("checkpoint has version {0}; this build reads up to {max}", max = wire::VERSION)]
    NewerVersion(u32),
    #[error("checkpoint cannot be decoded: {0}")]
    Undecodable(String),
}

impl Shard {
    /// The state as bytes. Equal states give equal bytes.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let channels = self.channels.iter().map(|(key, index)| wire::Channel {
            app: key.app.to_string(),
            name: key.name.to_string(),
            head: index.head.map(place),
            floor: index.floor.map(place),
            records: index.records.iter().map(record).collect(),
            forget_ms: index.forget_ms,
        });
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
        let shard = wire::Shard {
            version: wire::VERSION,
            incarnation: u32::from(self.incarnation),
            stamp_ms: self.clock_ms,
            channels: channels.collect(),
            sources: sources.collect(),
            dropped: dropped.collect(),
            forgotten: self.forgotten.map(place),
            applied: self.applied,
        };
        shard.encode_to_vec().into()
    }

    /// # Errors
    /// When the bytes are damaged or written by a newer build.
    pub fn decode(bytes: Bytes) -> Result<Self, InvalidCheckpoint> {
        let undecodable = |what: &str| InvalidCheckpoint::Undecodable(what.to_owned());
        let wire = wire::Shard::decode(bytes).map_err(|err| undecodable(&err.to_string()))?;
        if wire.version > wire::VERSION {
            return Err(InvalidCheckpoint::NewerVersion(wire.version));
        }
        let incarnation =
            u16::try_from(wire.incarnation).map_err(|_| undecodable("incarnation"))?;
        let serial = |place: wire::Place| {
            let position = u16::try_from(place.position).map_err(|_| undecodable("position"))?;
            let index = place.index;
            Ok(Serial {
                incarnation,
                index,
                position,
            })
        };
        let mut shard = Self::new(incarnation);
        shard.clock_ms = wire.stamp_ms;
        shard.applied = wire.applied;
        shard.forgotten = wire.forgotten.map(serial).transpose()?;
        for place in wire.dropped {
            let serial = serial(place)?;
            shard.dropped.insert((serial.index, serial.position));
        }
        for source in wire.sources {
            let key = (source.bridge, source.topic, source.partition);
            let (epoch, offset) = (source.epoch, source.offset);
            shard.sources.insert(key, SourceState { epoch, offset });
        }
        for channel in wire.channels {
            let key = ChannelKey {
                app: channel.app.parse().map_err(|_| undecodable("app"))?,
                name: ChannelName::parse(&channel.name).map_err(|_| undecodable("channel"))?,
            };
            let mut index = Index::default();
            for record in channel.records {
                let place = record.place.ok_or_else(|| undecodable("record"))?;
                index.push(Held {
                    serial: serial(place)?,
                    stamp_ms: record.stamp_ms,
                    expires_ms: record.expires_ms,
                    count: record.count,
                    key: (record.key.as_ref().try_into()).map_err(|_| undecodable("key"))?,
                });
            }
            index.head = channel.head.map(serial).transpose()?;
            index.floor = channel.floor.map(serial).transpose()?;
            index.forget_ms = channel.forget_ms;
            shard.timers.insert((index.next_change_ms(), key.clone()));
            shard.channels.insert(key, index);
        }
        Ok(shard)
    }
}

fn place(serial: Serial) -> wire::Place {
    wire::Place {
        index: serial.index,
        position: u32::from(serial.position),
    }
}

fn record(held: &Held) -> wire::Record {
    wire::Record {
        place: Some(place(held.serial)),
        stamp_ms: held.stamp_ms,
        expires_ms: held.expires_ms,
        count: held.count,
        key: held.key.to_vec().into(),
    }
}
