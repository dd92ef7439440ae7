// Promise 2: one order per channel, on every node, and each publisher's own order within it.

import assert from 'node:assert/strict';

import { assertKeepsOrder, assertSameOrder, assertSameSet } from './lib/check.mjs';
import { Subscriber, history, publishAll } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';

const MESSAGES = 10_000;
const PUBLISHERS = 4;

const scenario = suite();

scenario(`${MESSAGES} messages of ${PUBLISHERS} publishers arrive everywhere in one order`, async (given) => {
  const { clients, t } = given;
  const name = 'persisted:order';
  const subscribers = [];
  for (const node of [1, 2, 3]) {
    for (const useBinaryProtocol of [true, false]) {
      subscribers.push(await Subscriber.attach(await clients.realtime(node, { useBinaryProtocol }), name));
    }
  }
  const texts = Array.from({ length: PUBLISHERS }, (_, publisher) =>
    Array.from({ length: MESSAGES / PUBLISHERS }, (_, n) => `publisher ${publisher} message ${n}`));
  const began = performance.now();
  const results = await Promise.all(texts.map(async (own, publisher) => {
    const client = await clients.realtime((publisher % 3) + 1, { useBinaryProtocol: publisher % 2 === 0 });
    return publishAll(client.channels.get(name), own);
  }));
  const seconds = (performance.now() - began) / 1000;
  t.diagnostic(`${Math.round(MESSAGES / seconds)} acknowledged publishes per second, fanned out to 6 subscribers`);
  assert.deepEqual(results.flatMap((result) => result.refused), []);

  for (const subscriber of subscribers) await subscriber.received(MESSAGES);
  const [first, ...others] = subscribers;
  assertSameSet(first.data, texts.flat(), 'first subscriber');
  for (const own of texts) assertKeepsOrder(first.data, own, 'order of one publisher');
  others.forEach((other, i) => {
    assertSameOrder(other.data, first.data, `subscriber ${i + 2} against subscriber 1`);
    assertSameOrder(other.serials, first.serials, `serials of subscriber ${i + 2}`);
  });
  for (const subscriber of subscribers) assert.deepEqual(subscriber.losses, []);

  for (const node of [1, 2, 3]) {
    const stored = (await history(clients.rest(node), name)).map((message) => message.data);
    assert.ok(stored.length >= 1000, `first page of node ${node} holds ${stored.length}`);
    assertSameOrder(stored, first.data.slice(-stored.length), `history of node ${node}`);
  }
});

scenario('a batch is one atomic unit: its messages are neighbours everywhere', async ({ clients }) => {
  const name = 'batches';
  const subscriber = await Subscriber.attach(await clients.realtime(3), name);
  const publishers = await Promise.all([1, 2, 3].map((node) => clients.realtime(node)));
  const batches = 50;
  await Promise.all(publishers.map(async (client, publisher) => {
    const channel = client.channels.get(name);
    const publishes = Array.from({ length: batches }, (_, batch) =>
      channel.publish(['a', 'b', 'c'].map((part) => ({ data: `${publisher}/${batch}/${part}` }))));
    await Promise.all(publishes);
  }));
  await subscriber.received(3 * 3 * batches);
  for (let i = 0; i < subscriber.data.length; i += 3) {
    const base = subscriber.data[i].slice(0, -1);
    assert.deepEqual(subscriber.data.slice(i, i + 3), [`${base}a`, `${base}b`, `${base}c`]);
  }
});
