// Promise 8: tokens of every kind, what they allow, and their end; nobody gets in who may not.

import assert from 'node:assert/strict';
import { createHmac } from 'node:crypto';

import { createApp, deleteApp } from './lib/app.mjs';
import { claims, jwt } from './lib/jwt.mjs';
import { ACTION, RawClient } from './lib/raw.mjs';
import { Subscriber, refusal } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { once, until } from './lib/wait.mjs';

const BOTH = [2, 1];

const scenario = suite();

/** `POST /keys/…/requestToken` with a request as it stands; nothing but its own signature speaks for it. */
async function exchange(cluster, id, request, keyName = request.keyName) {
  const response = await fetch(new URL(`/keys/${keyName}/requestToken`, cluster.url(id)), {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'x-ably-version': '6' },
    body: JSON.stringify(request),
  });
  return { status: response.status, body: await response.json() };
}

/** What a bearer token is told when it asks node `id` for a channel's history. */
async function ask(cluster, id, token, channel = 'asked') {
  const response = await fetch(new URL(`/channels/${encodeURIComponent(channel)}/messages`, cluster.url(id)), {
    headers: { authorization: `Bearer ${Buffer.from(token).toString('base64')}`, 'x-ably-version': '6' },
  });
  return { status: response.status, code: (await response.json()).error?.code };
}

for (const sdk of BOTH) {
  scenario(
    `ably-js ${sdk}: a signed request becomes a token on any node, good on every node`,
    async ({ cluster, clients }) => {
      // As the server orders them.
      const capability = { [`signed-${sdk}`]: ['history', 'publish', 'subscribe'] };
      const request = await clients
        .rest(1, { sdk })
        .auth.createTokenRequest({ clientId: 'ada', capability: JSON.stringify(capability) });
      const { status, body } = await exchange(cluster, 2, request);
      assert.equal(status, 201);
      assert.deepEqual(JSON.parse(body.capability), capability);
      assert.equal(body.clientId, 'ada');
      assert.ok(body.expires - body.issued === 3_600_000, JSON.stringify(body));
      for (const node of [1, 3]) {
        const client = await clients.realtime(node, { sdk, token: body.token });
        assert.equal(client.auth.clientId, 'ada');
        await client.channels.get(`signed-${sdk}`).publish('m', String(node));
      }
      const rest = clients.rest(2, { sdk, token: body.token });
      const page = await rest.channels.get(`signed-${sdk}`).history();
      assert.deepEqual(
        page.items.map(({ data, clientId }) => [data, clientId]),
        [
          ['3', 'ada'],
          ['1', 'ada'],
        ],
      );
      assert.equal((await refusal(rest.channels.get('another').history())).code, 40160);
    },
  );

  scenario(
    `ably-js ${sdk}: a callback's token request, on a node that dies afterwards`,
    async ({ cluster, clients }) => {
      const authCallback = (params, done) =>
        clients
          .rest(1, { sdk })
          .auth.createTokenRequest({ ...params, clientId: 'ada' })
          .then((request) => done(null, request), done);
      const { client } = await clients.roaming(1, { sdk, authCallback });
      const seen = await Subscriber.attach(client, `callback-${sdk}`);
      await cluster.without(1, async () => {
        await clients.rest(2).channels.get(`callback-${sdk}`).publish('m', 'x');
        await seen.received(1);
      });
      assert.equal(client.auth.clientId, 'ada');
    },
  );

  scenario(`ably-js ${sdk}: a customer's JWT`, async ({ cluster, clients }) => {
    const name = `jwt-${sdk}`;
    const token = jwt(cluster.key, claims({ clientId: 'ada', capability: { [name]: ['publish', 'subscribe'] } }));
    const client = await clients.realtime(2, { sdk, token });
    const seen = await Subscriber.attach(client, name);
    await clients.rest(3, { sdk, token }).channels.get(name).publish('m', 'x');
    await seen.received(1);
    assert.equal(seen.messages[0].clientId, 'ada');
    assert.equal((await refusal(client.channels.get('another').attach())).code, 40160);
  });
}

scenario('a request is good once, on whichever node it is shown again', async ({ cluster, clients }) => {
  const request = await clients.rest(1).auth.createTokenRequest();
  assert.equal((await exchange(cluster, 1, request)).status, 201);
  for (const node of [1, 2, 3]) {
    const { status, body } = await exchange(cluster, node, request);
    assert.deepEqual([status, body.error?.code], [401, 40105], `node ${node}`);
  }
  await cluster.without(1, async () => {
    assert.equal((await exchange(cluster, 2, request)).body.error?.code, 40105);
  });
});

