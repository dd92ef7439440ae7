// The REST door: pages, batches, presence, status, errors, headers, in JSON and MessagePack, on any node.

import assert from 'node:assert/strict';

import { refusal } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { inParallel, until } from './lib/wait.mjs';

const BOTH = [2, 1];
const FORMATS = [true, false];

const scenario = suite();

/** A request as curl would make it; `{status, headers, body}`. */
async function call(cluster, id, target, { method = 'GET', body, headers = {}, key = cluster.key } = {}) {
  const authorization = key && { authorization: `Basic ${Buffer.from(key).toString('base64')}` };
  const response = await fetch(new URL(target, cluster.url(id)), {
    method,
    headers: {
      ...authorization,
      ...(body !== undefined && { 'content-type': 'application/json' }),
      'x-ably-version': '6',
      ...headers,
    },
    body: typeof body === 'object' ? JSON.stringify(body) : body,
    signal: AbortSignal.timeout(15_000),
  });
  const text = await response.text();
  return {
    status: response.status,
    headers: response.headers,
    body: text.startsWith('[') || text.startsWith('{') ? JSON.parse(text) : text,
  };
}

async function fill(clients, node, name, count) {
  const channel = clients.rest(node).channels.get(name);
  for (let n = 0; n < count; n++) await channel.publish('m', String(n));
}

async function walk(page) {
  const pages = [];
  for (let at = page; at; at = at.hasNext() ? await at.next() : undefined) pages.push(at.items.map(({ data }) => data));
  return pages;
}

for (const sdk of BOTH) {
  for (const useBinaryProtocol of FORMATS) {
    scenario(
      `ably-js ${sdk}, ${useBinaryProtocol ? 'msgpack' : 'json'}: history in pages, both ways, by time`,
      async ({ clients }) => {
        const name = `persisted:pages-${sdk}-${useBinaryProtocol}`;
        await fill(clients, 1, name, 7);
        const channel = clients.rest(2, { sdk, useBinaryProtocol }).channels.get(name);
        assert.deepEqual(await walk(await channel.history({ limit: 3 })), [['6', '5', '4'], ['3', '2', '1'], ['0']]);
        assert.deepEqual(await walk(await channel.history({ limit: 4, direction: 'forwards' })), [
          ['0', '1', '2', '3'],
          ['4', '5', '6'],
        ]);
        const all = await channel.history({ direction: 'forwards' });
        const times = all.items.map(({ timestamp }) => timestamp);
        const between = await channel.history({ direction: 'forwards', start: times[2], end: times[4] });
        const wanted = all.items.filter(({ timestamp }) => timestamp >= times[2] && timestamp <= times[4]);
        assert.deepEqual(
          between.items.map(({ data }) => data),
          wanted.map(({ data }) => data),
        );
        const second = await (await channel.history({ limit: 3 })).next();
        assert.deepEqual(
          (await second.first()).items.map(({ data }) => data),
          ['6', '5', '4'],
        );
        assert.deepEqual(
          (await second.current()).items.map(({ data }) => data),
          ['3', '2', '1'],
        );
        assert.equal((await refusal(channel.history({ limit: 1001 }))).code, 40003);
      },
    );
  }
}

scenario(
  'pages go on on another node, while the first one is dead and new messages come',
  async ({ cluster, clients }) => {
    const name = 'persisted:pages-move';
    await fill(clients, 1, name, 6);
    const first = await call(cluster, 1, `/channels/${encodeURIComponent(name)}/messages?limit=2`);
    const next = first.headers
      .get('link')
      .split(', ')
      .find((link) => link.includes('rel="next"'));
    const [, query] = /<\.\/messages\?([^>]*)>/.exec(next);
    await cluster.without(1, async () => {
      await clients.rest(2).channels.get(name).publish('m', 'new');
      const second = await call(cluster, 3, `/channels/${encodeURIComponent(name)}/messages?${query}`);
      assert.deepEqual(
        second.body.map(({ data }) => data),
        ['3', '2'],
      );
    });
  },
);

scenario('links have the form that SDKs parse', async ({ cluster, clients }) => {
  await fill(clients, 2, 'links', 3);
  const { headers } = await call(cluster, 1, '/channels/links/messages?limit=1');
  const links = headers.get('link').split(', ');
  assert.deepEqual(links.map((link) => /^<\.\/messages\?[^>,]*>; rel="(\w+)"$/.exec(link)?.[1]).sort(), [
    'current',
    'first',
    'next',
  ]);
  assert.equal(headers.get('content-type'), 'application/json');
});

