// Promise 5, outwards: every message of a channel appears in Kafka once to read_committed consumers, in its order.

import assert from 'node:assert/strict';

import { assertEachOnce, assertSameOrder, assertSameSet } from './lib/check.mjs';
import { Doors } from './lib/doors.mjs';
import { Subscriber, publishAll } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';

const MESSAGES = 10_000;
const KEYS = 10;
const TOPIC = 'prices';
const channel = (k) => `/${TOPIC}/stock/${k}`;

const scenario = suite({ topics: { [TOPIC]: 4, shapes: 1 } });

scenario(`${MESSAGES} messages are read back from Kafka once and in order, a node killed meanwhile`, async (given) => {
  const { cluster, kafka, clients, t } = given;
  // The node that leads a channel's shard is the one that exports it.
  const victim = await cluster.leaderOf(channel(0));
  const [near, far] = cluster.living().filter((id) => id !== victim);
  const doors = await Doors.open(cluster);
  try {
    const watcher = await clients.realtime(far);
    const subscribers =
      await Promise.all(Array.from({ length: KEYS }, (_, k) => Subscriber.attach(watcher, channel(k))));
    const publishers = [
      await clients.realtime(near),
      await clients.realtime(far),
      await clients.connect(doors.options(victim, [near, far])),
    ];
    let acks = 0;
    let killed;
    const onAck = () => {
      if (++acks === Math.floor(MESSAGES / 3)) killed = cluster.kill(victim);
    };
    const results = await Promise.all(Array.from({ length: KEYS }, async (_, k) => {
      const texts = Array.from({ length: MESSAGES / KEYS }, (_, n) => `stock ${k} price ${n}`);
      const publisher = publishers[k % publishers.length].channels.get(channel(k));
      return publishAll(publisher, texts, { window: 20, onAck });
    }));
    await killed;
    const acked = results.flatMap((result) => result.acked);
    const refused = results.flatMap((result) => result.refused);
    t.diagnostic(`${acked.length} acknowledged, ${refused.length} refused, node ${victim} killed on the way`);

    // Without the dead node: its successors export what it had not.
    const records = await kafka.consume(TOPIC, { idleMs: 12_000 });
    t.diagnostic(`${records.length} records in Kafka`);
    const values = records.map((record) => record.value);
    assertEachOnce(values, acked, 'acknowledged messages in Kafka');
    assertSameSet(values, [...new Set(values)], 'Kafka holds nothing twice');
    const ids = records.map((record) => record.headers['firth-id']);
    assert.ok(ids.every(Boolean), 'every record has its idempotency key');
    assertSameSet(ids, [...new Set(ids)], 'no idempotency key is used twice');
    const identity = (await cluster.status(near)).cluster;
    assert.deepEqual([...new Set(records.map((record) => record.headers['firth-origin']))], [identity]);

    for (const [k, subscriber] of subscribers.entries()) {
      const own = records.filter((record) => record.key === `stock/${k}`);
      assert.equal(new Set(own.map((record) => record.partition)).size, 1, 'a key stays in one partition');
      await subscriber.received(own.length);
      assertSameOrder(own.map((record) => record.value), subscriber.data, `Kafka against channel ${channel(k)}`);
      assert.deepEqual(subscriber.losses, []);
    }

    // The killed node comes back: it may neither export again nor mirror its own records in.
    await cluster.restart(victim);
    const last = publishers[0].channels.get(channel(0));
    await last.publish('m', 'after the restart');
    await subscribers[0].received(records.filter((record) => record.key === 'stock/0').length + 1);
    const again = await kafka.consume(TOPIC, { idleMs: 6_000 });
    assertSameSet(again.map((record) => record.value), [...values, 'after the restart'], 'Kafka after the restart');
    assert.equal(subscribers[0].data.at(-1), 'after the restart');
  } finally {
    doors.close();
  }
});

scenario('texts and objects arrive in Kafka as what they are', async ({ kafka, clients }) => {
  const channels = (await clients.realtime(1)).channels;
  await channels.get('/shapes/text').publish('m', 'grüß dich 🌊');
  await channels.get('/shapes/object').publish('m', { a: 1, b: ['x', null] });
  const records = await kafka.consume('shapes', { idleMs: 6_000 });
  const byKey = Object.fromEntries(records.map((record) => [record.key, record.value]));
  assert.equal(byKey.text, 'grüß dich 🌊');
  assert.deepEqual(JSON.parse(byKey.object), { a: 1, b: ['x', null] });
});
