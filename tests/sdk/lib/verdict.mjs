// Judges a recorded history (`recorder.mjs` says its shape) by promises 2, 3, 4 and 6. Pure: the same history, the
// same verdict.
//
// Texts are unique, so a text names a publish wherever it turns up. A *stretch* is what one subscriber received on one
// channel between two moments at which its SDK was told that continuity is lost; within it every record of the channel
// must come, once, in the order of serials. What the channel held is known from everybody together: histories of the
// nodes, serials in acknowledgements, and what other subscribers received.

import { judgeMembers } from './verdict-members.mjs';

const RETENTION_MS = 100_000;

/** Every fault found: `{fault, channel, client?, detail}`. The names are those of `FAULTS`. */
export function judge(events, { retentionMs = RETENTION_MS, leaveWithinMs } = {}) {
  const faults = [];
  const add = (fault, channel, client, detail) => faults.push({ fault, channel, client, detail });
  const ledgers = readLedgers(events);
  for (const [channel, ledger] of ledgers) judgeLedger(channel, ledger, add);
  for (const view of readViews(events)) judgeView(view, ledgers.get(view.channel), { retentionMs, add });
  judgePublishers(events, ledgers, add);
  judgeReads(events, ledgers, add);
  judgeMembers(events, { leaveWithinMs, add });
  return faults;
}

/** What each name of a fault means. */
export const FAULTS = {
  duplicate: 'a subscriber received one message twice in a stretch',
  gap: 'a subscriber missed a message within a stretch',
  'false-resume': 'a subscriber was told resumed, and misses something from before',
  regressed: 'serials went back',
  reordered: 'a subscriber received messages in another order than that of the log',
  disagreement: 'one serial stands for two messages',
  doubled: 'one publish has two serials, or is twice in history',
  'wrong-ack': 'an acknowledgement names another serial than the log',
  'nodes-differ': 'two nodes tell different histories',
  lost: 'acknowledged, and not there',
  'stale-read': 'a node told a history without what was acknowledged before it was asked',
  phantom: 'received on a persisted channel, and not in its history',
  torn: 'the messages of one batch are not neighbours',
  'publisher-order': 'messages of one publisher in another order than it sent, and numbered, them',
  unanswered: 'a publish was never answered',
  'needless-loss': 'continuity was denied although the log reaches back far enough',
  ghost: 'somebody is listed who is gone',
  missing: 'somebody is there and not listed',
  stale: 'a member is listed with data that it has replaced',
  'double-leave': 'a member left twice',
  'no-leave': 'a dead client’s member never left for a subscriber that had seen it',
  'late-leave': 'a dead client’s member left too late',
  'early-leave': 'a node had a member leave although its client was not away for so long',
};

/** Numbers to tell beside a verdict. */
export function summary(events) {
  const count = (wanted) => events.reduce((sum, event) => sum + (wanted(event) ? 1 : 0), 0);
  const kinds = (kind) => count((event) => event.kind === kind);
  const attached = (event) => event.kind === 'channel' && (event.state === 'attached' || event.state === 'update');
  const refusals = new Map();
  for (const { kind, error } of events) if (kind === 'refused') refusals.set(error, (refusals.get(error) ?? 0) + 1);
  return {
    publishes: kinds('publish'),
    acked: kinds('acked'),
    refused: Object.fromEntries(refusals),
    delivered: kinds('message'),
    reads: kinds('read'),
    presence: kinds('presence'),
    resumed: count((event) => attached(event) && event.resumed),
    fresh: count((event) => attached(event) && !event.resumed),
    reconnects: count((event) => event.kind === 'connection' && event.state === 'connected'),
    faultsInjected: kinds('fault'),
    died: kinds('died'),
  };
}

/** Per channel, all that anybody knows of its log. */
function readLedgers(events) {
  const ledgers = new Map();
  const of = (channel) => {
    if (!ledgers.has(channel))
      ledgers.set(channel, {
        serials: new Map(),
        acks: new Map(),
        seen: new Set(),
        stored: [],
        batches: [],
        acked: [],
      });
    return ledgers.get(channel);
  };
  const note = (known, text, serial) => {
    if (!serial) return;
    if (!known.has(text)) known.set(text, new Set());
    known.get(text).add(serial);
  };
  for (const event of events) {
    if (event.kind === 'message') {
      of(event.channel).seen.add(event.text);
      note(of(event.channel).serials, event.text, event.serial);
    } else if (event.kind === 'acked') {
      of(event.channel).acked.push(event);
      event.texts.forEach((text, i) => note(of(event.channel).acks, text, event.serials?.[i]));
    } else if (event.kind === 'stored') {
      of(event.channel).stored.push(event);
      for (const { text, serial } of event.records) note(of(event.channel).serials, text, serial);
    }
  }
  for (const ledger of ledgers.values()) ledger.order = order(ledger);
  return ledgers;
}