for (const useBinaryProtocol of FORMATS) {
  const format = useBinaryProtocol ? 'msgpack' : 'json';
  scenario(`${format}: batch publish and batch presence, with a channel that is refused`, async ({ clients }) => {
    const rest = clients.rest(1, { useBinaryProtocol });
    const channels = [`batch-${format}-a`, `batch-${format}-b`];
    const good = await rest.batchPublish({
      channels,
      messages: [
        { name: 'm', data: 'one' },
        { name: 'm', data: { two: 2 } },
      ],
    });
    assert.deepEqual(
      [good.successCount, good.failureCount, good.results.map(({ channel }) => channel)],
      [2, 0, channels],
    );
    for (const name of channels) {
      const { items } = await clients
        .rest(3, { useBinaryProtocol })
        .channels.get(name)
        .history({ direction: 'forwards' });
      assert.deepEqual(
        items.map(({ data }) => data),
        ['one', { two: 2 }],
      );
    }
    const { token } = await clients.rest(2).auth.requestToken({ clientId: '*', capability: { [channels[0]]: ['*'] } });
    const partly = clients.rest(2, { useBinaryProtocol, token });
    const [specs] = [
      await partly.batchPublish([
        { channels, messages: { data: 'x' } },
        { channels: [channels[0]], messages: { data: 'y' } },
      ]),
    ];
    assert.deepEqual(
      specs.map(({ successCount, failureCount }) => [successCount, failureCount]),
      [
        [1, 1],
        [1, 0],
      ],
    );
    assert.equal(specs[0].results[1].error.code, 40160);

    const live = (await clients.realtime(2)).channels.get(channels[0]);
    await live.presence.enterClient('ada', 'x');
    const who = await partly.batchPresence(channels);
    assert.deepEqual([who.successCount, who.failureCount], [1, 1]);
    assert.deepEqual(
      who.results[0].presence.map(({ clientId }) => clientId),
      ['ada'],
    );
    assert.equal(who.results[1].error.code, 40160);
  });
}

scenario('batches answer version 2 in its own shape', async ({ cluster, clients }) => {
  const headers = { 'x-ably-version': '2' };
  const body = { channels: ['old-a', 'old-b'], messages: { data: 'x' } };
  const good = await call(cluster, 1, '/messages', { method: 'POST', body, headers });
  assert.equal(good.status, 201);
  assert.deepEqual(
    good.body.map(({ channel }) => channel),
    ['old-a', 'old-b'],
  );
  const { token } = await clients.rest(2).auth.requestToken({ capability: { 'old-a': ['publish'] } });
  const authorization = `Bearer ${Buffer.from(token).toString('base64')}`;
  const partly = await call(cluster, 2, '/messages', { method: 'POST', body, headers: { ...headers, authorization } });
  assert.equal(partly.status, 400);
  assert.equal(partly.body.error.code, 40020);
  assert.deepEqual(
    partly.body.batchResponse.map(({ error }) => error?.code),
    [undefined, 40160],
  );
});

scenario(
  'a publish is answered with what is stored; ids make retries harmless on any node',
  async ({ cluster, clients }) => {
    const target = '/channels/ids/messages';
    const post = (id, body) => call(cluster, id, target, { method: 'POST', body });
    const first = await post(1, { id: 'order-1', name: 'm', data: { total: 1 } });
    assert.equal(first.status, 201);
    assert.equal(first.body.channel, 'ids');
    for (const [node, id] of [
      [2, 'order-1'],
      [3, 'order-1:0'],
    ]) {
      const again = await post(node, { id, name: 'm', data: 'changed' });
      assert.deepEqual([again.status, again.body.serials], [201, first.body.serials]);
    }
    const batch = [
      { id: 'order-2:0', data: 'a' },
      { id: 'order-2:1', data: 'b' },
    ];
    const serials = (await post(2, batch)).body.serials;
    await cluster.without(2, async () => assert.deepEqual((await post(3, batch)).body.serials, serials));
    assert.equal((await post(1, [{ id: 'x:0', data: '1' }, { data: '2' }])).body.error.code, 40031);
    const { items } = await clients.rest(3).channels.get('ids').history({ direction: 'forwards' });
    assert.deepEqual(
      items.map(({ id, data }) => [id, data]),
      [
        ['order-1', { total: 1 }],
        ['order-2:0', 'a'],
        ['order-2:1', 'b'],
      ],
    );
  },
);

