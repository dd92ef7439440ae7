// Connections that outlive sockets, nodes and credentials: resume and recover anywhere, takeover, drain, heartbeats.

import assert from 'node:assert/strict';
import { setTimeout as after } from 'node:timers/promises';

import { claims, jwt } from './lib/jwt.mjs';
import { ACTION, RawClient } from './lib/raw.mjs';
import { Subscriber, connected, refusal, state } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { inTime, once, until } from './lib/wait.mjs';

const AUTH = 17;
const RESUMED = 4;
const BOTH = [2, 1];

const scenario = suite();

/** A raw connection to node `id`, and its CONNECTED. */
async function open(cluster, id, query = { key: cluster.key }) {
  const raw = await RawClient.open(cluster.url(id), query);
  return { raw, welcome: await raw.next(ACTION.CONNECTED) };
}

for (const sdk of BOTH) {
  scenario(`ably-js ${sdk}: moved to another node, the connection and its channels go on`, async ({ clients }) => {
    const name = `move-${sdk}`;
    const { client, line } = await clients.roaming(1, { sdk });
    const seen = await Subscriber.attach(client, name);
    const { id } = client.connection;
    const speaker = (await clients.realtime(3)).channels.get(name);
    await speaker.publish('m', 'before');
    line.move(2);
    line.refuse(true);
    line.cut();
    await speaker.publish('m', 'meanwhile');
    line.refuse(false);
    await speaker.publish('m', 'after');
    await seen.received(3);
    assert.deepEqual(seen.data, ['before', 'meanwhile', 'after']);
    assert.equal(client.connection.id, id);
    assert.deepEqual(seen.losses, []);
  });

  scenario(`ably-js ${sdk}: its node is killed under it while it publishes`, async ({ cluster, clients }) => {
    const name = `killed-${sdk}`;
    const { client } = await clients.roaming(2, { sdk });
    const seen = await Subscriber.attach(client, name);
    const other = await Subscriber.attach(await clients.realtime(3), name);
    const { id } = client.connection;
    await seen.channel.publish('m', '0');
    await cluster.without(2, async () => {
      const texts = ['1', '2', '3', '4', '5'];
      await Promise.all(texts.map((text) => seen.channel.publish('m', text)));
      await Promise.all([seen.received(6), other.received(6)]);
    });
    for (const one of [seen, other]) assert.deepEqual(one.data, ['0', '1', '2', '3', '4', '5']);
    assert.equal(client.connection.id, id);
  });

  scenario(`ably-js ${sdk}: recovered by another process on another node`, async ({ clients }) => {
    const name = `recover-${sdk}`;
    const { client, line } = await clients.roaming(1, { sdk });
    const seen = await Subscriber.attach(client, name);
    await seen.channel.publish('m', 'before');
    await seen.received(1);
    const { id, key } = client.connection;
    const recoveryKey = sdk === 2 ? client.connection.createRecoveryKey() : client.connection.recoveryKey;
    line.die();
    await (await clients.realtime(3)).channels.get(name).publish('m', 'meanwhile');
    const heir = await clients.realtime(2, { sdk, recover: recoveryKey });
    const taken = await Subscriber.attach(heir, name);
    await taken.received(1);
    assert.deepEqual(taken.data, ['meanwhile']);
    assert.equal(heir.connection.id, id);
    assert.notEqual(heir.connection.key, key);
    await heir.channels.get(name).publish('m', 'after');
    await taken.received(2);
  });

  scenario(`ably-js ${sdk}: capabilities go up and down in band`, async ({ clients }) => {
    const names = [`up-${sdk}`, `down-${sdk}`];
    const capabilities = [
      { [names[0]]: ['subscribe'], [names[1]]: ['subscribe', 'publish'] },
      { [names[0]]: ['subscribe', 'publish'] },
    ];
    const rest = clients.rest(3);
    const tokens = [];
    for (const capability of capabilities)
      tokens.push((await rest.auth.requestToken({ clientId: 'ada', capability })).token);
    const client = await clients.realtime(1, { sdk, token: tokens[0] });
    const { id } = client.connection;
    const [up, down] = names.map((name) => client.channels.get(name));
    await Promise.all([up.attach(), down.attach()]);
    assert.equal((await refusal(up.publish('m', 'x'))).code, 40160);
    await down.publish('m', 'x');

    const failed = once(down, 'failed', { what: 'the channel that is not allowed any more to fail' });
    await client.auth.authorize(undefined, { token: tokens[1] });
    assert.equal(client.connection.id, id);
    await up.publish('m', 'allowed without attaching again');
    assert.equal((await failed).reason.code, 40160);
    assert.equal(up.state, 'attached');
  });

  scenario(`ably-js ${sdk}: tokens run out and are renewed; nothing is lost`, async ({ clients }) => {
    const name = `expiry-${sdk}`;
    let issued = 0;
    const authCallback = (params, done) => {
      issued++;
      clients
        .rest(2)
        .auth.requestToken({ ...params, clientId: 'ada', ttl: 4_000 })
        .then((token) => done(null, token), done);
    };
    const client = await clients.realtime(1, { sdk, authCallback });
    const seen = await Subscriber.attach(client, name);
    const { id } = client.connection;
    const speaker = (await clients.realtime(3)).channels.get(name);
    let sent = 0;
    while (issued < 3) {
      await speaker.publish('m', String(sent++));
      await after(100);
    }
    await seen.received(sent);
    assert.deepEqual(
      seen.data,
      Array.from({ length: sent }, (_, n) => String(n)),
    );
    assert.equal(client.connection.id, id);
    assert.deepEqual(seen.losses, []);
  });

  scenario(`ably-js ${sdk}: a node that is drained sends its clients elsewhere`, async ({ cluster, clients }) => {
    const name = `drain-${sdk}`;
    const { client } = await clients.roaming(1, { sdk });
    const seen = await Subscriber.attach(client, name);
    const { id } = client.connection;
    const speaker = (await clients.realtime(2)).channels.get(name);
    await speaker.publish('m', 'before');
    const told = once(client.connection, 'disconnected', { what: 'the node to say so' });
    process.kill(cluster.node(1).pid, 'SIGTERM');
    try {
      const { reason } = await told;
      assert.ok([50310, 80003].includes(reason?.code), JSON.stringify(reason));
      await speaker.publish('m', 'meanwhile');
      await connected(client);
      await seen.received(2);
      assert.deepEqual(seen.data, ['before', 'meanwhile']);
      assert.equal(client.connection.id, id);
      assert.deepEqual(seen.losses, []);
      await until(() => !cluster.living().includes(1), { what: 'the node to end' });
    } finally {
      if (cluster.living().includes(1)) await cluster.kill(1);
      await cluster.restart(1);
    }
  });
}

