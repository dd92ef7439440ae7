// Promises 1, 3 and 4 while a leader's process is killed: acknowledged means stored, once, and nobody sees a gap.

import assert from 'node:assert/strict';

import { assertEachOnce, assertSameOrder, assertSameSet } from './lib/check.mjs';
import { Doors } from './lib/doors.mjs';
import { Subscriber, history, publishAll, state } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { inTime, until } from './lib/wait.mjs';

const ELECTION_MS_MAX = 2_000;
// Three publishers' messages fit into one page of history.
const EACH = 300;

const scenario = suite();

scenario('the leader is killed: nothing acknowledged is lost or doubled, clients move by themselves', async (given) => {
  const { cluster, clients, t } = given;
  const name = 'persisted:leader-dies';
  const victim = await cluster.leaderOf(name);
  const [near, far] = cluster.living().filter((id) => id !== victim);
  const doors = await Doors.open(cluster);
  try {
    const roaming = () => clients.connect(doors.options(victim, [near, far]));
    const publishers = [await clients.realtime(near), await clients.realtime(far), await roaming()];
    const staying = [
      await Subscriber.attach(await clients.realtime(near), name),
      await Subscriber.attach(await clients.realtime(far, { useBinaryProtocol: false }), name),
    ];
    const moving = await Subscriber.attach(await roaming(), name);
    const ids = [publishers[2], moving.channel.client].map((client) => client.connection.id);

    const acks = [];
    let election;
    const onAck = () => {
      acks.push(performance.now());
      if (acks.length === EACH) election = killAndElect(cluster, name, victim, near);
    };
    const texts = publishers.map((_, p) => Array.from({ length: EACH }, (_, n) => `publisher ${p} message ${n}`));
    const results = await Promise.all(
      publishers.map((client, p) => publishAll(client.channels.get(name), texts[p], { window: 4, onAck })));
    const { leader, ms } = await election;
    t.diagnostic(`new leader (node ${leader}) known after ${Math.round(ms)} ms`);
    t.diagnostic(`longest time without any acknowledgement: ${Math.round(longestGap(acks))} ms`);

    const acked = results.flatMap((result) => result.acked);
    const refused = results.flatMap((result) => result.refused);
    t.diagnostic(`${acked.length} acknowledged, ${refused.length} refused ${JSON.stringify(refused.slice(0, 2))}`);
    const stored = (await history(clients.rest(near), name)).map((message) => message.data);
    assertEachOnce(stored, acked, 'acknowledged messages in history');
    assertSameOrder([...new Set(stored)], stored, 'history holds nothing twice');
    assertSameOrder((await history(clients.rest(far), name)).map((one) => one.data), stored, 'the other node');
    for (const subscriber of [...staying, moving]) {
      await subscriber.received(stored.length);
      assertSameOrder(subscriber.data, stored, 'a subscriber against history');
      assert.deepEqual(subscriber.losses, [], 'no subscriber was told of a loss');
    }
    assert.deepEqual(results[2].refused, [], 'what the dead node had not answered was published after the move');
    assert.deepEqual([publishers[2], moving.channel.client].map((client) => client.connection.id), ids,
      'another node resumed the connections');
    assert.ok(ms < ELECTION_MS_MAX, `a new leader took ${Math.round(ms)} ms`);
  } finally {
    doors.close();
  }
  await cluster.restart(victim);
});

for (const [where, refuse] of [['the same node', []], ['another node', [1]]]) {
  scenario(`acknowledgements are lost on the way, the SDK asks ${where}: stored once, answered alike`, async (given) => {
    const { cluster, clients } = given;
    const name = `persisted:lost-acks-${refuse.length}`;
    const doors = await Doors.open(cluster);
    try {
      const client = await clients.connect(doors.options(1, [2, 3]));
      const subscriber = await Subscriber.attach(await clients.realtime(3), name);
      const { id } = client.connection;
      const channel = client.channels.get(name);
      await channel.publish('m', 'before');
      doors.swallowAnswers();
      const texts = Array.from({ length: 20 }, (_, n) => `answer lost ${n}`);
      const publishes = Promise.all(texts.map((text) => channel.publish('m', text)));
      // They are stored, which the publisher cannot know.
      await subscriber.received(1 + texts.length);
      doors.cut({ refuse });
      const results = await inTime(publishes, { what: 'every publish to be acknowledged' });
      await channel.publish('m', 'after');

      const wanted = ['before', ...texts, 'after'];
      const stored = await history(clients.rest(2), name);
      assertSameOrder(stored.map((message) => message.data), wanted, 'history');
      assert.deepEqual(results.flatMap((result) => result.serials), stored.slice(1, -1).map((one) => one.serial));
      await subscriber.received(wanted.length);
      assertSameOrder(subscriber.data, wanted, 'subscriber');
      assert.equal(client.connection.id, id, 'the connection was resumed');
    } finally {
      doors.close();
    }
  });
}

