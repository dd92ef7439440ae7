//! Reading a shard's channels: their records, over both tiers, and who is present.

use std::io;

use crate::channel::archive::{Archive, Archived, Place};
use crate::channel::held::Held;
use crate::channel::index::{Index, PAGE};
use crate::channel::presence::{self, Attendant, Attended, Member};
use crate::channel::shard::Shard;
use crate::types::{ChannelKey, Kinds, Range, Serial};

/// Where one retained record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordRef {
    pub serial: Serial,
    /// Where its payload lies now: the serial's place unless it was moved.
    pub place: Place,
    /// Serial of the record before it in the channel, retained or not; a reader that holds it has no gap.
    pub predecessor: Option<Serial>,
    /// Milliseconds since 1970, by the proposer's clock, never less than an earlier record's.
    pub stamp_ms: u64,
    /// Messages in the record, or presence events.
    pub count: u32,
    /// It holds presence events, not messages.
    pub presence: bool,
}

impl RecordRef {
    pub(super) fn new(record: &Archived, predecessor: Option<Place>, incarnation: u16) -> Self {
        Self {
            serial: record.first.serial(incarnation),
            place: record.now,
            predecessor: predecessor.map(|place| place.serial(incarnation)),
            stamp_ms: record.stamp_ms,
            count: u32::from(record.count),
            presence: record.presence,
        }
    }
}

/// The reader's cursor lies before the oldest record that can still be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("records up to {floor} are no longer retained")]
pub struct Behind {
    /// Newest record that is gone.
    pub floor: Serial,
}

/// Why a channel cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Behind(#[from] Behind),
    /// The shard has its records only in part as yet: what it showed could have gaps. Another replica has them.
    #[error("the shard's records are being rebuilt from the log")]
    Rebuilding,
    #[error("the index of older records cannot be read: {0}")]
    Archive(String),
}

impl From<io::Error> for ReadError {
    fn from(err: io::Error) -> Self {
        Self::Archive(err.to_string())
    }
}

impl Shard {
    /// Up to `limit` records after `cursor`, oldest first.
    ///
    /// # Errors
    /// When records after `cursor` are gone, or may be; when the shard is being rebuilt; when the archive fails.
    pub fn after(
        &self,
        key: &ChannelKey,
        cursor: Serial,
        limit: usize,
    ) -> Result<Vec<RecordRef>, ReadError> {
        if self.is_rebuilding() {
            return Err(ReadError::Rebuilding);
        }
        if cursor.incarnation != self.incarnation {
            return Err(Behind { floor: self.now() }.into());
        }
        match (self.channels.get(key), self.forgotten) {
            (Some(index), _) => self.view(index).after(cursor, limit),
            (None, Some(floor)) if Place::of(cursor) < floor => {
                let floor = floor.serial(self.incarnation);
                Err(Behind { floor }.into())
            }
            (None, _) => Ok(Vec::new()),
        }
    }

    /// Up to `limit` of the channel's retained records of these kinds within `range`, but for ephemeral ones.
    ///
    /// # Errors
    /// When the shard is being rebuilt; when the archive fails.
    pub fn range(
        &self,
        key: &ChannelKey,
        range: &Range,
        kinds: Kinds,
        limit: usize,
    ) -> Result<Vec<RecordRef>, ReadError> {
        if self.is_rebuilding() {
            return Err(ReadError::Rebuilding);
        }
        let index = self.channels.get(key);
        index.map_or_else(
            || Ok(Vec::new()),
            |index| self.view(index).range(range, kinds, limit),
        )
    }

    /// The serial after which the newest `count` of the channel's messages follow, but for ephemeral ones and those
    /// older than `since_ms`; `None` when there are none.
    ///
    /// # Errors
    /// When the shard is being rebuilt; when the archive fails.
    pub fn rewind(
        &self,
        key: &ChannelKey,
        count: usize,
        since_ms: u64,
    ) -> Result<Option<Serial>, ReadError> {
        if self.is_rebuilding() {
            return Err(ReadError::Rebuilding);
        }
        let Some(index) = self.channels.get(key) else {
            return Ok(None);
        };
        let place = self.view(index).rewind(count, since_ms)?;
        Ok(place.map(|place| place.serial(self.incarnation)))
    }