scenario('whoever resumes takes over from a socket that still lives', async ({ cluster, clients }) => {
  const { raw: old, welcome } = await open(cluster, 1);
  old.send({ action: ACTION.ATTACH, channel: 'takeover' });
  await old.next(ACTION.ATTACHED);
  const heirs = [];
  for (const node of [1, 2, 3]) {
    const { raw, welcome: again } = await open(cluster, node, {
      key: cluster.key,
      resume: welcome.connectionDetails.connectionKey,
    });
    assert.equal(again.connectionId, welcome.connectionId);
    assert.equal(again.error, undefined);
    heirs.push(raw);
  }
  await Promise.all([old, heirs[0], heirs[1]].map((raw) => raw.gone()));
  const last = heirs[2];
  last.send({ action: ACTION.ATTACH, channel: 'takeover' });
  await last.next(ACTION.ATTACHED);
  await clients.rest(1).channels.get('takeover').publish('m', 'x');
  await last.next(ACTION.MESSAGE);
  assert.equal(old.frames.filter(({ action }) => action === ACTION.MESSAGE).length, 0);
  last.close();
});

scenario('what is sent again on another node is answered as it was, and stored once', async ({ cluster, clients }) => {
  const name = 'again';
  const publish = (msgSerial) => ({
    action: ACTION.MESSAGE,
    channel: name,
    msgSerial,
    messages: [{ data: `serial ${msgSerial}` }],
  });
  const { raw, welcome } = await open(cluster, 1);
  for (const serial of [0, 1]) raw.send(publish(serial));
  const first = [];
  while (first.length < 2) first.push(...(await raw.next(ACTION.ACK)).res.map(({ serials }) => serials[0]));
  raw.close();
  await cluster.without(1, async () => {
    const { raw: heir } = await open(cluster, 2, { key: cluster.key, resume: welcome.connectionDetails.connectionKey });
    for (const serial of [0, 1, 2]) heir.send(publish(serial));
    const again = [];
    while (again.length < 3) again.push(...(await heir.next(ACTION.ACK)).res.map(({ serials }) => serials[0]));
    assert.deepEqual(again.slice(0, 2), first);
    heir.close();
    const { items } = await clients.rest(3).channels.get(name).history({ direction: 'forwards' });
    assert.deepEqual(
      items.map(({ data }) => data),
      ['serial 0', 'serial 1', 'serial 2'],
    );
  });
});

