// What deserves an error gets it and nothing else is disturbed: a bystander is checked beside every case.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';

import { identities, withVersion } from './lib/data.mjs';
import { run } from './lib/process.mjs';
import { ACTION, RawClient } from './lib/raw.mjs';
import { Subscriber } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { once } from './lib/wait.mjs';

const MESSAGE_BYTES_MAX = 65_536;
const FRAME_BYTES_MAX = 524_288;
const EXIT_CONFIG = 2;

const scenario = suite();

/** A scenario with clients on node 1, where the bad input goes, and on node 2, who must not notice. */
function badInput(name, body) {
  scenario(name, async (given) => {
    const { cluster, clients } = given;
    const key = { key: cluster.key };
    const open = (query = key) => RawClient.open(cluster.url(1), query);
    const live = await Promise.all([1, 2].map((node) => clients.realtime(node)));
    const ids = live.map((client) => client.connection.id);
    const changes = [];
    for (const client of live) client.connection.on((change) => changes.push(change));
    const bystanders = await Promise.all(live.map((client) => Subscriber.attach(client, 'bystanders')));
    const check = async (nodes = bystanders) => {
      const before = nodes.map((one) => one.messages.length);
      for (const one of nodes) await one.channel.publish('m', 'still here');
      await Promise.all(nodes.map((one, i) => one.received(before[i] + nodes.length)));
    };
    await check();
    await body({ ...given, open, check, bystanders });
    if (changes.length === 0) {
      await check();
      assert.deepEqual(live.map((client) => client.connection.id), ids);
    }
    assert.deepEqual(changes.filter((change) => change.current !== 'update'), [], 'the bystanders stay connected');
  });
}

async function connectedRaw(open) {
  const raw = await open();
  await raw.next(ACTION.CONNECTED);
  return raw;
}

/** The connection gets an ERROR for itself, not for a channel, and is closed. */
async function assertFatal(raw, { code, statusCode = 400 } = {}) {
  const { error, ...frame } = await raw.next(ACTION.ERROR);
  assert.ok(!('channel' in frame), 'an ERROR without channel ends the connection');
  assert.equal(error.statusCode, statusCode, JSON.stringify(error));
  if (code) assert.equal(error.code, code, JSON.stringify(error));
  assert.ok(error.message.length > 0);
  await raw.gone();
}

async function assertFails(client, code) {
  const change = await once(client.connection, 'failed', { what: 'the SDK to give up' });
  assert.equal(change.reason.code, code, change.reason.message);
  assert.equal(change.reason.statusCode, 401);
}

badInput('a wrong key: the SDK fails with 40101, REST answers 401', async ({ cluster, clients, open }) => {
  const wrong = `${cluster.key.split(':')[0]}:wrong`;
  for (const useBinaryProtocol of [true, false]) {
    const port = cluster.port(1);
    await assertFails(clients.create({ port, key: wrong, useBinaryProtocol }), 40101);
  }
  const { status, body, headers } = await cluster.rest(1, '/channels/x/messages', { key: wrong });
  assert.equal(status, 401);
  assert.equal(body.error.code, 40101);
  assert.equal(headers.get('content-type'), 'application/json');
  const publish = { method: 'POST', body: { data: 'x' }, key: wrong };
  assert.equal((await cluster.rest(1, '/channels/x/messages', publish)).status, 401);
  await assertFatal(await open({ key: wrong }), { code: 40101, statusCode: 401 });
});

badInput('no credential at all, and one that is no key', async ({ cluster, open }) => {
  for (const query of [{}, { key: '' }, { key: 'nonsense' }, { access_token: 'nonsense' }]) {
    const raw = await open(query);
    const { error } = await raw.next(ACTION.ERROR);
    assert.ok([401, 404].includes(error.statusCode), `${JSON.stringify(query)}: ${JSON.stringify(error)}`);
    await raw.gone();
  }
  const response = await fetch(new URL('/channels/x/messages', cluster.url(1)));
  assert.equal(response.status, 401);
  const where = await fetch(new URL('/firth/where?channel=x', cluster.url(1)));
  assert.equal(where.status, 401);
});

const UNPARSABLE = {
  'no JSON': 'this is no JSON',
  'half a frame': '{"action":15,"channel":"a","messages":[{"da',
  'a list': '[1,2,3]',
  'an action that is a text': '{"action":"publish"}',
  'no action': '{"channel":"a"}',
  'brackets without end': '['.repeat(100_000),
  'a messages field that is no list': '{"action":15,"channel":"a","msgSerial":0,"messages":7}',
};
for (const [what, frame] of Object.entries(UNPARSABLE)) {
  badInput(`an unparsable frame, ${what}: the connection ends with an error`, async ({ open }) => {
    const raw = await connectedRaw(open);
    raw.send(frame);
    await assertFatal(raw);
  });
}

