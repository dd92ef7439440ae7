// Channels as clients shape them: modes, params, rewind, history until the attachment, echo, names, lost continuity.

import assert from 'node:assert/strict';

import { createApp } from './lib/app.mjs';
import { ACTION, RawClient } from './lib/raw.mjs';
import { History, SDKS, participant } from './lib/recorder.mjs';
import { Subscriber, describe, history, refusal, state } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { inTime, once, pause, until } from './lib/wait.mjs';

const FLAG = { RESUMED: 4, HAS_BACKLOG: 2, PUBLISH: 1 << 17, SUBSCRIBE: 1 << 18 };
const BOTH = [2, 1];

const scenario = suite();

async function publish(clients, node, name, texts) {
  const { channels } = clients.rest(node);
  for (const text of texts) await channels.get(name).publish('m', text);
}

/** Attaches with options; keeps messages and the first ATTACHED as the SDK tells it. */
async function attach(client, name, options) {
  const channel = client.channels.get(name, options);
  const seen = { channel, data: [], messages: [] };
  const attached = once(channel, 'attached', { what: `${name} to attach` });
  // The SDK says nothing more to `attached` when the channel fails; `subscribe` does.
  attached.catch(() => {});
  await channel.subscribe((message) => {
    seen.messages.push(message);
    seen.data.push(message.data);
  });
  seen.attached = await attached;
  return seen;
}

for (const sdk of BOTH) {
  scenario(`ably-js ${sdk}: modes are granted as asked for, and bind`, async ({ clients }) => {
    const name = `modes-${sdk}`;
    const client = await clients.realtime(1, { sdk });
    const listener = await attach(client, name, { modes: ['SUBSCRIBE'] });
    assert.deepEqual(
      listener.channel.modes.map((mode) => mode.toLowerCase()),
      ['subscribe'],
    );
    assert.equal((await refusal(listener.channel.publish('m', 'x'))).code, 40165);
    const speaker = (await clients.realtime(2, { sdk })).channels.get(name, { modes: ['PUBLISH'] });
    await speaker.attach();
    await speaker.publish('m', 'said');
    await until(() => listener.data.length === 1, { what: 'the message' });
  });

  scenario(`ably-js ${sdk}: params come back as far as they are known; params.modes wins`, async ({ clients }) => {
    const params = { modes: 'subscribe,presence', rewind: '1', nonsense: 'x' };
    const { channel } = await attach(await clients.realtime(2, { sdk }), `params-${sdk}`, {
      params,
      modes: ['PUBLISH'],
    });
    assert.equal(channel.params.rewind, '1');
    assert.equal(channel.params.nonsense, undefined);
    assert.deepEqual(channel.modes.map((mode) => mode.toLowerCase()).sort(), ['presence', 'subscribe']);
  });

  scenario(`ably-js ${sdk}: rewind by number and by time, on any node`, async ({ clients }) => {
    const name = `rewind-${sdk}`;
    await publish(clients, 1, name, ['a', 'b', 'c']);
    const two = await attach(await clients.realtime(2, { sdk }), name, { params: { rewind: '2' } });
    const minute = await attach(await clients.realtime(3, { sdk }), name, { params: { rewind: '1m' } });
    const limited = await attach(await clients.realtime(3, { sdk }), name, {
      params: { rewind: '1m', rewindLimit: '1' },
    });
    await publish(clients, 1, name, ['d']);
    await until(() => [two, minute, limited].every(({ data }) => data.includes('d')), { what: 'the live message' });
    assert.deepEqual(
      [two.data, minute.data, limited.data],
      [
        ['b', 'c', 'd'],
        ['a', 'b', 'c', 'd'],
        ['c', 'd'],
      ],
    );
    assert.deepEqual(
      [two, minute].map(({ attached }) => [attached.hasBacklog, attached.resumed]),
      [
        [true, false],
        [true, false],
      ],
    );
  });

  scenario(`ably-js ${sdk}: what was rewound is not rewound again after the death of the node`, async (given) => {
    const { cluster, clients } = given;
    const name = `persisted:rewind-once-${sdk}`;
    await publish(clients, 2, name, ['a', 'b', 'c']);
    const { client } = await clients.roaming(1, { sdk });
    const seen = await attach(client, name, { params: { rewind: '2' } });
    await until(() => seen.data.length === 2, { what: 'the backlog' });
    const again = once(seen.channel, 'attached', { what: 'the channel to attach elsewhere', within: 40_000 });
    await cluster.without(1, async () => {
      assert.equal((await again).resumed, true);
      await publish(clients, 2, name, ['d']);
      await until(() => seen.data.includes('d'), { what: 'the live message' });
    });
    assert.deepEqual(seen.data, ['b', 'c', 'd']);
  });

  scenario(
    `ably-js ${sdk}: history until the attachment, and what is live, have no gap and no overlap`,
    async ({ clients }) => {
      const name = `persisted:until-${sdk}`;
      await publish(clients, 1, name, ['a', 'b']);
      const seen = await attach(await clients.realtime(2, { sdk }), name);
      await publish(clients, 3, name, ['c', 'd']);
      await until(() => seen.data.length === 2, { what: 'the live messages' });
      const page = await seen.channel.history({ untilAttach: true, limit: 1 });
      assert.deepEqual(
        page.items.map(({ data }) => data),
        ['b'],
      );
      assert.deepEqual(
        (await page.next()).items.map(({ data }) => data),
        ['a'],
      );
      assert.deepEqual(seen.data, ['c', 'd']);
    },
  );

  scenario(`ably-js ${sdk}: params.echo=false hides one's own messages on that channel only`, async ({ clients }) => {
    const client = await clients.realtime(1, { sdk });
    const quiet = await attach(client, `echo-quiet-${sdk}`, { params: { echo: 'false' } });
    const loud = await attach(client, `echo-loud-${sdk}`);
    await quiet.channel.publish('m', 'mine');
    await loud.channel.publish('m', 'mine');
    await publish(clients, 2, `echo-quiet-${sdk}`, ['theirs']);
    await until(() => quiet.data.length > 0 && loud.data.length > 0, { what: 'messages' });
    assert.deepEqual([quiet.data, loud.data], [['theirs'], ['mine']]);
  });

  scenario(`ably-js ${sdk}: new options take effect in place, without a gap`, async ({ clients }) => {
    const name = `options-${sdk}`;
    const seen = await attach(await clients.realtime(3, { sdk }), name, { modes: ['SUBSCRIBE'] });
    await publish(clients, 1, name, ['a']);
    await seen.channel.setOptions({ modes: ['SUBSCRIBE', 'PUBLISH'] });
    assert.deepEqual(seen.channel.modes.map((mode) => mode.toLowerCase()).sort(), ['publish', 'subscribe']);
    await seen.channel.publish('m', 'b');
    await until(() => seen.data.length === 2, { what: 'both messages' });
    assert.deepEqual(seen.data, ['a', 'b']);
  });
}