scenario('a key that cannot be resumed gives a new connection and says why', async ({ cluster }) => {
  for (const key of ['nonsense', 'aaaaaaaaaaaaaaaa!bbbbbbbbbbbbbbbb', '!']) {
    const { raw, welcome } = await open(cluster, 2, { key: cluster.key, resume: key });
    assert.equal(welcome.error?.code, 80018, key);
    assert.ok(!key.startsWith(welcome.connectionId));
    raw.close();
  }
});

scenario('a connection is not resumed by somebody else', async ({ cluster }) => {
  const { raw, welcome } = await open(cluster, 1, { access_token: jwt(cluster.key, claims({ clientId: 'ada' })) });
  const resume = welcome.connectionDetails.connectionKey;
  const { raw: other, welcome: theirs } = await open(cluster, 2, {
    access_token: jwt(cluster.key, claims({ clientId: 'bob' })),
    resume,
  });
  assert.notEqual(theirs.connectionId, welcome.connectionId);
  assert.equal(theirs.error?.code, 80011);
  raw.send({ action: ACTION.HEARTBEAT, id: 'alive' });
  assert.equal((await raw.next(ACTION.HEARTBEAT)).id, 'alive');
  raw.close();
  other.close();
});

scenario('the server asks for a new token in time, and ends the connection when none comes', async ({ cluster }) => {
  const token = (seconds) =>
    jwt(cluster.key, { ...claims({ clientId: 'ada' }), exp: Math.floor(Date.now() / 1000) + seconds });
  const { raw, welcome } = await open(cluster, 1, { access_token: token(33) });
  await inTime(raw.next(AUTH), { what: 'the server to ask for a token' });
  raw.send({ action: AUTH, auth: { accessToken: token(7) } });
  assert.equal((await raw.next(ACTION.CONNECTED)).connectionId, welcome.connectionId);
  const { error } = await raw.next(ACTION.DISCONNECTED);
  assert.equal(error.code, 40142);
  await raw.gone();
  const { raw: heir, welcome: again } = await open(cluster, 3, {
    access_token: token(60),
    resume: welcome.connectionDetails.connectionKey,
  });
  assert.equal(again.connectionId, welcome.connectionId);
  heir.close();
});

scenario('a bad token in band ends the connection for good', async ({ cluster }) => {
  const { raw } = await open(cluster, 2, { access_token: jwt(cluster.key, claims({ clientId: 'ada' })) });
  raw.send({ action: AUTH, auth: { accessToken: jwt(cluster.key, claims({ clientId: 'bob' })) } });
  const { error, channel } = await raw.next(ACTION.ERROR);
  assert.equal(channel, undefined);
  assert.equal(error.code, 40102);
  await raw.gone();
});