badInput('unparsable MessagePack: the connection ends with an error', async ({ cluster, open }) => {
  // 0xc1 is never used; 0xdd ff… promises four billion elements; 0x91 repeated nests without end.
  for (const bytes of [[0xc1], [0xdd, 0xff, 0xff, 0xff, 0xff], new Array(100_000).fill(0x91)]) {
    const raw = await open({ key: cluster.key, format: 'msgpack' });
    raw.send(Buffer.from(bytes));
    await raw.gone();
    // CONNECTED and the ERROR; both are binary, so the second one is looked at for its action (0x09) and code.
    assert.ok(raw.frames.length >= 2, `${raw.frames.length} frames came`);
    assert.ok(raw.frames.at(-1).includes(Buffer.from('error')), 'the last frame carries an error');
  }
});

badInput('an oversized message: NACK 40009, and the connection goes on', async ({ cluster, open }) => {
  const raw = await connectedRaw(open);
  const publish = (msgSerial, data) =>
    raw.send({ action: ACTION.MESSAGE, channel: 'big', msgSerial, messages: [{ data }] });
  publish(0, 'x'.repeat(MESSAGE_BYTES_MAX + 1));
  const nack = await raw.next(ACTION.NACK);
  assert.deepEqual([nack.msgSerial, nack.count, nack.error.code], [0, 1, 40009]);
  publish(1, 'x'.repeat(MESSAGE_BYTES_MAX));
  const ack = await raw.next(ACTION.ACK);
  assert.deepEqual([ack.msgSerial, ack.count], [1, 1]);
  raw.close();

  const body = { data: 'x'.repeat(MESSAGE_BYTES_MAX + 1) };
  const { status, body: answer } = await cluster.rest(1, '/channels/big/messages', { method: 'POST', body });
  assert.deepEqual([status, answer.error.code], [413, 40009]);
  const history = await cluster.rest(2, '/channels/big/messages');
  assert.deepEqual(history.body.map((message) => message.data.length), [MESSAGE_BYTES_MAX]);
});

badInput('a frame beyond all bounds: the connection ends, the node reads no more of it', async ({ cluster, open }) => {
  const raw = await connectedRaw(open);
  const data = 'x'.repeat(4 * FRAME_BYTES_MAX);
  raw.send({ action: ACTION.MESSAGE, channel: 'big', msgSerial: 0, messages: [{ data }] });
  await raw.gone();
  assert.ok(!raw.frames.some((frame) => frame.action === ACTION.ACK));
  const body = { data: 'x'.repeat(64 * FRAME_BYTES_MAX) };
  const answer = await cluster.rest(1, '/channels/big/messages', { method: 'POST', body }).catch((error) => error);
  // A server may stop reading and close; one that answers says 413.
  assert.ok(answer instanceof Error || answer.status === 413, JSON.stringify(answer.status));
});

badInput('an unknown action: the connection ends with an error', async ({ open }) => {
  for (const action of [99, -1, 1e9]) {
    const raw = await connectedRaw(open);
    raw.send({ action });
    await assertFatal(raw);
  }
});

badInput('a channel name that is not allowed: 40010, and the connection goes on', async ({ cluster, clients, open }) => {
  const raw = await connectedRaw(open);
  const names = ['', ':colon', ',comma', ' space', '[unknown]x', 'line\nbreak', 'x'.repeat(5_000)];
  for (const [msgSerial, channel] of names.entries()) {
    raw.send({ action: ACTION.MESSAGE, channel, msgSerial, messages: [{ data: 'x' }] });
    const nack = await raw.next(ACTION.NACK);
    assert.deepEqual([nack.msgSerial, nack.error.code], [msgSerial, 40010], JSON.stringify(channel));
    if (channel === '') continue;
    raw.send({ action: ACTION.ATTACH, channel });
    const failed = await raw.next(ACTION.ERROR);
    assert.deepEqual([failed.channel, failed.error.code, failed.error.statusCode], [channel, 40010, 400]);
    const target = `/channels/${encodeURIComponent(channel)}/messages`;
    const { status, body } = await cluster.rest(1, target, { method: 'POST', body: { data: 'x' } });
    assert.deepEqual([status, body.error?.code], [400, 40010], JSON.stringify(channel));
  }
  raw.send({ action: ACTION.MESSAGE, channel: 'allowed', msgSerial: names.length, messages: [{ data: 'x' }] });
  assert.equal((await raw.next(ACTION.ACK)).msgSerial, names.length);
  raw.close();

  const client = await clients.realtime(1);
  await assert.rejects(client.channels.get(':colon').attach(), { code: 40010 });
  await assert.rejects(client.channels.get(',comma').publish('m', 'x'), { code: 40010 });
  assert.equal(client.connection.state, 'connected');
});