scenario('each node in turn is killed and restarted under load; its clients come back to it by themselves', async (given) => {
  const { cluster, clients, t } = given;
  const names = [1, 2, 3].map((n) => `persisted:rolling-${n}`);
  const subscribers = [];
  const publishing = [];
  const acks = new Map(names.map((name) => [name, []]));
  const refused = [];
  const stopped = { yes: false };
  for (const [i, id] of [1, 2, 3].entries()) {
    const name = names[i];
    // Every client sits on one node only: when that one is away it has to wait for it.
    for (const at of [1, 2, 3]) subscribers.push(await Subscriber.attach(await clients.realtime(at), name));
    const channel = (await clients.realtime(id)).channels.get(name);
    publishing.push(publishUntil(stopped, channel, name, acks.get(name), refused));
  }
  for (const id of [1, 2, 3]) {
    await cluster.kill(id);
    const others = names.filter((_, i) => i !== id - 1);
    // The two that are left go on without the third.
    await progress(acks, others, 20);
    await cluster.restart(id);
    await progress(acks, names, 20);
  }
  stopped.yes = true;
  await Promise.all(publishing);
  t.diagnostic(`${[...acks.values()].flat().length} acknowledged, ${refused.length} refused`);

  for (const name of names) {
    const [one, ...others] = await Promise.all(
      [1, 2, 3].map(async (id) => (await history(clients.rest(id), name)).map((message) => message.data)));
    assertEachOnce(one, acks.get(name), `acknowledged messages of ${name}`);
    assertSameSet(one, [...new Set(one)], `history of ${name}`);
    for (const other of others) assertSameOrder(other, one, `history of ${name} on another node`);
    for (const subscriber of subscribers.filter((each) => each.channel.name === name)) {
      await state(subscriber.channel, 'attached');
      await subscriber.received(one.length);
      assertSameOrder(subscriber.data, one, `a subscriber of ${name} against history`);
      assert.deepEqual(subscriber.losses, []);
    }
  }
});

scenario('two of three nodes away: publishes wait or are refused, none is acknowledged and lost', async (given) => {
  const { cluster, clients } = given;
  const name = 'persisted:no-quorum';
  const client = await clients.realtime(1);
  const channel = client.channels.get(name);
  await channel.publish('m', 'before');
  await cluster.kill(2);
  await cluster.kill(3);
  const outcome = channel.publish('m', 'without quorum').then(() => 'acked', () => 'refused');
  // The node that is left still speaks with its clients.
  assert.ok((await client.connection.ping()) >= 0);
  assert.equal((await cluster.rest(1, '/time')).status, 200);
  await Promise.all([2, 3].map((id) => cluster.restart(id)));
  const answer = await outcome;
  await channel.publish('m', 'after');
  const stored = (await history(clients.rest(2), name)).map((message) => message.data);
  const times = stored.filter((text) => text === 'without quorum').length;
  assert.ok(answer === 'acked' ? times === 1 : times <= 1, `${answer}, stored ${times} times`);
  assert.deepEqual(stored.filter((text) => text !== 'without quorum'), ['before', 'after']);
});

async function killAndElect(cluster, name, victim, through) {
  const began = performance.now();
  await cluster.kill(victim);
  const leader = await cluster.leaderOf(name, { through });
  return { leader, ms: performance.now() - began };
}

async function publishUntil(stopped, channel, name, acked, refused) {
  for (let n = 0; !stopped.yes && n < 950; n++) {
    const text = `${name} ${n}`;
    const result = await publishAll(channel, [text]);
    acked.push(...result.acked);
    refused.push(...result.refused);
    // Slow enough that one page of history holds it all.
    await new Promise((next) => setTimeout(next, 60));
  }
}

async function progress(acks, names, more) {
  const from = names.map((name) => acks.get(name).length);
  const grown = () => names.every((name, i) => acks.get(name).length >= from[i] + more);
  await until(grown, { what: `${more} more acknowledgements on each of ${names}`, within: 40_000 });
}

function longestGap(times) {
  return times.slice(1).reduce((longest, time, i) => Math.max(longest, time - times[i]), 0);
}