// The SDK refuses to sign what is no JSON.
function signedByHand(key, capability) {
  const at = key.indexOf(':');
  const request = { keyName: key.slice(0, at), capability, timestamp: Date.now(), nonce: crypto.randomUUID() };
  const text = [request.keyName, '', capability, '', request.timestamp, request.nonce, ''].join('\n');
  const mac = createHmac('sha256', key.slice(at + 1)).update(text).digest('base64');
  return { ...request, mac };
}

scenario('a request is refused for its clock, its signature, its key, its terms', async ({ cluster, clients }) => {
  const { auth } = clients.rest(1);
  const signed = (params) => auth.createTokenRequest(params);
  const now = Date.now();
  const old = await signed({ timestamp: now - 10 * 60_000 });
  const changed = { ...(await signed({ clientId: 'ada' })), clientId: 'bob' };
  const unknown = { ...(await signed()), keyName: `${cluster.app}.unknown` };
  const cases = [
    [old, 401, [40104]],
    [changed, 401, [40101]],
    [{ ...(await signed()), mac: 'AAAA' }, 401, [40101]],
    [unknown, 404, [40400]],
    [await signed({ ttl: -1 }), 400, [40003]],
    [await signed({ ttl: 25 * 3_600_000 }), 400, [40003]],
    [await signed({ capability: '{"a":[]}' }), 400, [40000]],
    [await signed({ capability: '{"a":["fly"]}' }), 400, [40000]],
    [signedByHand(cluster.key, 'nonsense'), 400, [40000]],
  ];
  for (const [request, status, codes] of cases) {
    const answer = await exchange(cluster, 2, request);
    assert.deepEqual(
      [answer.status, codes.includes(answer.body.error?.code)],
      [status, true],
      JSON.stringify([request, answer]),
    );
  }
});

scenario('a JWT is refused for its signature, its age, its key, its shape', async ({ cluster }) => {
  const past = Math.floor(Date.now() / 1000) - 1000;
  const good = jwt(cluster.key, claims({ clientId: 'ada' }));
  assert.equal((await ask(cluster, 1, good)).status, 200);
  const [header, body, signature] = good.split('.');
  const none = `${Buffer.from(JSON.stringify({ alg: 'none', kid: cluster.key.split(':')[0] })).toString('base64url')}.${body}.`;
  for (const [what, token, codes] of [
    ['another secret', jwt(cluster.key, {}, { secret: 'guess' }), [40144]],
    ['changed claims', `${header}.${Buffer.from('{"exp":9999999999}').toString('base64url')}.${signature}`, [40144]],
    ['no signature', none, [40144]],
    ['expired', jwt(cluster.key, { iat: past - 60, exp: past }), [40142]],
    ['unknown key', jwt(`${cluster.app}.unknown:secret`), [40101, 40400, 40130]],
    ['unknown app', jwt('nobody.unknown:secret'), [40101, 40400, 40130]],
    ['not a token', 'nonsense', [40005, 40101, 40143, 40144]],
  ]) {
    const { status, code } = await ask(cluster, 2, token);
    assert.ok(status >= 400 && status < 500 && codes.includes(code), `${what}: ${status} ${code}`);
  }
});

scenario('an Ably token inside a JWT is the one that counts', async ({ cluster, clients }) => {
  const { token } = await clients.rest(1).auth.requestToken({ clientId: 'ada', capability: { inside: ['publish'] } });
  const outer = jwt(cluster.key, { 'x-ably-token': token });
  const client = await clients.realtime(3, { token: outer });
  assert.equal(client.auth.clientId, 'ada');
  await client.channels.get('inside').publish('m', 'x');
  assert.equal((await refusal(client.channels.get('outside').publish('m', 'x'))).code, 40160);
});