for (const sdk of Object.keys(SDKS)) {
  scenario(`${sdk}: a rewind written into the name`, async ({ cluster, clients }) => {
    const name = `qualified-${sdk}`;
    await publish(clients, 1, name, ['a', 'b', 'c']);
    const one = await participant(sdk, { name: 'one', cluster, node: 2, history: new History() });
    try {
      const qualified = `[?rewind=2]${name}`;
      await one.subscribe(qualified);
      await publish(clients, 3, name, ['d']);
      await until(() => one.last?.get(qualified) === 'd', { what: 'the live message' });
      const texts = one.history.events.filter(({ kind }) => kind === 'message').map(({ text }) => text);
      assert.deepEqual(texts, ['b', 'c', 'd']);
    } finally {
      await one.close();
    }
  });
}

scenario('a channel has one name on a connection: the last it was attached under', async ({ clients }) => {
  const client = await clients.realtime(1);
  const plain = await attach(client, 'twice');
  const quiet = await attach(client, '[?echo=false]twice');
  await until(() => plain.channel.state === 'failed', { what: 'the former name to fail' });
  assert.equal(plain.channel.errorReason.code, 40000);
  assert.match(plain.channel.errorReason.message, /another name, `\[\?echo=false\]twice`/);
  await quiet.channel.publish('m', 'mine');
  await publish(clients, 2, 'twice', ['theirs']);
  await until(() => quiet.data.length > 0, { what: 'messages' });
  assert.deepEqual([plain.data, quiet.data], [[], ['theirs']]);
});