scenario('a token that ran out is said to have, on connecting', async ({ cluster }) => {
  const past = Math.floor(Date.now() / 1000) - 100;
  const raw = await RawClient.open(cluster.url(1), { access_token: jwt(cluster.key, { iat: past - 100, exp: past }) });
  assert.equal((await raw.next(ACTION.ERROR)).error.code, 40142);
  await raw.gone();
});

scenario('an idle client hears a heartbeat within maxIdleInterval, and its pings come back', async ({ cluster }) => {
  const { raw, welcome } = await open(cluster, 3);
  const { maxIdleInterval } = welcome.connectionDetails;
  assert.ok(maxIdleInterval > 0 && maxIdleInterval <= 15_000);
  raw.send({ action: ACTION.HEARTBEAT, id: 'mine' });
  assert.equal((await raw.next(ACTION.HEARTBEAT)).id, 'mine');
  const began = performance.now();
  const find = () => raw.frames.find(({ action, id }) => action === ACTION.HEARTBEAT && id === undefined);
  await until(find, { what: 'a heartbeat', within: maxIdleInterval + 2_000 });
  assert.ok(performance.now() - began <= maxIdleInterval + 1_000);
  raw.close();
});

scenario('protocol versions 2 to 6 and later are spoken, others refused', async ({ cluster }) => {
  for (const v of ['2', '3', '4', '5', '6', '7']) {
    const { raw } = await open(cluster, 1, { key: cluster.key, v });
    raw.close();
  }
  for (const v of ['1', '1.2', '']) {
    const raw = await RawClient.open(cluster.url(1), { key: cluster.key, v });
    assert.equal((await raw.next(ACTION.ERROR)).error.code, 40017, v);
    raw.close();
  }
});

for (const sdk of BOTH) {
  scenario(`ably-js ${sdk} over Comet: attach, publish, presence, move to another node`, async ({ clients }) => {
    const name = `comet-${sdk}`;
    const { client, line } = await clients.roaming(1, {
      sdk,
      clientId: 'ada',
      transports: ['comet'],
      useBinaryProtocol: false,
    });
    const seen = await Subscriber.attach(client, name);
    await seen.channel.presence.enter('over http');
    const other = await Subscriber.attach(await clients.realtime(2), name);
    await seen.channel.publish('m', 'a');
    await other.channel.publish('m', 'b');
    await seen.received(2);
    const { id } = client.connection;
    line.move(3);
    line.cut();
    await other.channel.publish('m', 'c');
    await seen.received(3);
    assert.deepEqual(seen.data, ['a', 'b', 'c']);
    assert.equal(client.connection.id, id);
    assert.deepEqual(
      (await other.channel.presence.get()).map(({ clientId }) => clientId),
      ['ada'],
    );
    client.close();
    await state(client.connection, 'closed');
  });
}

for (const sdk of BOTH) {
  scenario(`ably-js ${sdk} over Comet, behind a balancer that gives each connection to another node`, async (given) => {
    const { cluster, clients } = given;
    const name = `comet-spread-${sdk}`;
    const line = await clients.line(1);
    line.spread();
    const options = { sdk, port: line.port, clientId: 'ada', transports: ['comet'], useBinaryProtocol: false };
    const client = await clients.connect(options);
    const seen = await Subscriber.attach(client, name);
    const other = await Subscriber.attach(await clients.realtime(2), name);
    const { id } = client.connection;
    await seen.channel.presence.enter('over http');
    const sent = [];
    for (let i = 0; i < 20; i++) {
      sent.push(`to-${i}`, `from-${i}`);
      await other.channel.publish('m', `to-${i}`);
      await seen.channel.publish('m', `from-${i}`);
    }
    await Promise.all([seen, other].map((one) => one.received(sent.length)));
    assert.deepEqual(seen.data.toSorted(), sent.toSorted());
    assert.deepEqual(seen.data, other.data);
    assert.equal(client.connection.id, id, 'one connection all the time');
    assert.ok(line.came.size > 1, 'requests came to several nodes');
    client.close();
    await state(client.connection, 'closed');
    await until(async () => (await other.channel.presence.get()).length === 0, { what: 'ada to have left' });
  });
}