    /// The channel's members, in the order of client id and connection id: as of [`Shard::decided`].
    #[must_use]
    pub fn members(&self, key: &ChannelKey) -> Vec<Member> {
        let presence = self.channels.get(key).and_then(|it| it.presence.as_ref());
        let members = presence.into_iter().flat_map(|it| it.members());
        members
            .map(|(key, held)| presence::member(key, held, self.incarnation))
            .collect()
    }

    /// Every process of a node that attends somebody here.
    pub fn attendants(&self) -> impl Iterator<Item = Attendant> {
        self.attending.keys().copied()
    }

    /// Up to `limit` connections that this process attends, with their members. Takes time for these only.
    #[must_use]
    pub fn attended(&self, by: Attendant, limit: usize) -> Vec<Attended> {
        let of_node = self.attending.get(&by).into_iter().flatten();
        let attended = of_node.take(limit);
        attended
            .map(|(key, id)| self.attended_at(key, id))
            .collect()
    }

    fn attended_at(&self, key: &ChannelKey, connection_id: &str) -> Attended {
        let presence = self.channels.get(key).and_then(|it| it.presence.as_ref());
        let members = presence.map(|it| it.of_connection(connection_id));
        let members = members.into_iter().flatten();
        Attended {
            key: key.clone(),
            connection_id: connection_id.to_owned(),
            members: members
                .map(|(key, held)| presence::member(&key, held, self.incarnation))
                .collect(),
        }
    }

    /// As [`Shard::attended`], of connections that `filter` takes.
    #[must_use]
    pub fn attended_where(
        &self,
        by: Attendant,
        filter: impl Fn(&str) -> bool,
        limit: usize,
    ) -> Vec<Attended> {
        let of_node = self.attending.get(&by).into_iter().flatten();
        let wanted = of_node.filter(|(_, connection_id)| filter(connection_id));
        let wanted = wanted.take(limit);
        wanted.map(|(key, id)| self.attended_at(key, id)).collect()
    }

    fn view<'a>(&'a self, index: &'a Index) -> View<'a> {
        View {
            index,
            archive: &*self.archive,
            incarnation: self.incarnation,
        }
    }
}

impl Index {
    /// Up to `limit` retained records with `from <= first <= to`, oldest first or newest first; fewer only when there
    /// are no more.
    pub(super) fn page(
        &self,
        archive: &dyn Archive,
        from: Place,
        to: Place,
        newest_first: bool,
        limit: usize,
    ) -> io::Result<Vec<Archived>> {
        let from = from.max(self.bottom());
        if from > to || limit == 0 {
            return Ok(Vec::new());
        }
        let start = self.records.partition_point(|held| held.first() < from);
        let end = self.records.partition_point(|held| held.first() <= to);
        let count = end.saturating_sub(start);
        let cold = self.cold.as_ref().filter(|cold| from <= cold.through);
        let cold = |limit: usize| match cold {
            Some(cold) if limit > 0 => {
                let to = to.min(cold.through);
                let page = archive.range(cold.id, from, to, newest_first, limit);
                page.map(|page| self.placed(page))
            }
            _ => Ok(Vec::new()),
        };
        let held = |limit: usize| match newest_first {
            true => self.held(self.records.iter_to(end).rev().take(count.min(limit))),
            false => self.held(self.records.iter_from(start).take(count.min(limit))),
        };
        if newest_first {
            let mut page = held(limit);
            page.extend(cold(limit - page.len())?);
            return Ok(page);
        }
        let mut page = cold(limit)?;
        page.extend(held(limit - page.len()));
        Ok(page)
    }

