// The judge of recorded histories, with histories made by hand: each class of fault is found, and nothing in good ones.

import assert from 'node:assert/strict';
import { test } from 'node:test';

import { FAULTS, judge, summary } from './lib/verdict.mjs';

const C = 'persisted:c';
const serial = (n) => `a1b2-000000000000000${n}-0000:000`;
const point = (n) => `a1b2-000000000000000${n}-ffff`;

/** Writes histories: every call is one event, a millisecond after the one before. */
class Script {
  events = [];

  add(kind, event, at = this.events.length) {
    this.events.push({ at, kind, ...event });
    return this;
  }

  attached(client, { resumed = false, from, state = 'attached', at } = {}) {
    return this.add('channel', { client, channel: C, state, resumed, attachSerial: from }, at);
  }

  /** `n` is the place in the log, `text` what came, by default the text that is at that place. */
  got(client, n, text = `m${n}`) {
    return this.add('message', { client, channel: C, text, serial: serial(n) });
  }

  published(client, n, { text = `m${n}`, acked = serial(n), ref = text } = {}) {
    this.add('publish', { client, channel: C, texts: [text], ref });
    return acked ? this.add('acked', { client, channel: C, texts: [text], ref, serials: [acked] }) : this;
  }

  stored(node, ns, texts = ns.map((n) => `m${n}`)) {
    return this.add('stored', { channel: C, node, records: ns.map((n, i) => ({ serial: serial(n), text: texts[i] })) });
  }

  presence(client, action, clientId, connectionId = `of-${clientId}`, at = undefined) {
    return this.add('presence', { client, channel: C, action, clientId, connectionId }, at);
  }

  members(from, ...clientIds) {
    const members = clientIds.map((clientId) => ({ clientId, connectionId: `of-${clientId}`, data: 'd' }));
    return this.add('members', { channel: C, from, members });
  }
}

/** Three messages of p, stored, received by a and b from the beginning. */
function good() {
  const script = new Script().attached('a', { from: point(0) }).attached('b', { from: point(0) });
  for (const n of [1, 2, 3]) script.published('p', n).got('a', n).got('b', n);
  return script.stored(1, [1, 2, 3]).stored(2, [1, 2, 3]);
}

function names(script, options) {
  return [...new Set(judge(script.events, options).map(({ fault }) => fault))].sort();
}

const shown = new Set();

/** Exactly these faults are found. */
function finds(title, wanted, script, options) {
  const all = [wanted].flat();
  for (const fault of all) shown.add(fault);
  test(`${wanted}: ${title}`, () => assert.deepEqual(names(script, options), [...all].sort()));
}

test('a good history has no fault', () => assert.deepEqual(judge(good().events), []));

test('a loss that was told ends a stretch, so what lies between is no gap', () => {
  const script = good().attached('a', { from: point(5), at: 200_000 });
  for (const n of [4, 5]) script.published('p', n).got('b', n);
  script.add('connection', { client: 'a', state: 'disconnected' }, 10);
  script.published('p', 6).got('a', 6).got('b', 6).stored(3, [1, 2, 3, 4, 5, 6]);
  script.events = script.events.filter(({ kind, node }) => kind !== 'stored' || node === 3);
  script.events.sort((x, y) => (x.kind === 'connection' ? -1 : 0) - (y.kind === 'connection' ? -1 : 0));
  assert.deepEqual(judge(script.events), []);
});

test('a resume that keeps its word is no fault', () => {
  const script = new Script().attached('a', { from: point(0) });
  script
    .published('p', 1)
    .got('a', 1)
    .attached('a', { resumed: true, from: point(1) });
  assert.deepEqual(judge(script.published('p', 2).got('a', 2).stored(1, [1, 2]).events), []);
});

test('a publish that was refused may be stored or not', () => {
  const refused = good().add('publish', { client: 'p', channel: C, texts: ['m4'], ref: 'r' });
  refused.add('refused', { client: 'p', channel: C, texts: ['m4'], ref: 'r', error: 'timeout' });
  assert.deepEqual(judge(refused.events), []);
  assert.deepEqual(
    judge(
      refused
        .got('a', 4)
        .got('b', 4)
        .stored(3, [1, 2, 3, 4])
        .events.filter(({ kind, node }) => kind !== 'stored' || node === 3),
    ),
    [],
  );
});