scenario('each operation needs its capability', async ({ clients }) => {
  const name = 'ops:one';
  const holding = async (operations, resource = 'ops:*') => {
    const { token } = await clients.rest(2).auth.requestToken({ clientId: 'ada', capability: { [resource]: operations } });
    return {
      rest: clients.rest(3, { token }).channels.get(name),
      live: (await clients.realtime(1, { token })).channels.get(name),
    };
  };
  // An attachment is granted for any of these: the SDK is content with fewer modes than it asked for.
  const attaching = ['publish', 'subscribe', 'presence'];
  const all = [...attaching, 'history', 'channel-metadata'];
  for (const [operation, attempt, allowing] of [
    ['publish', ({ rest }) => rest.publish('m', 'x')],
    ['publish', ({ live }) => live.publish('m', 'x')],
    ['subscribe', ({ rest }) => rest.presence.get()],
    ['subscribe', ({ live }) => live.attach(), attaching],
    ['presence', ({ live }) => live.presence.enter()],
    ['history', ({ rest }) => rest.history()],
    ['history', ({ rest }) => rest.presence.history()],
    ['channel-metadata', ({ rest }) => rest.status()],
  ]) {
    await attempt(await holding([operation]));
    const others = all.filter((one) => one !== operation && !allowing?.includes(one));
    assert.equal((await refusal(attempt(await holding(others)), `${operation} without it`)).code, 40160);
  }
  for (const [resource, allowed] of [
    ['*', true],
    ['ops:one', true],
    ['ops:*', true],
    ['*:one', true],
    ['ops', false],
    ['ops:o*', false],
    ['other:*', false],
  ]) {
    const { rest } = await holding(['publish'], resource);
    if (allowed) await rest.publish('m', 'x');
    else assert.equal((await refusal(rest.publish('m', 'x'), resource)).code, 40160);
  }
});

scenario('a token has what both its request and its key allow', async ({ cluster, clients }) => {
  const { keys } = await createApp(cluster, { keys: [{ capability: '{"a:*":["publish","subscribe"],"b":["*"]}' }] });
  const { auth } = clients.rest(2, { key: keys[0] });
  const granted = async (capability) => JSON.parse((await auth.requestToken({ capability })).capability);
  assert.deepEqual(await granted({ 'a:x': ['publish', 'history'], b: ['subscribe'] }), {
    'a:x': ['publish'],
    b: ['subscribe'],
  });
  assert.deepEqual(await granted({ '*': ['*'] }), { 'a:*': ['publish', 'subscribe'], b: ['*'] });
  assert.equal((await refusal(granted({ c: ['publish'] }))).code, 40160);
  assert.deepEqual(JSON.parse((await auth.requestToken()).capability), { 'a:*': ['publish', 'subscribe'], b: ['*'] });
});

scenario('who one is follows from the credential', async ({ cluster, clients }) => {
  const token = (clientId) => jwt(cluster.key, claims({ clientId }));
  const welcome = async (query) => {
    const raw = await RawClient.open(cluster.url(2), query);
    const answer = await Promise.race([raw.next(ACTION.CONNECTED), raw.next(ACTION.ERROR)]).catch((error) => error);
    raw.close();
    return raw.frames.find(({ action }) => action === ACTION.CONNECTED || action === ACTION.ERROR) ?? answer;
  };
  const { key } = cluster;
  for (const [query, wanted] of [
    [{ key }, '*'],
    [{ key, clientId: 'ada' }, 'ada'],
    [{ access_token: token() }, undefined],
    [{ accessToken: token('ada') }, 'ada'],
    [{ access_token: token('ada'), clientId: 'ada' }, 'ada'],
    [{ access_token: token('*') }, '*'],
    [{ access_token: token('*'), clientId: 'ada' }, 'ada'],
  ]) {
    const frame = await welcome(query);
    assert.equal(frame.connectionDetails?.clientId, wanted, JSON.stringify([query, frame]));
  }
  for (const query of [
    { access_token: token('ada'), clientId: 'bob' },
    { access_token: token(), clientId: 'ada' },
  ]) {
    assert.equal((await welcome(query)).error?.code, 40102, JSON.stringify(query));
  }
  const wild = (await clients.realtime(1, { token: token('*') })).channels.get('who');
  await wild.publish({ name: 'm', data: 'x', clientId: 'anybody' });
  const named = (await clients.realtime(1, { token: token('ada') })).channels.get('who');
  assert.equal((await refusal(named.publish({ name: 'm', data: 'x', clientId: 'bob' }))).code, 40012);
  const { items } = await clients.rest(3).channels.get('who').history();
  assert.deepEqual(
    items.map(({ clientId }) => clientId),
    ['anybody'],
  );
});

scenario('wrong and unknown keys are told apart', async ({ cluster, clients }) => {
  const [keyName] = cluster.key.split(':');
  for (const [key, codes] of [
    [`${keyName}:wrong`, [40101]],
    // Too short to be a key of anybody.
    ['this.is:wrong', [40101]],
    [`${cluster.app}.unknown:secret`, [40101, 40400]],
    ['nobody.unknown:secret', [40400]],
  ]) {
    const client = clients.create({ key, port: cluster.port(1) });
    const failed = await once(client.connection, 'failed', { what: `a connection with ${key} to fail` });
    assert.ok(codes.includes(failed.reason.code), `${key}: ${failed.reason.code}`);
  }
  const rest = await cluster.rest(2, '/channels/x/messages', { key: `${keyName}:wrong` });
  assert.deepEqual([rest.status, rest.body.error?.code], [401, 40101]);
  assert.ok(!JSON.stringify(rest.body).includes('wrong'), 'a secret is not repeated');
});