scenario('a message is found by its serial, on any node', async ({ cluster }) => {
  const { body } = await call(cluster, 1, '/channels/one/messages', { method: 'POST', body: { name: 'm', data: 'x' } });
  const [serial] = body.serials;
  for (const node of [2, 3]) {
    const found = await call(cluster, node, `/channels/one/messages/${encodeURIComponent(serial)}`);
    assert.deepEqual([found.status, found.body.data, found.body.serial], [200, 'x', serial]);
  }
  const none = await call(cluster, 1, `/channels/one/messages/${encodeURIComponent(serial.replace(/\d{3}$/, '007'))}`);
  assert.deepEqual([none.status, none.body.error.code], [404, 40400]);
});

scenario('published on behalf of a live connection', async ({ clients }) => {
  const client = await clients.realtime(3, { clientId: 'ada' });
  const channel = clients.rest(1).channels.get('behalf');
  await channel.publish({ name: 'm', data: 'x', connectionKey: client.connection.key });
  const {
    items: [message],
  } = await clients.rest(2).channels.get('behalf').history();
  assert.deepEqual(
    [message.connectionId, message.clientId, message.connectionKey],
    [client.connection.id, 'ada', undefined],
  );
  assert.equal((await refusal(channel.publish({ name: 'm', data: 'x', connectionKey: 'nobody!knows' }))).code, 40006);
});

scenario('a raw body is data; name and id come beside it', async ({ cluster, clients }) => {
  const headers = { 'content-type': 'text/plain' };
  const sent = await call(cluster, 1, '/channels/raw/messages?enveloped=false&name=bare&messageId=raw-1', {
    method: 'POST',
    body: 'just text',
    headers,
  });
  assert.equal(sent.status, 201, JSON.stringify(sent.body));
  const {
    items: [message],
  } = await clients.rest(2).channels.get('raw').history();
  assert.deepEqual([message.name, message.data], ['bare', 'just text']);
});

scenario('status and enumeration see channels of all nodes', async ({ cluster, clients }) => {
  const live = [];
  for (const [node, name] of [
    [1, 'listed:a'],
    [2, 'listed:b'],
    [3, 'listed:c'],
  ]) {
    const channel = (await clients.realtime(node, { clientId: 'ada' })).channels.get(name);
    await channel.presence.enter();
    live.push(channel);
  }
  for (const node of [1, 2, 3]) {
    // Nodes tell each other what their clients do a moment later.
    const details = await until(
      async () => {
        const found = await clients.rest(node).channels.get('listed:b').status();
        return found.status.occupancy.metrics.connections > 0 && found;
      },
      { what: `node ${node} to count`, within: 5_000 },
    );
    assert.equal(details.channelId, 'listed:b');
    assert.equal(details.status.isActive, true);
    const { connections, subscribers, publishers, presenceMembers } = details.status.occupancy.metrics;
    assert.deepEqual([connections, subscribers, publishers, presenceMembers], [1, 1, 1, 1]);
    const names = await until(
      async () => {
        const { body } = await call(cluster, node, '/channels?prefix=listed:&by=id');
        return body.length >= 3 && body;
      },
      { what: `node ${node} to list all`, within: 5_000 },
    );
    assert.deepEqual(names, ['listed:a', 'listed:b', 'listed:c']);
  }
  const pages = [];
  let target = '/channels?prefix=listed:&by=id&limit=2';
  while (target) {
    const { body, headers } = await call(cluster, 1, target);
    pages.push(...body);
    const next = /<\.\/channels\?([^>]*)>; rel="next"/.exec(headers.get('link') ?? '');
    target = next && `/channels?${next[1]}`;
  }
  assert.deepEqual(pages.sort(), ['listed:a', 'listed:b', 'listed:c']);
  const { body } = await call(cluster, 2, '/channels?prefix=listed:a&by=value');
  assert.equal(body[0].channelId, 'listed:a');
});

