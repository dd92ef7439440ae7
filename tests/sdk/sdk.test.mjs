// The official SDKs, unchanged, against three processes: what one node takes the others give.

import assert from 'node:assert/strict';
import path from 'node:path';
import readline from 'node:readline';
import { fileURLToPath } from 'node:url';

import { ROOT, startPiped } from './lib/process.mjs';
import { ACTION, RawClient } from './lib/raw.mjs';
import { Subscriber, state } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { inTime, once } from './lib/wait.mjs';

const PYTHON = process.env.FIRTH_PYTHON ?? path.join(ROOT, 'target/venv/bin/python');
const CHAT = fileURLToPath(new URL('python/chat.py', import.meta.url));

const scenario = suite();

for (const useBinaryProtocol of [false, true]) {
  const format = useBinaryProtocol ? 'msgpack' : 'json';

  scenario(`ably-js, ${format}: published on node 1, received on nodes 2 and 3`, async ({ clients }) => {
    const name = `across-${format}`;
    const publisher = await clients.realtime(1, { useBinaryProtocol, clientId: 'ada' });
    const subscribers = [];
    for (const node of [2, 3]) {
      // One subscriber speaks the other format, so that the server has to translate.
      const client = await clients.realtime(node, { useBinaryProtocol: node === 2 });
      subscribers.push(await Subscriber.attach(client, name));
    }
    const bytes = Buffer.from([0, 1, 2, 127, 128, 254, 255]);
    const extras = { headers: { kind: 'test' } };
    const channel = publisher.channels.get(name);
    await channel.publish('text', 'grüß dich, 世界 🌊');
    await channel.publish('object', { a: [1, 2.5, null], b: { c: true } });
    await channel.publish('bytes', bytes);
    await channel.publish('nothing', null);
    await channel.publish([{ name: 'one', data: '1' }, { name: 'two', data: '2', extras }]);

    for (const subscriber of subscribers) {
      await subscriber.received(6);
      const [text, object, binary, nothing, one, two] = subscriber.messages;
      assert.equal(text.data, 'grüß dich, 世界 🌊');
      assert.deepEqual(object.data, { a: [1, 2.5, null], b: { c: true } });
      assert.deepEqual(Buffer.from(binary.data), bytes);
      assert.equal(nothing.data ?? null, null);
      assert.deepEqual([one.name, one.data, two.name, two.data], ['one', '1', 'two', '2']);
      assert.deepEqual(two.extras, extras);
      for (const message of subscriber.messages) {
        assert.equal(message.clientId, 'ada');
        assert.equal(message.connectionId, publisher.connection.id);
        assert.ok(Math.abs(message.timestamp - Date.now()) < 60_000, `timestamp ${message.timestamp}`);
      }
      assert.deepEqual(subscriber.serials, [...subscriber.serials].sort(), 'serials sort as they were published');
      assert.equal(new Set(subscriber.serials).size, 6);
    }
    assert.deepEqual(subscribers[0].serials, subscribers[1].serials);
  });

  scenario(`ably-js, ${format}: history, REST publish and time of any node`, async ({ clients }) => {
    const name = `rest-${format}`;
    const live = await Subscriber.attach(await clients.realtime(3, { useBinaryProtocol }), name);
    const bytes = Buffer.from([255, 0, 1]);
    await clients.rest(1, { useBinaryProtocol }).channels.get(name).publish('a', { n: 1 });
    await clients.rest(2, { useBinaryProtocol }).channels.get(name).publish('b', bytes);
    await clients.rest(3, { useBinaryProtocol }).channels.get(name).publish([{ name: 'c', data: 'x' }, { name: 'd' }]);
    await live.received(4);
    assert.deepEqual(live.messages.map((message) => message.name), ['a', 'b', 'c', 'd']);

    for (const node of [1, 2, 3]) {
      const rest = clients.rest(node, { useBinaryProtocol });
      const backwards = await rest.channels.get(name).history();
      assert.deepEqual(backwards.items.map((message) => message.name), ['d', 'c', 'b', 'a']);
      assert.deepEqual(Buffer.from(backwards.items[2].data), bytes);
      assert.deepEqual(backwards.items.map((message) => message.serial), [...live.serials].reverse());
      const forwards = await rest.channels.get(name).history({ direction: 'forwards', limit: 2 });
      assert.deepEqual(forwards.items.map((message) => message.name), ['a', 'b']);
      assert.deepEqual(forwards.items[0].data, { n: 1 });
      assert.ok(Math.abs((await rest.time()) - Date.now()) < 60_000);
    }
  });

  scenario(`ably-js, ${format}: a REST publish repeated with its id is stored once`, async ({ clients }) => {
    const name = `idempotent-${format}`;
    const live = await Subscriber.attach(await clients.realtime(2, { useBinaryProtocol }), name);
    const message = { id: 'order-4711:0', name: 'paid', data: '10' };
    for (const node of [1, 3, 1]) await clients.rest(node, { useBinaryProtocol }).channels.get(name).publish(message);
    await clients.rest(2, { useBinaryProtocol }).channels.get(name).publish('after', 'x');
    await live.received(2);
    assert.deepEqual(live.messages.map((one) => one.name), ['paid', 'after']);
  });

  scenario(`ably-js, ${format}: ping, detach, attach again, close`, async ({ clients }) => {
    const name = `life-${format}`;
    const client = await clients.realtime(2, { useBinaryProtocol });
    assert.ok((await client.connection.ping()) >= 0);
    const gone = await Subscriber.attach(client, name);
    await gone.channel.detach();
    assert.equal(gone.channel.state, 'detached');

    const stays = await Subscriber.attach(await clients.realtime(3, { useBinaryProtocol }), name);
    // A publish needs no attachment.
    await client.channels.get(name).publish('m', 'while detached');
    await stays.received(1);
    assert.deepEqual(gone.data, []);

    await gone.channel.attach();
    await (await clients.realtime(1)).channels.get(name).publish('m', 'attached again');
    await gone.received(1);
    assert.deepEqual(gone.data, ['attached again']);
    client.close();
    await state(client.connection, 'closed');
  });

  scenario(`ably-js, ${format}: echoMessages off hides one's own messages only`, async ({ clients }) => {
    const name = `echo-${format}`;
    const mute = await clients.realtime(1, { useBinaryProtocol, echoMessages: false });
    const own = await Subscriber.attach(mute, name);
    const other = await Subscriber.attach(await clients.realtime(2, { useBinaryProtocol }), name);
    await own.channel.publish('m', 'mine');
    await other.channel.publish('m', 'theirs');
    await Promise.all([own.received(1), other.received(2)]);
    assert.deepEqual(own.data, ['theirs']);
    assert.deepEqual(other.data, ['mine', 'theirs']);
  });

  scenario(`ably-python, ${format}: across nodes and with ably-js`, async ({ cluster, clients }) => {
    const name = `python-${format}`;
    const javascript = await Subscriber.attach(await clients.realtime(3, { useBinaryProtocol }), name);
    const hosts = [2, 1].map((node) => `127.0.0.1:${cluster.port(node)}`);
    const python = startPiped([PYTHON, CHAT, cluster.key, name, ...hosts, '4', format]);
    let complaints = '';
    python.stderr.setEncoding('utf8').on('data', (part) => (complaints += part));
    try {
      const lines = readline.createInterface({ input: python.stdout });
      assert.equal(await once(lines, 'line', { what: 'python to attach' }), 'ready');
      await javascript.channel.publish('greeting', { from: 'javascript' });
      await javascript.received(1);
      const answer = once(lines, 'line', { what: 'python to receive 4 messages', within: 40_000 });
      python.stdin.write('publish\n');
      const received = JSON.parse(await answer);
      await inTime(python.ended, { what: 'python to close' });
      assert.equal(python.exitCode, 0);

      const wanted = [
        ['greeting', { from: 'javascript' }],
        ['text', 'hello from python'],
        ['object', { language: 'python', n: 1 }],
        ['bytes', { base64: Buffer.from([0, 1, 254, 255]).toString('base64') }],
      ];
      assert.deepEqual(received.map((message) => [message.name, message.data]), wanted);
      await javascript.received(4);
      assert.deepEqual(javascript.messages.map((message) => message.name), wanted.map(([one]) => one));
      assert.deepEqual(Buffer.from(javascript.data[3]), Buffer.from([0, 1, 254, 255]));
    } catch (error) {
      throw new Error(`${error.message}\n${complaints}`);
    } finally {
      python.kill('SIGKILL');
    }
  });
}