scenario('requests over Comet are relayed to the node that holds the connection, while it lives', async ({ cluster }) => {
  const request = async (node, path, body) => {
    const target = new URL(path, cluster.url(node));
    const headers = { 'content-type': 'application/json' };
    const answer = await inTime(fetch(target, { method: body ? 'POST' : 'GET', headers, body: body && JSON.stringify(body) }), {
      what: `${path} on node ${node}`,
    });
    const text = await answer.text();
    return { status: answer.status, frames: text ? JSON.parse(text) : [] };
  };
  const query = new URLSearchParams({ key: cluster.key, v: '6', format: 'json', stream: 'false', clientId: 'ada' });
  const [welcome] = (await request(1, `/comet/connect?${query}`)).frames;
  const comet = `/comet/${encodeURIComponent(welcome.connectionDetails.connectionKey)}`;
  const channel = 'comet-relayed';
  const waiting = request(2, `${comet}/recv`);
  await request(3, `${comet}/send`, [{ action: ACTION.ATTACH, channel }]);
  const [attached] = (await waiting).frames;
  assert.equal(attached.action, ACTION.ATTACHED);
  await request(2, `${comet}/send`, [{ action: ACTION.MESSAGE, channel, msgSerial: 0, messages: [{ data: 'hi' }] }]);
  const heard = [];
  while (heard.length < 2) heard.push(...(await request(3, `${comet}/recv`)).frames.map((frame) => frame.action));
  assert.deepEqual(heard.toSorted(), [ACTION.ACK, ACTION.MESSAGE]);
  const bad = await request(2, `${comet}/send`, { action: ACTION.ATTACH, channel });
  assert.equal(bad.status, 400, 'what the other node says of it');
  await cluster.without(1, async () => {
    const over = await request(2, `${comet}/recv`);
    assert.equal(over.frames.error.code, 80003);
    const [again] = (await request(2, `/comet/connect?${query}&resume=${encodeURIComponent(welcome.connectionDetails.connectionKey)}`)).frames;
    assert.equal(again.connectionId, welcome.connectionId);
  });
  const unknown = await request(2, '/comet/nobody!9-x.y/recv');
  assert.equal(unknown.frames.error.code, 80003);
});

scenario('a raw resume tells each channel the truth about itself', async ({ cluster, clients }) => {
  const { raw, welcome } = await open(cluster, 1);
  const serials = {};
  for (const channel of ['persisted:truth-a', 'persisted:truth-b']) {
    raw.send({ action: ACTION.ATTACH, channel });
    serials[channel] = (await raw.next(ACTION.ATTACHED)).channelSerial;
  }
  raw.close();
  await clients.rest(2).channels.get('persisted:truth-a').publish('m', 'missed');
  const { raw: heir } = await open(cluster, 3, { key: cluster.key, resume: welcome.connectionDetails.connectionKey });
  for (const [channel, backlog] of [
    ['persisted:truth-b', 0],
    ['persisted:truth-a', 2],
  ]) {
    heir.send({ action: ACTION.ATTACH, channel, channelSerial: serials[channel] });
    const { flags } = await heir.next(ACTION.ATTACHED);
    assert.equal(flags & (RESUMED | 2), RESUMED | backlog, channel);
  }
  assert.deepEqual(
    (await heir.next(ACTION.MESSAGE)).messages.map(({ data }) => data),
    ['missed'],
  );
  heir.close();
});