    fn held<'a>(&self, held: impl Iterator<Item = &'a Held>) -> Vec<Archived> {
        held.map(|held| self.full(held)).collect()
    }

    fn placed(&self, mut page: Vec<Archived>) -> Vec<Archived> {
        if self.moved.is_some() {
            for record in &mut page {
                record.now = self.place(record.first, record.now);
            }
        }
        page
    }

    /// The channel's newest record before `first`, retained or not.
    fn before(&self, archive: &dyn Archive, first: Place) -> io::Result<Option<Place>> {
        let Some(to) = first.previous() else {
            return Ok(None);
        };
        let page = self.page(archive, Place::MIN, to, true, 1)?;
        Ok(page.first().map(|record| record.first).or(self.floor))
    }

    /// The first retained record stamped `stamp_ms` or later.
    fn stamped_from(&self, archive: &dyn Archive, stamp_ms: u64) -> io::Result<Option<Place>> {
        if let Some(cold) = &self.cold {
            let page = archive.range(cold.id, self.bottom(), cold.through, true, 1)?;
            if page.first().is_some_and(|last| last.stamp_ms >= stamp_ms) {
                // Stamps grow with indexes, and an entry has one stamp: halve the indexes.
                let (mut low, mut high) = (self.bottom().index, cold.through.index);
                while low < high {
                    let middle = Place {
                        index: low.midpoint(high),
                        position: 0,
                    };
                    let from = middle.max(self.bottom());
                    let page = archive.range(cold.id, from, cold.through, false, 1)?;
                    match page.first() {
                        Some(record) if record.stamp_ms < stamp_ms => low = record.first.index + 1,
                        _ => high = middle.index,
                    }
                }
                return Ok(Some(Place {
                    index: low,
                    position: 0,
                }));
            }
        }
        let start = (self.records).partition_point(|held| held.stamp_ms() < stamp_ms);
        Ok((self.records.iter_from(start).next()).map(|held| held.first()))
    }
}

/// An index with what reading it takes.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) index: &'a Index,
    pub(super) archive: &'a dyn Archive,
    pub(super) incarnation: u16,
}