scenario('a rewind that is none fails the attachment', async ({ clients }) => {
  const client = await clients.realtime(1);
  for (const rewind of ['soon', '-1', '10y']) {
    const channel = client.channels.get(`rewind-bad-${rewind}`, { params: { rewind } });
    assert.equal((await refusal(channel.attach(), rewind)).code, 40003);
    assert.equal(channel.state, 'failed');
  }
});

scenario('names that are no names are refused on every door', async ({ cluster, clients }) => {
  // Two, for the SDK itself refuses to publish on a channel that has failed.
  const [client, speaker] = [await clients.realtime(2), await clients.realtime(3)];
  for (const name of [':a', ',a', ' a', '[unknown]a', 'a\nb']) {
    const channel = client.channels.get(name);
    assert.equal((await refusal(channel.attach(), JSON.stringify(name))).code, 40010);
    assert.equal((await refusal(speaker.channels.get(name).publish('m', 'x'), JSON.stringify(name))).code, 40010);
    const rest = await cluster.rest(1, `/channels/${encodeURIComponent(name)}/messages`, {
      method: 'POST',
      body: { data: 'x' },
    });
    assert.deepEqual([rest.status, rest.body.error?.code], [400, 40010], JSON.stringify(name));
  }
  for (const name of ['a:b/c', 'ünïcode 世界', 'a,b', 'a?b#c%d', '*']) {
    const seen = await attach(client, name);
    await publish(clients, 3, name, ['x']);
    await until(() => seen.data.length === 1, { what: `a message on ${name}` });
  }
});

scenario('who comes with a serial that is gone is told so, and gets what is new', async ({ cluster, clients }) => {
  const name = 'persisted:gone';
  await publish(clients, 1, name, ['old']);
  const raw = await RawClient.open(cluster.url(2), { key: cluster.key });
  try {
    await raw.next(ACTION.CONNECTED);
    raw.send({ action: ACTION.ATTACH, channel: name, channelSerial: '0000-0000000000000001-0000' });
    const attached = await raw.next(ACTION.ATTACHED);
    assert.equal(attached.flags & FLAG.RESUMED, 0);
    assert.ok([90003, 90004, 90005].includes(attached.error?.code), JSON.stringify(attached));
    await publish(clients, 3, name, ['new']);
    const { messages } = await raw.next(ACTION.MESSAGE);
    assert.deepEqual(
      messages.map(({ data }) => data),
      ['new'],
    );
  } finally {
    raw.close();
  }
});

scenario(
  'a serial from before is good on every node: what came since follows, once, with another connection',
  async (given) => {
    const { cluster, clients } = given;
    const name = 'persisted:serial';
    const first = await RawClient.open(cluster.url(1), { key: cluster.key });
    await first.next(ACTION.CONNECTED);
    first.send({ action: ACTION.ATTACH, channel: name });
    await first.next(ACTION.ATTACHED);
    await publish(clients, 2, name, ['a', 'b', 'c', 'd']);
    await first.next(ACTION.MESSAGE);
    const { channelSerial } = await first.next(ACTION.MESSAGE);
    first.close();
    await cluster.without(1, async () => {
      for (const node of [2, 3]) {
        const raw = await RawClient.open(cluster.url(node), { key: cluster.key });
        await raw.next(ACTION.CONNECTED);
        raw.send({ action: ACTION.ATTACH, channel: name, channelSerial });
        const attached = await raw.next(ACTION.ATTACHED);
        assert.equal(attached.flags & (FLAG.RESUMED | FLAG.HAS_BACKLOG), FLAG.RESUMED | FLAG.HAS_BACKLOG);
        assert.equal(attached.channelSerial, channelSerial);
        const texts = [];
        while (texts.length < 2) texts.push(...(await raw.next(ACTION.MESSAGE)).messages.map(({ data }) => data));
        assert.deepEqual(texts, ['c', 'd']);
        raw.close();
      }
    });
  },
);