scenario('CLOSE is answered by CLOSED, then the socket ends', async ({ cluster }) => {
  const raw = await RawClient.open(cluster.url(1), { key: cluster.key });
  await raw.next(ACTION.CONNECTED);
  raw.send({ action: ACTION.HEARTBEAT, id: 'ping-4711' });
  assert.equal((await raw.next(ACTION.HEARTBEAT)).id, 'ping-4711');
  raw.send({ action: ACTION.CLOSE });
  await raw.next(ACTION.CLOSED);
  await raw.gone();
});

scenario('ably-js resumes on a dropped socket: same connection, nothing lost, nothing doubled', async ({ clients }) => {
  const name = 'dropped';
  const client = await clients.realtime(1);
  const subscriber = await Subscriber.attach(client, name);
  const publisher = (await clients.realtime(2)).channels.get(name);
  await publisher.publish('m', 'before');
  await subscriber.received(1);
  const { id } = client.connection;

  const disconnected = new Promise((resolve) => client.connection.once('disconnected', resolve));
  // The transport dies without a word, as it does when a phone leaves the network.
  client.connection.connectionManager.activeProtocol.transport.wsConnection.terminate();
  await inTime(disconnected, { what: 'the SDK to notice' });
  await publisher.publish('m', 'meanwhile');
  await state(client.connection, 'connected');
  await publisher.publish('m', 'after');
  await subscriber.received(3);
  assert.deepEqual(subscriber.data, ['before', 'meanwhile', 'after']);
  assert.equal(client.connection.id, id);
  assert.deepEqual(subscriber.losses, []);
});