impl View<'_> {
    /// Up to `limit` records after `cursor`, oldest first.
    pub(super) fn after(&self, cursor: Serial, limit: usize) -> Result<Vec<RecordRef>, ReadError> {
        let cursor = Place::of(cursor);
        if let Some(floor) = self.index.floor.filter(|floor| cursor < *floor) {
            return Err(self.behind(floor).into());
        }
        let from = cursor.next();
        let page = self
            .index
            .page(self.archive, from, Place::MAX, false, limit)?;
        let mut before = match page.first() {
            Some(first) => self.index.before(self.archive, first.first)?,
            None => None,
        };
        let records = page.iter().map(|record| {
            let predecessor = before.replace(record.first);
            RecordRef::new(record, predecessor, self.incarnation)
        });
        Ok(records.collect())
    }

    /// The place after which the newest `count` messages follow that are part of history and not older than
    /// `since_ms`; `None` when there are none.
    pub(super) fn rewind(&self, count: usize, since_ms: u64) -> Result<Option<Place>, ReadError> {
        let lasting = (self.index.counts).lasting(self.index.len(), Kinds::Messages);
        let mut left = count.min(usize::try_from(lasting).unwrap_or(usize::MAX));
        let (mut oldest, mut to) = (None, Place::MAX);
        while left > 0 {
            let page = (self.index).page(self.archive, Place::MIN, to, true, PAGE)?;
            let fresh = page.iter().take_while(|record| record.stamp_ms >= since_ms);
            let messages = fresh.filter(|record| !record.presence && !record.ephemeral);
            for message in messages.take(left) {
                oldest = Some(message.first);
                left -= 1;
            }
            let last = page.last().filter(|last| last.stamp_ms >= since_ms);
            match last.and_then(|last| last.first.previous()) {
                Some(before) => to = before,
                None => break,
            }
        }
        Ok(oldest.and_then(Place::previous))
    }

    /// Up to `limit` records of these kinds within `range` that are part of history, from the end that it names.
    pub(super) fn range(
        &self,
        range: &Range,
        kinds: Kinds,
        limit: usize,
    ) -> Result<Vec<RecordRef>, ReadError> {
        let mut found = Vec::new();
        let lasting = self.index.counts.lasting(self.index.len(), kinds) > 0;
        let bounds = match lasting && limit > 0 {
            true => self.bounds(range)?,
            false => None,
        };
        let Some((mut from, mut to)) = bounds else {
            return Ok(found);
        };
        // Newest first, a record's predecessor is the next one met.
        let mut before: Option<Place> = None;
        let mut waiting = false;
        // Pages grow while nothing wanted is met.
        let mut size = 1;
        'pages: loop {
            let before_page = found.len();
            size = size.max(limit - before_page).min(PAGE);
            let page = (self.index).page(self.archive, from, to, range.newest_first, size)?;
            let Some(last) = page.last().map(|record| record.first) else {
                break;
            };
            if !range.newest_first && before.is_none() {
                before = self.index.before(self.archive, page[0].first)?;
            }
            for record in &page {
                let wanted = !record.ephemeral && kinds.include(record.presence);
                if range.newest_first {
                    self.link(&mut found, waiting, Some(record.first));
                    waiting = false;
                }
                if found.len() == limit {
                    break 'pages;
                }
                waiting = range.newest_first && wanted;
                if wanted {
                    found.push(RecordRef::new(record, before, self.incarnation));
                }
                if !range.newest_first {
                    before = Some(record.first);
                }
            }
            if found.len() == before_page {
                size *= 2;
            }
            let rest = match range.newest_first {
                true => last.previous().map(|to| (from, to)),
                false => Some((last.next(), to)),
            };
            match rest.filter(|_| found.len() < limit) {
                Some(rest) => (from, to) = rest,
                None => break,
            }
        }
        if waiting && let Some(last) = found.last() {
            let before = self.index.before(self.archive, Place::of(last.serial))?;
            self.link(&mut found, waiting, before);
        }
        Ok(found)
    }

    fn link(&self, found: &mut [RecordRef], waiting: bool, before: Option<Place>) {
        if waiting && let Some(last) = found.last_mut() {
            last.predecessor = before.map(|place| place.serial(self.incarnation));
        }
    }

    /// The first and last place that `range` covers; `None` when it is empty.
    fn bounds(&self, range: &Range) -> Result<Option<(Place, Place)>, ReadError> {
        let of_another = |serial: Serial| serial.incarnation.cmp(&self.incarnation);
        let mut from = self.index.bottom();
        match range.from.map(|serial| (of_another(serial), serial)) {
            Some((std::cmp::Ordering::Greater, _)) => return Ok(None),
            Some((std::cmp::Ordering::Equal, serial)) => from = from.max(Place::of(serial)),
            Some((std::cmp::Ordering::Less, _)) | None => {}
        }
        let mut to = Place::MAX;
        match range.to.map(|serial| (of_another(serial), serial)) {
            Some((std::cmp::Ordering::Less, _)) => return Ok(None),
            Some((std::cmp::Ordering::Equal, serial)) => to = Place::of(serial),
            Some((std::cmp::Ordering::Greater, _)) | None => {}
        }
        if range.start_ms > 0 {
            match self.index.stamped_from(self.archive, range.start_ms)? {
                Some(first) => from = from.max(first),
                None => return Ok(None),
            }
        }
        if range.end_ms < u64::MAX {
            let beyond = self.index.stamped_from(self.archive, range.end_ms + 1)?;
            match beyond.map(Place::previous) {
                Some(Some(last)) => to = to.min(last),
                Some(None) => return Ok(None),
                None => {}
            }
        }
        Ok((from <= to).then_some((from, to)))
    }

    const fn behind(&self, floor: Place) -> Behind {
        Behind {
            floor: floor.serial(self.incarnation),
        }
    }
}