scenario('ephemeral messages reach who is there, and nobody later', async ({ clients }) => {
  const name = 'persisted:ephemeral';
  const live = await Subscriber.attach(await clients.realtime(2), name);
  const channel = (await clients.realtime(1)).channels.get(name);
  await channel.publish({ name: 'm', data: 'kept' });
  await channel.publish({ name: 'm', data: 'gone', extras: { ephemeral: true } });
  await live.received(2);
  assert.deepEqual(live.data, ['kept', 'gone']);
  assert.deepEqual(
    (await history(clients.rest(3), name)).map(({ data }) => data),
    ['kept'],
  );
  const late = await attach(await clients.realtime(3), name, { params: { rewind: '10' } });
  await channel.publish('m', 'end');
  await until(() => late.data.includes('end'), { what: 'the live message' });
  assert.deepEqual(late.data, ['kept', 'end']);
});

scenario('occupancy counts over all nodes, in-band and over REST', async ({ clients }) => {
  const name = 'crowd';
  const counts = [];
  const watching = (await clients.realtime(1)).channels.get(name, { params: { occupancy: 'metrics' } });
  await watching.subscribe('[meta]occupancy', ({ data }) => counts.push(data.metrics));
  const others = [await clients.realtime(2, { clientId: 'ada' }), await clients.realtime(3)];
  for (const client of others) await attach(client, name);
  await others[0].channels.get(name).presence.enter();
  const last = () => counts.at(-1) ?? {};
  await until(() => last().subscribers === 3 && last().presenceMembers === 1, {
    what: 'three subscribers and a member',
  }).catch((error) => {
    throw new Error(`${error.message}; ${JSON.stringify(counts)}`);
  });
  for (const node of [1, 2, 3]) {
    const { metrics } = (await clients.rest(node).channels.get(name).status()).status.occupancy;
    assert.deepEqual([metrics.connections, metrics.subscribers, metrics.presenceMembers], [3, 3, 1], `node ${node}`);
  }
  others[1].close();
  await until(() => last().subscribers === 2, { what: 'two subscribers' });
});

scenario('occupancy forgets who was on a node that died', async (given) => {
  const { cluster, clients } = given;
  const name = 'crowd-dies';
  await attach(await clients.realtime(1), name);
  const { line, client } = await clients.roaming(3);
  await attach(client, name);
  const subscribers = async (node) =>
    (await clients.rest(node).channels.get(name).status()).status.occupancy.metrics.subscribers;
  await until(async () => (await subscribers(2)) === 2, { what: 'both to be counted' });
  line.die();
  await cluster.without(3, () =>
    until(async () => (await subscribers(2)) === 1, { what: 'one to be left', within: 45_000 }),
  );
});

for (const sdk of BOTH) {
  scenario(`ably-js ${sdk}: what was asked of its channels holds after the death of the node`, async (given) => {
    const { cluster, clients } = given;
    const { keys } = await createApp(cluster, { keys: [{ capability: '{"[*]*":["*"]}' }] });
    const { client, line } = await clients.roaming(1, { sdk, key: keys[0] });
    const of = (name) => `shaped-${name}-${sdk}`;
    const quiet = await attach(client, of('quiet'), { params: { echo: 'false' } });
    const deaf = await attach(client, of('modes'), { modes: ['SUBSCRIBE'] });
    const crowd = await attach(client, of('crowd'), { params: { occupancy: 'metrics.subscribers' } });
    const meta = await attach(client, '[meta]connection.lifecycle');
    await cluster.without(1, async () => {
      const back = () => [quiet, deaf, crowd, meta].every(({ channel }) => channel.state === 'attached');
      await until(() => line.came.size > 1 && client.connection.state === 'connected' && back(), {
        what: 'the client and its channels to be back',
      });
      const other = await clients.realtime(3, { sdk, key: keys[0], clientId: 'ada' });
      const channel = other.channels.get(of('quiet'));
      await channel.attach();
      await quiet.channel.publish('m', 'mine');
      await channel.publish({ name: 'm', data: 'theirs', extras: { ephemeral: true } });
      await until(() => quiet.data.includes('theirs'), { what: 'the message of another' });
      assert.deepEqual(quiet.data, ['theirs']);
      assert.deepEqual(await texts(clients.rest(2, { key: keys[0] }), of('quiet')), ['mine']);
      assert.equal((await refusal(deaf.channel.publish('m', 'no'))).code, 40165);
      await other.channels.get(of('crowd')).subscribe(() => {});
      const counted = () => crowd.data.some(({ metrics }) => metrics?.subscribers === 2);
      await until(counted, { what: 'two subscribers', within: 45_000 });
      const told = () => meta.data.some(({ connectionId }) => connectionId === other.connection.id);
      await until(told, { what: 'the other connection to be told of' });
    });
  });
}