scenario(
  'a token that is revoked ends its connections on every node, and stays out through deaths',
  async ({ cluster, clients }) => {
    const { keys } = await createApp(cluster, { keys: [{ revocable_tokens: true }] });
    const rest = clients.rest(1, { key: keys[0] });
    const { token } = await rest.auth.requestToken({ clientId: 'eve' });
    const { token: innocent } = await rest.auth.requestToken({ clientId: 'ada' });
    const victims = await Promise.all([1, 2, 3].map((node) => clients.realtime(node, { token })));
    const ada = await clients.realtime(2, { token: innocent });
    const ended = victims.map(
      ({ connection }) => new Promise((resolve) => connection.on((change) => change.reason && resolve(change.reason))),
    );
    const { successCount, results } = await rest.auth.revokeTokens([{ type: 'clientId', value: 'eve' }]);
    assert.equal(successCount, 1, JSON.stringify(results));
    assert.equal(results[0].target, 'clientId:eve');
    for (const reason of await Promise.all(ended)) {
      // The SDK cannot renew a bare token, which it says instead of the reason that it was given.
      assert.ok([40141, 40171].includes(reason.code), JSON.stringify(reason));
    }
    for (const node of [1, 2, 3]) assert.deepEqual(await ask(cluster, node, token), { status: 401, code: 40141 });
    assert.equal(ada.connection.state, 'connected');
    await cluster.without(1, async () => {
      for (const node of [2, 3]) assert.deepEqual(await ask(cluster, node, token), { status: 401, code: 40141 });
      assert.equal((await ask(cluster, 2, innocent)).status, 200);
    });
    // What is issued afterwards is good.
    await until(
      async () => (await ask(cluster, 3, (await rest.auth.requestToken({ clientId: 'eve' })).token)).status === 200,
      { what: 'a new token of the same client to be good', within: 5_000 },
    );
  },
);

scenario('revocation says what it cannot do', async ({ cluster, clients }) => {
  const error = await refusal(clients.rest(1).auth.revokeTokens([{ type: 'clientId', value: 'x' }]));
  assert.equal(error.code, 40163);
  const { keys } = await createApp(cluster, { keys: [{ revocable_tokens: true }] });
  const { successCount, failureCount, results } = await clients.rest(2, { key: keys[0] }).auth.revokeTokens([
    { type: 'clientId', value: 'x' },
    { type: 'nonsense', value: 'y' },
  ]);
  assert.deepEqual([successCount, failureCount], [1, 1]);
  assert.equal(results[1].error.statusCode, 400);
});

scenario('apps are apart: no key, token or channel of one reaches the other', async ({ cluster, clients }) => {
  const [one, two] = [await createApp(cluster), await createApp(cluster, { through: 2 })];
  const seen = await Subscriber.attach(await clients.realtime(1, { key: one.keys[0] }), 'shared');
  await clients.rest(2, { key: two.keys[0] }).channels.get('shared').publish('m', 'theirs');
  await clients.rest(3, { key: one.keys[0] }).channels.get('shared').publish('m', 'ours');
  await seen.received(1);
  assert.deepEqual(seen.data, ['ours']);
  const { items } = await clients.rest(1, { key: two.keys[0] }).channels.get('shared').history();
  assert.deepEqual(
    items.map(({ data }) => data),
    ['theirs'],
  );
  // A token names its app; the other's key does not make one good.
  const crossed = jwt(`${one.keys[0].split(':')[0]}:${two.keys[0].split(':')[1]}`);
  assert.ok((await ask(cluster, 2, crossed)).status >= 400);

  const live = await clients.realtime(3, { key: two.keys[0] });
  const ended = new Promise((resolve) => live.connection.on((change) => change.reason && resolve(change.reason)));
  await deleteApp(cluster, two.appId);
  await ended;
  await until(async () => (await cluster.rest(1, '/channels/shared/messages', { key: two.keys[0] })).status >= 400, {
    what: 'the app to be gone',
  });
  await clients.rest(3, { key: one.keys[0] }).channels.get('shared').publish('m', 'still here');
});