badInput('unknown paths, methods and bodies over REST get the protocol\'s error', async ({ cluster }) => {
  const cases = [
    ['/nowhere', {}, 404, 40400],
    ['/channels/x/messages', { method: 'PUT', body: {} }, 405, 40500],
    ['/channels/x/messages', { method: 'POST', body: '{"data":' }, 400, 40001],
    ['/channels/x/messages?limit=0', {}, 400, 40003],
    ['/channels/x/messages?limit=1001', {}, 400, 40003],
    ['/channels/x/messages?limit=many', {}, 400, 40003],
    ['/channels/x/messages?direction=sideways', {}, 400, 40003],
  ];
  for (const [target, options, status, code] of cases) {
    const answer = await cluster.rest(1, target, options);
    assert.deepEqual([answer.status, answer.body.error?.code], [status, code], `${options.method ?? 'GET'} ${target}`);
    assert.equal(answer.headers.get('x-ably-errorcode'), String(code));
  }
});

badInput('a protocol version from before resume by key', async ({ cluster, open }) => {
  await assertFatal(await open({ key: cluster.key, v: '1' }), { code: 40017 });
});

badInput('a config with an unknown field: exit code 2, file and field are named', async ({ cluster }) => {
  const { command } = cluster.node(1);
  const config = command[command.indexOf('--config') + 1];
  const good = await run([...command, '--check']);
  assert.equal(good.code, 0, good.stderr);

  const text = fs.readFileSync(config, 'utf8');
  const table = /^\s*\[[\w."-]+\]\s*$/m;
  const bad = path.join(path.dirname(config), 'with-unknown-field.toml');
  // At the top level, and inside the first table.
  const nested = table.test(text) ? [text.replace(table, (line) => `${line}\ncolour = "red"`)] : [];
  try {
    for (const wrong of [`colour = "red"\n${text}`, ...nested]) {
      fs.writeFileSync(bad, wrong);
      for (const flags of [['--check'], []]) {
        const argv = command.map((argument) => (argument === config ? bad : argument));
        const { code, stderr } = await run([...argv, ...flags]);
        assert.equal(code, EXIT_CONFIG, stderr);
        assert.ok(stderr.includes(bad) && stderr.includes('colour'), stderr);
      }
    }
    fs.writeFileSync(bad, 'this is = = no TOML');
    const { code, stderr } = await run([...command.map((one) => (one === config ? bad : one)), '--check']);
    assert.equal(code, EXIT_CONFIG, stderr);
    assert.ok(stderr.includes(bad), stderr);
    const absent = await run([...command.map((one) => (one === config ? `${bad}.absent` : one)), '--check']);
    assert.equal(absent.code, EXIT_CONFIG, absent.stderr);
    assert.ok(absent.stderr.includes(`${bad}.absent`), absent.stderr);
  } finally {
    fs.rmSync(bad, { force: true });
  }
});

// The last ones: node 3 is stopped for them.
const STOPPED = 3;

badInput('a data directory of another node: refused, the file is named, nothing in it is changed', async (given) => {
  const { cluster, check } = given;
  await cluster.kill(STOPPED);
  const found = identities(cluster.data);
  const own = path.dirname(found.find((one) => one.node === STOPPED).file);
  const others = path.dirname(found.find((one) => one.node === 2).file);
  const aside = `${own}.aside`;
  fs.renameSync(own, aside);
  try {
    fs.cpSync(others, own, { recursive: true });
    const before = fs.readFileSync(path.join(own, 'identity'));
    await assertRefuses(cluster.node(STOPPED), path.join(own, 'identity'));
    assert.deepEqual(fs.readFileSync(path.join(own, 'identity')), before);
  } finally {
    fs.rmSync(own, { recursive: true, force: true });
    fs.renameSync(aside, own);
  }
  await check();
  await cluster.restart(STOPPED);
});

badInput('a data directory of a newer version: refused, the file is named, nothing in it is changed', async (given) => {
  const { cluster, check } = given;
  await cluster.kill(STOPPED);
  const { file } = identities(cluster.data).find((one) => one.node === STOPPED);
  const original = fs.readFileSync(file);
  const newer = withVersion(original, 99);
  fs.writeFileSync(file, newer);
  try {
    const said = await assertRefuses(cluster.node(STOPPED), file);
    assert.match(said, /version 99/);
    assert.deepEqual(fs.readFileSync(file), newer);
  } finally {
    fs.writeFileSync(file, original);
  }
  await check();
  await cluster.restart(STOPPED);
});

/** The node's own command ends by itself, with an error that names the file. */
async function assertRefuses(node, file) {
  const { code, signal, stdout, stderr } = await run(node.command, { within: 30_000 });
  assert.ok(signal === null && code !== 0, `ended with ${code ?? signal}`);
  assert.ok(stderr.includes(file), `stderr should name ${file}:\n${stderr}\n${stdout}`);
  assert.doesNotMatch(stderr, /panicked/);
  return stderr;
}