/** The log as a list of `{text, serial}`, and where each text is in it. */
function order({ serials, acks }) {
  const records = [];
  for (const [text, own] of serials) records.push({ text, serial: [...own].sort()[0] });
  // Acknowledged, and nobody has it: it belongs into the order, so that whoever should have received it misses it.
  for (const [text, own] of acks) if (!serials.has(text)) records.push({ text, serial: [...own][0] });
  records.sort((a, b) => (a.serial < b.serial ? -1 : Number(a.serial > b.serial)));
  return { records, at: new Map(records.map(({ text }, at) => [text, at])) };
}

const isPersisted = (channel) => channel.startsWith('persisted:');

function judgeLedger(channel, ledger, add) {
  const bySerial = new Map();
  for (const [text, serials] of ledger.serials) {
    if (serials.size > 1) add('doubled', channel, undefined, `${text} is at ${[...serials].join(' and ')}`);
    for (const serial of serials) {
      if (bySerial.has(serial))
        add('disagreement', channel, undefined, `${serial}: ${bySerial.get(serial)} and ${text}`);
      bySerial.set(serial, text);
    }
  }
  for (const [text, serials] of ledger.acks) {
    const told = ledger.serials.get(text);
    for (const serial of serials) {
      if (told && !told.has(serial))
        add('wrong-ack', channel, undefined, `${text}: acknowledged as ${serial}, is at ${[...told]}`);
    }
  }
  for (const { node, records } of ledger.stored) judgeHistory(channel, node, records, add);
  const [first, ...others] = ledger.stored;
  for (const other of others) {
    const length = Math.max(first.records.length, other.records.length);
    const at = Array.from({ length }).findIndex((_, i) => first.records[i]?.serial !== other.records[i]?.serial);
    if (at >= 0)
      add('nodes-differ', channel, undefined, `nodes ${first.node} and ${other.node} part at ${at} of ${length}`);
  }
  judgeAcked(channel, ledger, add);
}

function judgeHistory(channel, node, records, add) {
  const seen = new Set();
  records.forEach(({ text, serial }, i) => {
    if (seen.has(text)) add('doubled', channel, undefined, `${text} is twice in the history of node ${node}`);
    seen.add(text);
    if (i > 0 && !(records[i - 1].serial < serial)) {
      add('regressed', channel, undefined, `history of node ${node}: ${serial} after ${records[i - 1].serial}`);
    }
  });
}

function judgeAcked(channel, ledger, add) {
  const stored = ledger.stored.map(({ node, records }) => [node, new Set(records.map(({ text }) => text))]);
  for (const { client, texts } of ledger.acked) {
    for (const text of texts) {
      const without = isPersisted(channel) ? stored.filter(([, all]) => !all.has(text)).map(([node]) => node) : [];
      const nowhere = !ledger.serials.has(text) && !ledger.seen.has(text);
      if (nowhere) add('lost', channel, client, `${text} was acknowledged, and nobody has it`);
      else if (without.length > 0)
        add('lost', channel, client, `${text} was acknowledged, and nodes ${without} lack it`);
    }
  }
  if (!isPersisted(channel) || stored.length === 0) return;
  for (const text of ledger.seen) {
    if (!stored.some(([, all]) => all.has(text)))
      add('phantom', channel, undefined, `${text} was received, and no history has it`);
  }
}

/** What each client received on each channel: `{client, channel, stretches, open}`. */
function readViews(events) {
  const views = new Map();
  const dead = new Set();
  const away = new Map();
  for (const event of events) {
    const { kind, client, channel } = event;
    const key = `${client} ${channel}`;
    if (kind === 'died') dead.add(client);
    if (kind === 'connection')
      away.set(client, event.state === 'connected' ? undefined : (away.get(client) ?? event.at));
    if (kind === 'channel') {
      if (!views.has(key)) views.set(key, { client, channel, stretches: [], losses: [], strays: [] });
      const view = views.get(key);
      view.open = event.state === 'attached' || event.state === 'update';
      if (!view.open) {
        view.left ||= event.state === 'detaching' || event.state === 'detached';
        view.leftAt ??= event.at;
        continue;
      }
      if (event.resumed && view.stretches.length > 0) {
        view.stretches.at(-1).resumes.push(view.stretches.at(-1).seen.length);
      } else {
        if (view.stretches.length > 0 && !view.left) {
          const since = Math.min(view.leftAt ?? event.at, away.get(client) ?? event.at);
          view.losses.push({ awayMs: event.at - since, reason: event.reason });
        }
        view.stretches.push({ from: event.attachSerial, seen: [], resumes: [] });
      }
      view.left = false;
      view.leftAt = undefined;
    }
    if (kind === 'message') views.get(key)?.stretches.at(-1)?.seen.push(event);
  }
  for (const view of views.values()) view.open &&= !dead.has(view.client);
  return views.values();
}