finds('within a stretch', 'duplicate', good().got('a', 3));
finds(
  'in the middle',
  'gap',
  new Script()
    .attached('a')
    .published('p', 1)
    .published('p', 2)
    .published('p', 3)
    .got('a', 1)
    .got('a', 3)
    .stored(1, [1, 2, 3]),
);
finds(
  'right after the attachment',
  'gap',
  new Script()
    .attached('a', { from: point(0) })
    .published('p', 1)
    .published('p', 2)
    .got('a', 2)
    .stored(1, [1, 2]),
);
finds(
  'at the end',
  'gap',
  new Script().attached('a').published('p', 1).published('p', 2).got('a', 1).stored(1, [1, 2]),
);
finds(
  'known only from an acknowledgement, lost as well',
  ['gap', 'lost'],
  new Script()
    .attached('a')
    .published('p', 1)
    .published('p', 2)
    .published('p', 3)
    .got('a', 1)
    .got('a', 3)
    .stored(1, [1, 3]),
);
finds(
  'something from before is missing',
  'false-resume',
  new Script()
    .attached('a')
    .published('p', 1)
    .got('a', 1)
    .attached('a', { resumed: true })
    .published('p', 2)
    .published('p', 3)
    .got('a', 3)
    .stored(1, [1, 2, 3]),
);
finds(
  'within a stretch',
  ['regressed', 'reordered'],
  new Script().attached('a').published('p', 1).published('p', 2).got('a', 2).got('a', 1).stored(1, [1, 2]),
);
finds(
  'across stretches',
  ['needless-loss', 'regressed'],
  good()
    .attached('a', { from: point(2) })
    .got('a', 3),
);
finds(
  'without serials',
  'reordered',
  new Script()
    .attached('a')
    .published('p', 1)
    .published('p', 2)
    .add('message', { client: 'a', channel: C, text: 'm2' })
    .add('message', { client: 'a', channel: C, text: 'm1' })
    .stored(1, [1, 2]),
);
finds(
  'two subscribers saw different orders',
  ['disagreement', 'doubled', 'reordered'],
  new Script().attached('a').attached('b').got('a', 1, 'x').got('a', 2, 'y').got('b', 1, 'y').got('b', 2, 'x'),
);
finds('stored twice', 'doubled', new Script().published('p', 1).stored(1, [1, 2], ['m1', 'm1']));
finds(
  'received under two serials',
  'doubled',
  new Script()
    .attached('a')
    .published('p', 1, { acked: null })
    .add('refused', { ref: 'm1' })
    .got('a', 1)
    .attached('b')
    .got('b', 2, 'm1'),
  { retentionMs: 0 },
);
finds('another serial than the log', 'wrong-ack', new Script().published('p', 1, { acked: serial(2) }).stored(1, [1]));
finds(
  'the second lacks the last',
  ['lost', 'nodes-differ'],
  new Script().published('p', 1).published('p', 2).stored(1, [1, 2]).stored(2, [1]),
);
finds('nobody has it', 'lost', new Script().published('p', 1).published('p', 2).stored(1, [1]));
finds(
  'without serials in acknowledgements',
  'lost',
  new Script()
    .add('publish', { client: 'p', channel: C, texts: ['m1'], ref: 1 })
    .add('acked', { client: 'p', channel: C, texts: ['m1'], ref: 1 })
    .stored(1, []),
);
const reads = (script, limit, ...ns) =>
  script.add('read', {
    channel: C,
    node: 2,
    after: 'm2',
    limit,
    records: ns.map((n) => ({ text: `m${n}`, serial: serial(n) })),
  });
test('a read that shows what was acknowledged, or newer ones instead', () =>
  assert.deepEqual([names(reads(good(), 2, 3, 2)), names(reads(good(), 1, 3))], [[], []]));
finds('the page has room', 'stale-read', reads(good(), 2, 1));
finds('older ones are in its place', 'stale-read', reads(good(), 2, 3, 1));
finds('received, not stored', 'phantom', new Script().attached('a').got('a', 1).stored(1, []));
finds(
  'a foreign message inside',
  'torn',
  new Script()
    .add('publish', { client: 'p', channel: C, texts: ['m1', 'm3'], ref: 1 })
    .add('acked', { client: 'p', channel: C, texts: ['m1', 'm3'], ref: 1 })
    .published('q', 2)
    .stored(1, [1, 2, 3]),
);
finds('the second lies first', 'publisher-order', new Script().published('p', 2).published('p', 1).stored(1, [1, 2]));
const numbered = (...numbers) =>
  numbers.reduce(
    (script, number, i) =>
      script.add('message', { client: 'a', channel: C, text: `m${i + 1}`, serial: serial(i + 1), id: `p:${number}:0` }),
    new Script().attached('a').published('p', 2).published('p', 1),
  );
