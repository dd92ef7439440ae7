// Promises 1 to 3 under `kill -9` at random moments: one, two or all of the processes, some of them again while they start.
//
// FIRTH_CRASH_ROUNDS is the number of rounds, FIRTH_CRASH_SEED repeats a run's choices (which nodes, and the pauses around
// the kills; what the processes were doing at that moment nobody can repeat).

import assert from 'node:assert/strict';

import { assertEachOnce, assertSameOrder, assertSameSet } from './lib/check.mjs';
import { connected, history, publishAll } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { pause, until } from './lib/wait.mjs';

const ROUNDS = Number(process.env.FIRTH_CRASH_ROUNDS ?? 5);
const SEED = Number(process.env.FIRTH_CRASH_SEED ?? Math.floor(Math.random() * 2 ** 31));
const NODES = [1, 2, 3];
const CHANNELS = ['persisted:crash-a', 'persisted:crash-b', 'persisted:crash-c', 'persisted:crash-d'];
// Each publisher is acknowledged this often in each round before the nodes are killed.
const PROGRESS = 10;
// Between two publishes of one publisher, so that 50 rounds stay readable by history.
const PACE_MS = 20;

const scenario = suite({ scenarioMs: 60_000 + ROUNDS * 45_000 });

scenario(`${ROUNDS} rounds of kill -9, seed ${SEED}: all that was acknowledged is there, once, in order`, async (given) => {
  const { cluster, clients, t } = given;
  const random = generator(SEED);
  const stopped = { yes: false };
  const publishers = [
    ...NODES.map((id) => restPublisher(cluster, id, stopped)),
    ...await Promise.all(NODES.map(async (id) => sdkPublisher(await clients.realtime(id), id, stopped))),
  ];
  const ends = Promise.all(publishers.map((publisher) => publisher.end));
  const kills = [0, 0, 0];
  let slowest = 0;
  try {
    for (let round = 1; round <= ROUNDS; round++) {
      await Promise.race([progress(publishers), ends]);
      await pause(random(400));
      const victims = shuffled(NODES, random).slice(0, 1 + random(3));
      kills[victims.length - 1]++;
      await Promise.all(victims.map((id) => cluster.kill(id)));
      await pause(random(300));
      await Promise.all(victims.map((id) => cluster.restart(id, { serving: false })));
      if (random(4) === 0) {
        // Again, while it reads what the first kill left.
        await pause(random(60));
        await cluster.kill(victims[0]);
        await cluster.restart(victims[0], { serving: false });
      }
      const began = performance.now();
      await Promise.all(NODES.map((id) => cluster.serving(id)));
      slowest = Math.max(slowest, performance.now() - began);
      const channel = CHANNELS[round % CHANNELS.length];
      await check(clients, publishers, channel, [1 + random(3)], `round ${round}, nodes ${victims} killed, seed ${SEED}`);
    }
  } finally {
    stopped.yes = true;
  }
  await Promise.all(publishers.map((publisher) => publisher.client && connected(publisher.client)));
  await ends;
  for (const channel of CHANNELS) await check(clients, publishers, channel, NODES, `the end, seed ${SEED}`);

  const acked = publishers.map((publisher) => publisher.acked.size);
  t.diagnostic(`one, two, three nodes killed: ${kills} times; slowest to serve again ${Math.round(slowest)} ms`);
  t.diagnostic(`acknowledged by publisher: ${acked}; refused by SDK: ${publishers.flatMap((one) => one.refused).length}`);
});

/** What `channel` holds on the nodes: all that was acknowledged before the question, once, in its publisher's order, nothing else. */
async function check(clients, publishers, channel, nodes, when) {
  const acked = publishers.flatMap((publisher) => [...publisher.acked].filter((text) => channelOf(text) === channel));
  const histories = await Promise.all(nodes.map(async (id) => {
    const messages = await history(clients.rest(id), channel);
    return messages.map((message) => message.data);
  }));
  const sent = new Set(publishers.flatMap((publisher) => publisher.sent));
  for (const [i, stored] of histories.entries()) {
    const what = `${channel} on node ${nodes[i]}, ${when}`;
    assertEachOnce(stored, acked, `acknowledged messages of ${what}`);
    assertSameSet(stored, [...new Set(stored)], what);
    assert.deepEqual(stored.filter((text) => !sent.has(text)).slice(0, 5), [], `never published: ${what}`);
    for (const { name } of publishers) {
      const own = stored.filter((text) => publisherOf(text) === name);
      assertSameOrder(own, own.toSorted((a, b) => numberOf(a) - numberOf(b)), `order of ${name} in ${what}`);
    }
    // At the end nobody publishes, so that all nodes hold the same.
    assertSameOrder(stored, histories[0], what);
  }
}

// A text says who published it, as which message, and to which channel.
const textOf = (name, n) => `${name} ${n} ${CHANNELS[n % CHANNELS.length]}`;
const publisherOf = (text) => text.split(' ')[0];
const numberOf = (text) => Number(text.split(' ')[1]);
const channelOf = (text) => text.split(' ')[2];

/** Publishes one message after the other with ids of its own, each until it is acknowledged by some node. */
function restPublisher(cluster, home, stopped) {
  const publisher = { name: `rest-${home}`, sent: [], acked: new Set(), refused: [] };
  const run = async () => {
    let node = home;
    for (let n = 0; !stopped.yes; n++) {
      const text = textOf(publisher.name, n);
      publisher.sent.push(text);
      const body = { id: `${SEED}-${publisher.name}-${n}:0`, name: 'm', data: text };
      const post = async () => {
        try {
          const target = `/channels/${encodeURIComponent(channelOf(text))}/messages`;
          const { status, body: answer } = await cluster.rest(node, target, { method: 'POST', body });
          if (status < 300) return true;
          throw new Error(`${status}: ${JSON.stringify(answer)}`);
        } catch (error) {
          // Whether it was stored nobody knows: the same id again, at another door.
          node = (node % NODES.length) + 1;
          throw error;
        }
      };
      await until(post, { what: `${text} to be acknowledged by REST`, within: 60_000, every: 20 });
      publisher.acked.add(text);
      node = home;
      await pause(PACE_MS);
    }
  };
  publisher.end = run();
  return publisher;
}

/** Publishes through the official SDK, a few messages in flight, to one node only: it waits for it when it is away. */
function sdkPublisher(client, home, stopped) {
  const publisher = { name: `sdk-${home}`, sent: [], acked: new Set(), refused: [], client };
  const run = async () => {
    for (let n = 0; !stopped.yes; n += CHANNELS.length) {
      const texts = CHANNELS.map((_, i) => textOf(publisher.name, n + i));
      publisher.sent.push(...texts);
      const onAck = (text) => publisher.acked.add(text);
      const publishes = texts.map((text) => publishAll(client.channels.get(channelOf(text)), [text], { onAck }));
      for (const { refused } of await Promise.all(publishes)) publisher.refused.push(...refused);
      await pause(PACE_MS * CHANNELS.length);
    }
  };
  publisher.end = run();
  return publisher;
}

async function progress(publishers) {
  const before = publishers.map((publisher) => publisher.acked.size);
  const grown = () => publishers.every((publisher, i) => publisher.acked.size >= before[i] + PROGRESS);
  await until(grown, { what: `${PROGRESS} more acknowledgements for every publisher`, within: 60_000 });
}

/** mulberry32: answers whole numbers from 0 to `end` - 1. */
function generator(seed) {
  let state = seed >>> 0;
  return (end) => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) % end;
  };
}

function shuffled(items, random) {
  const rest = [...items];
  return items.map(() => rest.splice(random(rest.length), 1)[0]);
}
