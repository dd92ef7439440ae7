// Promise 5, inwards: every record of a topic appears in its channel once, in its key's order, whoever dies.

import assert from 'node:assert/strict';

import { assertSameOrder } from './lib/check.mjs';
import { Subscriber } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { until } from './lib/wait.mjs';

const RECORDS = 10_000;
const KEYS = 20;
const TOPIC = 'matches';
const PARTITIONS = 8;
const key = (k) => `football/${k}`;
const channel = (k) => `/${TOPIC}/${key(k)}`;

const scenario = suite({ topics: { [TOPIC]: PARTITIONS, quiet: 2 } });

scenario(`${RECORDS} records arrive once and in key order across a kill -9 of the bridging node`, async (given) => {
  const { cluster, kafka, clients, t } = given;
  const bridging = await until(async () => {
    const found = await cluster.bridgingNodes(TOPIC);
    return new Set([...found.values()].flat()).size === PARTITIONS && found;
  }, { what: 'every partition of the topic to be read by some node', within: 60_000 });
  const [[victim, partitions]] = bridging;
  t.diagnostic(`nodes ${[...bridging.keys()]} read; node ${victim} with partitions ${partitions} is killed`);
  const watching = cluster.living().filter((id) => id !== victim);
  const subscribers = [];
  for (const node of watching) {
    const client = await clients.realtime(node);
    subscribers.push(await Promise.all(Array.from({ length: KEYS }, (_, k) => Subscriber.attach(client, channel(k)))));
  }
  const arrived = () => subscribers[0].reduce((sum, one) => sum + one.messages.length, 0);
  const records = Array.from({ length: RECORDS }, (_, n) => ({ key: key(n % KEYS), value: `record ${n}` }));

  const producer = kafka.producer(TOPIC);
  const began = performance.now();
  await producer.send(records.slice(0, RECORDS / 2));
  await until(() => arrived() > RECORDS / 10, { what: 'the first tenth of the records', within: 60_000 });
  await cluster.kill(victim);
  const atKill = arrived();
  await producer.send(records.slice(RECORDS / 2));
  await producer.close();
  // The others take over what the dead node read, before it is back.
  await until(() => arrived() === RECORDS, { what: `all ${RECORDS} records; see the counts below`, within: 90_000 })
    .catch((error) => {
      const counts = subscribers[0].map((one, k) => `${key(k)}: ${one.messages.length}`);
      throw new Error(`${error.message}\n${counts.join(', ')}`);
    });
  t.diagnostic(`${atKill} had arrived at the kill; all after ${Math.round(performance.now() - began)} ms`);
  await cluster.restart(victim);

  // What comes after the restart shows that nothing is read a second time.
  const more = Array.from({ length: 10 * KEYS }, (_, n) => ({ key: key(n % KEYS), value: `record ${RECORDS + n}` }));
  await kafka.produce(TOPIC, more);
  const all = [...records, ...more];
  for (const [i, group] of subscribers.entries()) {
    for (const [k, subscriber] of group.entries()) {
      const wanted = all.filter((record) => record.key === key(k)).map((record) => record.value);
      await subscriber.received(wanted.length);
      assertSameOrder(subscriber.data, wanted, `${channel(k)} on node ${watching[i]}`);
      assert.deepEqual(subscriber.losses, []);
    }
  }

  // A record that came from Kafka is not sent back to it.
  const stored = await kafka.consume(TOPIC, { idleMs: 5_000 });
  assert.equal(stored.length, all.length);
});

scenario('records with headers and keys of strange letters', async ({ kafka, clients }) => {
  const keys = ['a', 'straße/5', 'a b', '%2F', 'x'.repeat(200)];
  const client = await clients.realtime(2);
  const subscribers = await Promise.all(keys.map((one) => Subscriber.attach(client, `/quiet/${one}`)));
  await kafka.produce('quiet', keys.map((one) => ({ key: one, value: `of ${one}`, headers: { trace: '1' } })), {
    headers: true,
  });
  for (const [i, subscriber] of subscribers.entries()) {
    await subscriber.received(1);
    assert.deepEqual(subscriber.data, [`of ${keys[i]}`]);
  }
});