function judgeView({ client, channel, stretches, losses, open }, ledger, { retentionMs, add }) {
  for (const { awayMs, reason } of losses) {
    if (awayMs < retentionMs) add('needless-loss', channel, client, `after ${awayMs} ms; ${reason ?? 'no reason'}`);
  }
  if (!ledger) return;
  let before;
  stretches.forEach((stretch, i) => {
    const first = stretch.seen[0]?.serial;
    if (before && first && first <= before)
      add('regressed', channel, client, `${first} in a later stretch than ${before}`);
    before = stretch.seen.at(-1)?.serial ?? before;
    judgeStretch(stretch, ledger.order, {
      toTheEnd: open && i === stretches.length - 1,
      add: (fault, detail) => add(fault, channel, client, detail),
    });
  });
}

function judgeStretch({ from, seen, resumes }, { records, at }, { toTheEnd, add }) {
  const own = new Map();
  let last = -1;
  let lastSerial = '';
  seen.forEach(({ text, serial }, i) => {
    if (own.has(text)) {
      add('duplicate', `${text} came again as message ${i}, first as ${own.get(text)}`);
      return;
    }
    own.set(text, i);
    if (serial && serial <= lastSerial) add('regressed', `${text}: ${serial} after ${lastSerial}`);
    lastSerial = serial ?? lastSerial;
    const place = at.get(text);
    if (place === undefined) return;
    if (place < last) add('reordered', `${text} came after ${records[last].text}`);
    last = Math.max(last, place);
  });

  const places = seen.map(({ text }) => at.get(text)).filter((place) => place !== undefined);
  const start = from === undefined ? Math.min(...places) : firstAfter(records, from);
  const end = toTheEnd ? records.length - 1 : Math.max(...places);
  // The neighbour before a missing record says whether a resume lies between it and what came next.
  let before = -1;
  for (let place = start; place <= end; place++) {
    const { text, serial } = records[place];
    if (own.has(text)) {
      before = Math.max(before, own.get(text));
      continue;
    }
    const lied = resumes.some((index) => index > before && index <= following(records, place, own, seen.length));
    add(
      lied ? 'false-resume' : 'gap',
      `${text} at ${serial} never came; before it came ${seen[before]?.text ?? 'nothing'}`,
    );
  }
}

/** Index among the received of the first record after `place` that was received; their number where none was. */
function following(records, place, own, none) {
  for (let next = place + 1; next < records.length; next++) {
    if (own.has(records[next].text)) return own.get(records[next].text);
  }
  return none;
}

/** The first record that lies after the serial, which is one of a whole record: `serial:index` is a message of it. */
function firstAfter(records, from) {
  const at = records.findIndex(({ serial }) => serial.split(':')[0] > from);
  return at < 0 ? records.length : at;
}

/** Promise 2: what was acknowledged before the question is in the answer, unless newer ones fill the page. */
function judgeReads(events, ledgers, add) {
  for (const { kind, channel, node, after, limit, records } of events) {
    if (kind !== 'read' || records.some(({ text }) => text === after)) continue;
    const { at } = ledgers.get(channel).order;
    const oldest = Math.min(...records.map(({ text }) => at.get(text)).filter((place) => place !== undefined));
    if (records.length < limit || oldest < at.get(after)) {
      add('stale-read', channel, undefined, `${after} is not among ${records.length} records of node ${node}`);
    }
  }
}

/** Whether the client itself numbered the publish of one text before that of the other, on one connection. */
function numberedBefore(ids, text, other) {
  const [one, two] = [text, other].map((text) => /^(.+):(\d+):\d+$/.exec(ids.get(text) ?? ''));
  return one && two && one[1] === two[1] && Number(one[2]) < Number(two[2]);
}

function judgePublishers(events, ledgers, add) {
  const ids = new Map(events.filter(({ kind, id }) => kind === 'message' && id).map(({ text, id }) => [text, id]));
  const open = new Map();
  const dead = new Set();
  const last = new Map();
  const acked = new Set();
  for (const event of events) if (event.kind === 'acked') acked.add(event.ref);
  for (const event of events) {
    const { kind, client, channel, ref, texts } = event;
    if (kind === 'died') dead.add(client);
    if (kind === 'acked' || kind === 'refused') open.delete(ref);
    if (kind !== 'publish') continue;
    open.set(ref, event);
    if (!acked.has(ref)) continue;
    const { at, records } = ledgers.get(channel).order;
    const places = texts.map((text) => at.get(text));
    if (places.includes(undefined)) continue;
    if (places.some((place, i) => i > 0 && place !== places[i - 1] + 1))
      add('torn', channel, client, `${texts} at ${places}`);
    const key = `${client} ${channel}`;
    const before = last.has(key) && records[last.get(key)].text;
    // What waits for a connection and what is published as it comes, a client library may send in either order.
    if (before && places[0] < last.get(key) && !numberedBefore(ids, texts[0], before)) {
      add('publisher-order', channel, client, `${texts[0]} lies before ${before}`);
    }
    last.set(key, Math.max(places.at(-1), last.get(key) ?? 0));
  }
  for (const { client, channel, texts } of open.values()) {
    if (!dead.has(client)) add('unanswered', channel, client, texts.join(', '));
  }
}
