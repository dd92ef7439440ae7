// Promise 1 when everything goes at once: all processes killed under load, and the whole cluster stopped.

import assert from 'node:assert/strict';

import { assertEachOnce, assertSameOrder, assertSameSet } from './lib/check.mjs';
import { Cluster } from './lib/cluster.mjs';
import { Subscriber, connected, history, publishAll } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';

const CHANNELS = 6;
const EACH = 400;
const name = (channel) => `persisted:all-killed-${channel}`;

const scenario = suite();

scenario('all three nodes killed under load: nothing acknowledged is missing', async ({ cluster, clients, t }) => {
  const publishers = await Promise.all([1, 2, 3].map((id) => clients.realtime(id)));
  const subscribers = [];
  for (let channel = 0; channel < CHANNELS; channel++) {
    subscribers.push(await Subscriber.attach(await clients.realtime((channel % 3) + 1), name(channel)));
  }
  let acks = 0;
  let killed;
  const ackedBefore = new Set();
  const onAck = (text) => {
    if (!killed) ackedBefore.add(text);
    if (++acks === (CHANNELS * EACH) / 2) killed = Promise.all([1, 2, 3].map((id) => cluster.kill(id)));
  };
  const publishing = Promise.all(Array.from({ length: CHANNELS }, (_, channel) => {
    const texts = Array.from({ length: EACH }, (_, n) => `channel ${channel} message ${n}`);
    const publisher = publishers[channel % 3].channels.get(name(channel));
    return publishAll(publisher, texts, { window: 16, onAck });
  }));
  // `killed` is set in the middle of publishing, so this waits for that, and for `firth dev` to see its last node go.
  await cluster.ended();
  await killed;
  assert.deepEqual(cluster.living(), []);
  await Promise.all([1, 2, 3].map((id) => cluster.restart(id, { serving: false })));
  const began = performance.now();
  await Promise.all([1, 2, 3].map((id) => cluster.serving(id)));
  t.diagnostic(`serving again ${Math.round(performance.now() - began)} ms after the start of three processes`);

  // The SDKs come back and send again what was not acknowledged.
  const results = await publishing;
  await Promise.all(publishers.map((client) => connected(client)));
  const acked = results.flatMap((result) => result.acked);
  const refused = results.flatMap((result) => result.refused);
  t.diagnostic(`${ackedBefore.size} acknowledged before, ${acked.length} in all, ${refused.length} refused`);

  for (let channel = 0; channel < CHANNELS; channel++) {
    const stored = (await history(clients.rest((channel % 3) + 1), name(channel))).map((message) => message.data);
    assertEachOnce(stored, results[channel].acked, `acknowledged messages of channel ${channel}`);
    assertSameSet(stored, [...new Set(stored)], `history of channel ${channel}`);
    await subscribers[channel].received(stored.length);
    assertSameOrder(subscribers[channel].data, stored, `subscriber of channel ${channel} against history`);
    assert.deepEqual(subscribers[channel].losses, []);
  }
});

scenario('stopped and started again on the same folder it is the same cluster', async ({ cluster, clients }) => {
  const channel = (await clients.realtime(1)).channels.get('persisted:stopped');
  for (const text of ['one', 'two', 'three']) await channel.publish('m', text);
  const before = await history(clients.rest(2), 'persisted:stopped');
  const { key } = cluster;
  const identity = (await cluster.status(1)).cluster;
  clients.closeAll();
  await cluster.stop();

  const again = await Cluster.start({ data: cluster.data });
  try {
    assert.equal(again.key, key);
    assert.equal((await again.status(3)).cluster, identity);
    clients.cluster = again;
    const after = await history(clients.rest(3), 'persisted:stopped');
    assert.deepEqual(after.map((one) => [one.serial, one.data]), before.map((one) => [one.serial, one.data]));
    assert.deepEqual(after.map((one) => one.data), ['one', 'two', 'three']);
    await (await clients.realtime(2)).channels.get('persisted:stopped').publish('m', 'four');
    const last = (await history(clients.rest(1), 'persisted:stopped')).at(-1);
    assert.equal(last.data, 'four');
    assert.ok(last.serial > after.at(-1).serial, 'serials go on where they were');
    clients.closeAll();
    await again.stop();
  } finally {
    await again.destroy();
  }
});