/** The texts of a channel's history. */
async function texts(rest, name) {
  return (await history(rest, name)).map(({ data }) => data);
}

scenario('who may not hear of metachannels is told so, and there are no others', async ({ clients }) => {
  const client = await clients.realtime(3);
  assert.equal((await refusal(client.channels.get('[meta]channel.lifecycle').attach())).code, 40160);
  assert.equal((await refusal(client.channels.get('[meta]nothing').attach())).code, 40010);
});

scenario('connections tell their coming and going on [meta]connection.lifecycle', async ({ cluster, clients }) => {
  const { keys } = await createApp(cluster, { keys: [{ capability: '{"[*]*":["*"]}' }] });
  const meta = (await clients.realtime(1, { key: keys[0] })).channels.get('[meta]connection.lifecycle');
  const events = [];
  await meta.subscribe(({ name, data }) => events.push(`${name} ${data.connectionId} ${data.clientId}`));
  const other = await clients.realtime(3, { key: keys[0], clientId: 'ada' });
  const id = other.connection.id;
  await until(() => events.includes(`connection.opened ${id} ada`), { what: 'connection.opened' });
  other.close();
  await until(() => events.includes(`connection.closed ${id} ada`), { what: 'connection.closed' });
});

scenario('a channel tells its coming and going on [meta]channel.lifecycle', async ({ cluster, clients }) => {
  const { keys } = await createApp(cluster, { keys: [{ capability: '{"[*]*":["*"]}' }] });
  const meta = (await clients.realtime(1, { key: keys[0] })).channels.get('[meta]channel.lifecycle');
  const events = [];
  await meta.subscribe(({ name, data }) => events.push([name, data.channelId ?? data.name]));
  const channel = (await clients.realtime(2, { key: keys[0] })).channels.get('lifecycle-seen');
  await channel.attach();
  await until(() => events.some(([event, id]) => event === 'channel.opened' && id === 'lifecycle-seen'), {
    what: 'channel.opened',
  }).catch((error) => {
    throw new Error(`${error.message}; ${JSON.stringify(events)}`);
  });
  await channel.detach();
  await until(() => events.some(([event, id]) => event === 'channel.closed' && id === 'lifecycle-seen'), {
    what: 'channel.closed',
  });
  assert.equal((await refusal(meta.publish('m', 'x'))).code, 40160);
});

scenario('detach ends the flow, also when the node is another one by then', async (given) => {
  const { clients } = given;
  const name = 'persisted:detached';
  const { client, line } = await clients.roaming(1);
  const seen = await attach(client, name);
  line.move(2);
  line.cut();
  await state(seen.channel, 'attached');
  await seen.channel.detach();
  await publish(clients, 3, name, ['unheard']);
  const fresh = once(seen.channel, 'attached', { what: 'attached' });
  await seen.channel.attach();
  assert.equal((await fresh).resumed, false);
  await publish(clients, 3, name, ['heard']);
  await until(() => seen.data.length > 0, { what: 'a message' });
  await inTime(pause(200), { what: 'stragglers' });
  assert.deepEqual(seen.data, ['heard']);
});

scenario('a message is denied by its size, its client, its ids; the next one goes through', async ({ clients }) => {
  const client = await clients.realtime(1, { clientId: 'ada', maxMessageSize: 10_000_000 });
  const seen = await attach(await clients.realtime(2), 'limits');
  const channel = client.channels.get('limits');
  for (const [message, code] of [
    [{ data: 'x'.repeat(70_000) }, 40009],
    [{ data: 'x', clientId: 'bob' }, 40012],
    [
      [
        { id: 'one:0', data: 'x' },
        { id: 'two:1', data: 'y' },
      ],
      40031,
    ],
  ]) {
    const error = await refusal(channel.publish(message), JSON.stringify(message).slice(0, 60));
    assert.equal(error.code, code, describe(error));
  }
  await channel.publish('m', 'fine');
  await until(() => seen.data.length > 0, { what: 'a message' });
  assert.deepEqual(seen.data, ['fine']);
  assert.equal(seen.messages[0].clientId, 'ada');
});