scenario('errors have a body, headers and a status that agree', async ({ cluster }) => {
  const big = 'x'.repeat(70_000);
  for (const [method, target, options, status, code] of [
    ['GET', '/nothing/here', {}, 404, 40400],
    ['PUT', '/channels/x/messages', { body: {} }, 405, 40500],
    ['GET', '/channels/x/messages', { key: null }, 401, 40101],
    ['GET', '/channels/x/messages?limit=0x', {}, 400, 40003],
    ['GET', '/channels/x/messages?limit=-1', {}, 400, 40003],
    ['GET', '/channels/x/messages?direction=sideways', {}, 400, 40003],
    ['POST', '/channels/x/messages', { body: '{"data":' }, 400, 40001],
    ['POST', '/channels/x/messages', { body: { data: big } }, 413, 40009],
    ['POST', '/channels/x/messages', { body: { data: 'x', clientId: '*' } }, 400, 40012],
    ['POST', '/channels/x/messages?_forceNack=true', { body: { data: 'x' } }, 400, 40099],
    ['GET', '/channels/x/messages', { key: 'nobody.unknown:secret' }, 404, 40400],
  ]) {
    for (const node of [1, 3]) {
      const answer = await call(cluster, node, target, { method, ...options });
      const what = `${method} ${target}: ${answer.status} ${JSON.stringify(answer.body).slice(0, 200)}`;
      assert.deepEqual(
        [answer.status, answer.body.error?.code, answer.body.error?.statusCode],
        [status, code, status],
        what,
      );
      assert.equal(answer.headers.get('x-ably-errorcode'), String(code), what);
      assert.ok(answer.headers.get('x-ably-errormessage'), what);
      assert.equal(answer.headers.get('content-type'), 'application/json', what);
      assert.ok(!/ably\.(io|com)/.test(answer.body.error.href ?? ''), what);
    }
  }
});

scenario('a browser may call from anywhere', async ({ cluster }) => {
  const asked = 'authorization, content-type, x-ably-version, ably-agent, x-ably-clientid';
  const headers = {
    origin: 'https://example.com',
    'access-control-request-method': 'POST',
    'access-control-request-headers': asked,
  };
  const preflight = await call(cluster, 2, '/channels/x/messages', { method: 'OPTIONS', headers, key: null });
  assert.ok(preflight.status < 300, String(preflight.status));
  assert.equal(preflight.headers.get('access-control-allow-origin'), '*');
  const allowed = preflight.headers.get('access-control-allow-headers').toLowerCase();
  for (const name of asked.split(', '))
    assert.ok(allowed === '*' || allowed.includes(name), `${name} is not in ${allowed}`);
  for (const [target, status] of [
    ['/channels/x/messages', 200],
    ['/nothing', 404],
  ]) {
    const answer = await call(cluster, 1, target, { headers: { origin: 'https://example.com' } });
    assert.equal(answer.status, status);
    assert.equal(answer.headers.get('access-control-allow-origin'), '*');
    assert.match(answer.headers.get('access-control-expose-headers') ?? '', /link/i);
  }
});

scenario('credentials are taken from the query as well', async ({ cluster, clients }) => {
  const { token } = await clients.rest(1).auth.requestToken();
  const by = async (query) =>
    (await call(cluster, 2, `/channels/x/messages?${new URLSearchParams(query)}`, { key: null })).status;
  assert.deepEqual(
    [await by({ key: cluster.key }), await by({ accessToken: token }), await by({ access_token: token }), await by({})],
    [200, 200, 200, 401],
  );
});

scenario('a message that is read back is the one that was sent, whatever the formats', async ({ clients }) => {
  const name = 'persisted:formats';
  const bytes = Buffer.from([0, 1, 254, 255]);
  const extras = { headers: { a: '1' } };
  await inParallel(1, FORMATS, async (useBinaryProtocol) => {
    const channel = clients.rest(1, { useBinaryProtocol }).channels.get(name);
    await channel.publish([
      { name: 'bytes', data: bytes, extras },
      { name: 'deep', data: { a: [1, null] } },
      { name: 'text', data: 'grüß' },
      { name: 'none' },
    ]);
  });
  for (const useBinaryProtocol of FORMATS) {
    for (const sdk of BOTH) {
      const { items } = await clients
        .rest(3, { sdk, useBinaryProtocol })
        .channels.get(name)
        .history({ direction: 'forwards' });
      assert.equal(items.length, 8);
      for (const [data, deep, text, none] of [items.slice(0, 4), items.slice(4)]) {
        assert.deepEqual(Buffer.from(data.data), bytes);
        assert.deepEqual(data.extras, extras);
        assert.deepEqual([deep.data, text.data, none.data ?? null], [{ a: [1, null] }, 'grüß', null]);
      }
    }
  }
});