finds('the second lies first, and has a greater number', 'publisher-order', numbered(8, 7).stored(1, [1, 2]));
test('publishers: the client numbered them in the order of the log', () =>
  assert.deepEqual(names(numbered(7, 8).stored(1, [1, 2])), []));
finds('neither acknowledged nor refused', 'unanswered', new Script().published('p', 1, { acked: null }));
finds('the log reaches back', 'needless-loss', good().attached('a', { from: point(3) }));
finds('told of the present, unasked', 'needless-loss', good().attached('a', { from: point(3), state: 'update' }));

const there = (...clientIds) =>
  clientIds.reduce(
    (script, clientId) => script.add('present', { client: clientId, channel: C, clientId, data: 'd' }),
    new Script(),
  );
test('presence: lists that agree with who is there', () =>
  assert.deepEqual(names(there('a', 'b').members('a', 'a', 'b').members('node 1', 'b', 'a')), []));
test('presence: nothing is said of a member whose last operation is in doubt', () =>
  assert.deepEqual(names(there('a').add('unsure', { client: 'a', channel: C, clientId: 'a' }).members('node 1')), []));
finds(
  'of somebody who left',
  'ghost',
  there('a', 'b').add('absent', { client: 'b', channel: C, clientId: 'b' }).members('node 1', 'a', 'b'),
);
finds(
  'of somebody who died',
  'ghost',
  there('a', 'b').add('died', { client: 'b', connectionId: 'of-b' }).members('node 1', 'a', 'b'),
);
finds(
  'of a former connection',
  'ghost',
  there('a').add('members', {
    channel: C,
    from: 'node 1',
    members: [
      { clientId: 'a', connectionId: 'old', data: 'd' },
      { clientId: 'a', connectionId: 'new', data: 'd' },
    ],
  }),
);
finds('in a subscriber’s list', 'missing', there('a', 'b').members('a', 'a').members('node 1', 'a', 'b'));
finds(
  'data before the last update',
  'stale',
  there('a').add('present', { client: 'a', channel: C, clientId: 'a', data: 'e' }).members('node 1', 'a'),
);

const death = () => new Script().presence('a', 'enter', 'x').add('died', { client: 'x', connectionId: 'of-x' }, 100);
test('presence: a dead client leaves once', () =>
  assert.deepEqual(names(death().presence('a', 'leave', 'x', 'of-x', 15_000)), []));
finds('of a dead client', 'double-leave', death().presence('a', 'leave', 'x').presence('a', 'leave', 'x'));
finds('of a dead client', 'no-leave', death());
finds('of a dead client', 'late-leave', death().presence('a', 'leave', 'x', 'of-x', 90_000));
const attended = (from, to) =>
  new Script()
    .add('connection', { client: 'x', state: 'connected', connectionId: 'of-x' }, 0)
    .presence('a', 'enter', 'x')
    .add('connection', { client: 'x', state: 'disconnected' }, from)
    .add('connection', { client: 'x', state: 'connected', connectionId: 'of-x' }, to);
const sentAway = (script, at, connectionId = 'of-x') =>
  script.add('presence', { client: 'a', channel: C, action: 'leave', clientId: 'x', connectionId, id: 'left-1:0:0' }, at);
finds('of somebody who was there', 'early-leave', sentAway(attended(100, 200), 20_000));
finds('of somebody away for a moment', 'early-leave', sentAway(attended(100, 8_000), 20_000));
finds('long after somebody was away', 'early-leave', sentAway(attended(100, 20_000), 90_000));
test('presence: who is away for long is made to leave', () => {
  assert.deepEqual(names(sentAway(attended(100, 20_000), 16_000)), []);
  assert.deepEqual(names(sentAway(attended(100, 20_000), 21_000)), []);
  const other = attended(100, 200).presence('a', 'enter', 'x', 'former');
  assert.deepEqual(names(sentAway(other, 300, 'former')), []);
});
test('presence: a member that enters again with another connection left once each', () =>
  assert.deepEqual(
    names(
      new Script()
        .presence('a', 'enter', 'x', '1')
        .presence('a', 'enter', 'x', '2')
        .presence('a', 'leave', 'x', '1')
        .presence('a', 'leave', 'x', '2'),
    ),
    [],
  ));

test('every class of fault has a history of its own here', () => {
  assert.deepEqual(
    Object.keys(FAULTS).filter((fault) => !shown.has(fault)),
    [],
  );
});

test('the summary counts', () => {
  const { publishes, acked, delivered } = summary(good().events);
  assert.deepEqual({ publishes, acked, delivered }, { publishes: 3, acked: 3, delivered: 6 });
});
