// Promise 6: who is there is listed everywhere, who is gone leaves everywhere, once, whatever died.

import assert from 'node:assert/strict';

import { Watcher, assertListed, restMembers } from './lib/members.mjs';
import { Observer } from './lib/observer.mjs';
import { History, SDKS, participant } from './lib/recorder.mjs';
import { ACTION, RawClient } from './lib/raw.mjs';
import { refusal, state } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { inParallel, pause, until } from './lib/wait.mjs';

// Who is gone without a word leaves after this, and not before.
const GRACE_MS = 15_000;
// After the death of its node somebody else has to notice, and then to wait.
const ORPHAN_MS = 45_000;

const scenario = suite();

for (const sdk of Object.keys(SDKS)) {
  scenario(`${sdk}: enter, update, leave; the other nodes see it`, async (given) => {
    const { cluster, clients } = given;
    const name = `presence-${sdk}`;
    const watchers = [];
    for (const node of [2, 3]) {
      watchers.push(await Watcher.attach(await clients.realtime(node, { useBinaryProtocol: node === 2 }), name));
    }
    const ada = await participant(sdk, { name: 'ada', cluster, node: 1, history: new History() });
    try {
      await ada.subscribe(name, { presence: true });
      assert.ok(await ada.appear('enter', name, { seat: 1 }), JSON.stringify(ada.history.events.at(-1)));
      await assertListed(given, name, ['ada']);
      assert.deepEqual(
        (await ada.members(name)).map(({ clientId }) => clientId),
        ['ada'],
      );
      assert.ok(await ada.appear('update', name, 'grüße'));
      assert.ok(await ada.appear('leave', name));
      await assertListed(given, name, []);
      for (const watcher of watchers) {
        await watcher.saw('leave', 'ada');
        // Who leaves without saying anything leaves with what was said last.
        assert.deepEqual(watcher.of('ada'), ['enter {"seat":1}', 'update "grüße"', 'leave "grüße"']);
        const [{ id, connectionId }] = watcher.events;
        assert.match(id, new RegExp(`^${connectionId}:\\d+:0$`));
      }
    } finally {
      await ada.close();
    }
  });
}

scenario(
  'every SDK: its node is killed, it comes back elsewhere within the grace, and nobody sees it leave',
  async (given) => {
    const { cluster, clients } = given;
    const name = 'presence-node-dies';
    const watcher = await Watcher.attach(await clients.realtime(2), name);
    const sdks = Object.keys(SDKS);
    const history = new History();
    const all = await Promise.all(sdks.map((sdk) => participant(sdk, { name: sdk, cluster, node: 1, history })));
    try {
      await Promise.all(all.map((one) => one.subscribe(name, { presence: true })));
      for (const one of all) assert.ok(await one.appear('enter', name, 'here'), one.name);
      await cluster.without(1, async () => {
        await Promise.all(all.map((one) => one.settled()));
        await pause(ORPHAN_MS);
        await assertListed(given, name, sdks);
        assert.deepEqual(await watcher.listed(), [...sdks].sort());
        assert.deepEqual(
          watcher.events.filter(({ action }) => action === 'leave'),
          [],
        );
        // They can still speak for themselves.
        for (const one of all) assert.ok(await one.appear('update', name, 'still here'), one.name);
      });
      await assertListed(given, name, sdks);
    } finally {
      await Promise.all(all.map((one) => one.close()));
    }
  },
);

scenario('a client dies together with its node: it leaves on the others, once, in time', async (given) => {
  const { cluster, clients } = given;
  const name = 'presence-both-die';
  const watchers = [
    await Watcher.attach(await clients.realtime(2), name),
    await Watcher.attach(await clients.realtime(3), name),
  ];
  // SDKs hide a second leave; this one does not.
  const history = new History();
  const wire = await Observer.open({ name: 'wire', cluster, node: 3, history });
  given.t.after(() => wire.close());
  await wire.subscribe(name);
  const { client, line } = await clients.roaming(1, { clientId: 'eve' });
  await client.channels.get(name).presence.enter('last words');
  await Promise.all(watchers.map((watcher) => watcher.saw('enter', 'eve')));
  line.die();
  await cluster.without(1, async () => {
    for (const watcher of watchers) {
      const leave = await watcher.saw('leave', 'eve', { within: ORPHAN_MS });
      assert.equal(leave.data, 'last words');
      assert.ok(!String(leave.id).startsWith(leave.connectionId), `a leave that nobody sent has the id ${leave.id}`);
    }
    await assertListed(given, name, []);
  });
  // The node that had it is back, and does not let it leave again.
  await pause(GRACE_MS + 3_000);
  for (const watcher of watchers) assert.equal(watcher.count('leave', 'eve'), 1);
  const events = history.events.filter(({ kind }) => kind === 'presence');
  assert.deepEqual(
    events.map(({ action, clientId }) => `${action} ${clientId}`),
    ['enter eve', 'leave eve'],
  );
});

scenario('a client that is gone without a word leaves after the grace of 15 s, not before', async (given) => {
  const { clients } = given;
  const name = 'presence-grace';
  const watcher = await Watcher.attach(await clients.realtime(2), name);
  const { client, line } = await clients.roaming(1, { clientId: 'eve' });
  await client.channels.get(name).presence.enter('here');
  await watcher.saw('enter', 'eve');
  line.die();
  const gone = performance.now();
  await pause(GRACE_MS - 4_000);
  await assertListed(given, name, ['eve']);
  await watcher.saw('leave', 'eve', { within: 10_000 });
  const after = performance.now() - gone;
  assert.ok(after > GRACE_MS - 2_000 && after < GRACE_MS + 5_000, `left after ${Math.round(after)} ms`);
  await assertListed(given, name, []);
});

scenario('remainPresentFor shortens the grace', async ({ clients }) => {
  const name = 'presence-remain';
  const watcher = await Watcher.attach(await clients.realtime(2), name);
  const { client, line } = await clients.roaming(3, { clientId: 'eve', transportParams: { remainPresentFor: '500' } });
  await client.channels.get(name).presence.enter();
  await watcher.saw('enter', 'eve');
  line.die();
  await watcher.saw('leave', 'eve', { within: 6_000 });
});

for (const sdk of [2, 1]) {
  scenario(`ably-js ${sdk}: a client that comes back after it had left enters again by itself`, async (given) => {
    const { clients } = given;
    const name = `presence-again-${sdk}`;
    const watcher = await Watcher.attach(await clients.realtime(2), name);
    const { client, line } = await clients.roaming(1, {
      sdk,
      clientId: 'bob',
      transportParams: { remainPresentFor: '300' },
    });
    await client.channels.get(name).presence.enter('first');
    await watcher.saw('enter', 'bob');
    line.die();
    await watcher.saw('leave', 'bob', { within: 8_000 });
    line.refuse(false);
    await until(() => watcher.count('enter', 'bob') === 2, { what: 'a second enter' });
    await state(client.connection, 'connected');
    await assertListed(given, name, ['bob']);
    assert.deepEqual(watcher.of('bob'), ['enter "first"', 'leave "first"', 'enter "first"']);
  });
}

/** A member on node 1, and the key with which its connection is resumed. */
async function enterByHand(cluster, query, channel) {
  const first = await RawClient.open(cluster.url(1), query);
  const { connectionKey } = (await first.next(ACTION.CONNECTED)).connectionDetails;
  first.send({ action: ACTION.ATTACH, channel });
  await first.next(ACTION.ATTACHED);
  first.send({ action: ACTION.PRESENCE, channel, msgSerial: 0, presence: [{ action: 2, data: 'x' }] });
  return { first, connectionKey };
}

// A client library that goes away before it heard of its own member does not know that it has one to enter again.
scenario('who is told that it is in has heard so before', async ({ cluster }) => {
  for (const node of cluster.nodes) {
    const client = await RawClient.open(cluster.url(node.id), { key: cluster.key, clientId: 'bob' });
    for (let i = 0; i < 30; i++) {
      const channel = `presence-echo-${node.id}-${i}`;
      client.send({ action: ACTION.ATTACH, channel });
      await client.next(ACTION.ATTACHED);
      client.send({ action: ACTION.PRESENCE, channel, msgSerial: i, presence: [{ action: 2, data: 'x' }] });
      await client.next(ACTION.ACK);
      const { frames } = client;
      const heard = frames.findIndex((frame) => frame.action === ACTION.PRESENCE && frame.channel === channel);
      const told = frames.findIndex((frame) => frame.action === ACTION.ACK && frame.msgSerial === i);
      assert.ok(heard >= 0 && heard < told, `${channel}: told as frame ${told}, heard as ${heard}`);
    }
    client.socket.terminate();
  }
});

scenario('who comes back to the same node within the grace is not seen leaving', async (given) => {
  const { cluster, clients } = given;
  const name = 'presence-same-node';
  const watcher = await Watcher.attach(await clients.realtime(2), name);
  const query = { key: cluster.key, clientId: 'bob', remainPresentFor: '1500' };
  const { first, connectionKey } = await enterByHand(cluster, query, name);
  await watcher.saw('enter', 'bob');
  first.socket.terminate();
  // The server has to notice that it is gone before it is back.
  await pause(300);
  const second = await RawClient.open(cluster.url(1), { ...query, resume: connectionKey });
  await second.next(ACTION.CONNECTED);
  second.send({ action: ACTION.ATTACH, channel: name });
  await second.next(ACTION.ATTACHED);
  await pause(3_000);
  assert.deepEqual(watcher.of('bob'), ['enter "x"']);
  second.send({ action: ACTION.CLOSE });
  await watcher.saw('leave', 'bob', { within: 3_000 });
});

scenario('who comes back and goes again is given the whole grace', async ({ cluster, clients }) => {
  const name = 'presence-again-and-again';
  const watcher = await Watcher.attach(await clients.realtime(2), name);
  const query = { key: cluster.key, clientId: 'bob', remainPresentFor: '3000' };
  const { first, connectionKey } = await enterByHand(cluster, query, name);
  await watcher.saw('enter', 'bob');
  first.socket.terminate();
  await pause(500);
  const second = await RawClient.open(cluster.url(1), { ...query, resume: connectionKey });
  await second.next(ACTION.CONNECTED);
  second.send({ action: ACTION.ATTACH, channel: name });
  await second.next(ACTION.ATTACHED);
  await pause(1_000);
  second.socket.terminate();
  const gone = performance.now();
  await watcher.saw('leave', 'bob', { within: 10_000 });
  const stayed = performance.now() - gone;
  assert.ok(stayed >= 2_900, `left after ${stayed} ms`);
  assert.equal(watcher.count('leave', 'bob'), 1);
});

scenario('whom the successor of a connection never learned of leaves all the same', async (given) => {
  const { cluster, clients } = given;
  const name = 'presence-heir';
  const watcher = await Watcher.attach(await clients.realtime(2), name);
  const query = { key: cluster.key, clientId: 'bob' };
  const { first, connectionKey } = await enterByHand(cluster, query, name);
  await watcher.saw('enter', 'bob');
  // It takes the connection over while the first socket lives, and ends it without attaching anything.
  const heir = await RawClient.open(cluster.url(3), { ...query, resume: connectionKey });
  await heir.next(ACTION.CONNECTED);
  await first.gone();
  heir.send({ action: ACTION.CLOSE });
  await heir.next(ACTION.CLOSED);
  await watcher.saw('leave', 'bob', { within: ORPHAN_MS });
  await assertListed(given, name, []);
});

scenario('members with much to say are listed in pages that fit', async (given) => {
  const { clients } = given;
  const name = 'presence-heavy';
  const crowd = (await clients.realtime(1)).channels.get(name);
  const ids = Array.from({ length: 60 }, (_, n) => `heavy-${String(n).padStart(2, '0')}`);
  const data = '\u0001'.repeat(30_000);
  // One after another: the SDK puts what waits into one frame, and that would be too large.
  for (const id of ids) await crowd.presence.enterClient(id, data);
  const late = (await clients.realtime(2)).channels.get(name);
  await late.attach();
  const members = await late.presence.get();
  assert.deepEqual(members.map(({ clientId }) => clientId).sort(), ids);
  assert.equal(members[7].data, data);
});

scenario('detach and close leave at once', async (given) => {
  const { clients } = given;
  const name = 'presence-leaves';
  const watcher = await Watcher.attach(await clients.realtime(3), name);
  const [ada, bob] = [await clients.realtime(1, { clientId: 'ada' }), await clients.realtime(2, { clientId: 'bob' })];
  for (const client of [ada, bob]) await client.channels.get(name).presence.enter('x');
  await ada.channels.get(name).detach();
  await watcher.saw('leave', 'ada', { within: 3_000 });
  bob.close();
  await watcher.saw('leave', 'bob', { within: 3_000 });
  await assertListed(given, name, []);
});

scenario('a hundred and fifty members are listed to who comes later, in pages', async (given) => {
  const { clients } = given;
  const name = 'presence-many';
  const crowd = (await clients.realtime(1)).channels.get(name);
  const ids = Array.from({ length: 150 }, (_, n) => `member-${String(n).padStart(3, '0')}`);
  await inParallel(20, ids, (id) => crowd.presence.enterClient(id, { id }));
  for (const sdk of [2, 1]) {
    const late = (await clients.realtime(2, { sdk })).channels.get(name);
    await late.attach();
    const members = await late.presence.get();
    assert.deepEqual(members.map(({ clientId }) => clientId).sort(), ids);
    assert.deepEqual(members.find(({ clientId }) => clientId === 'member-042').data, { id: 'member-042' });
  }
  await assertListed(given, name, ids);
  const page = await clients.rest(3).channels.get(name).presence.get({ clientId: 'member-007' });
  assert.deepEqual(
    page.items.map(({ clientId, action }) => [clientId, action]),
    [['member-007', 'present']],
  );
  const own = await clients.rest(3).channels.get(name).presence.get({ connectionId: 'nobody' });
  assert.deepEqual(own.items, []);
});

scenario('members are listed after the death of the node that they came to and of the leader', async (given) => {
  const { cluster, clients } = given;
  const name = 'presence-leader-dies';
  const leader = await cluster.leaderOf(name);
  const [home, other] = cluster.others(leader);
  const client = await clients.realtime(home, { clientId: 'ada' });
  await client.channels.get(name).presence.enter('here');
  await cluster.without(leader, async () => {
    await cluster.leaderOf(name, { through: other });
    const late = await Watcher.attach(await clients.realtime(other), name);
    assert.deepEqual(await late.listed(), ['ada']);
    await client.channels.get(name).presence.update('there');
    await late.saw('update', 'ada');
  });
  await assertListed(given, name, ['ada']);
});

scenario('presence history has every event, apart from messages', async ({ clients }) => {
  const name = 'persisted:presence-history';
  const channel = (await clients.realtime(1, { clientId: 'ada' })).channels.get(name);
  await channel.presence.enter('1');
  await channel.publish('m', 'a message');
  await channel.presence.update('2');
  await channel.presence.leave('3');
  for (const node of [2, 3]) {
    const rest = clients.rest(node).channels.get(name);
    const forwards = await rest.presence.history({ direction: 'forwards' });
    assert.deepEqual(
      forwards.items.map(({ action, data }) => [action, data]),
      [
        ['enter', '1'],
        ['update', '2'],
        ['leave', '3'],
      ],
    );
    const newest = await rest.presence.history({ limit: 1 });
    assert.deepEqual(
      newest.items.map(({ action }) => action),
      ['leave'],
    );
    assert.deepEqual(
      (await newest.next()).items.map(({ action }) => action),
      ['update'],
    );
    assert.deepEqual(
      (await rest.history()).items.map(({ data }) => data),
      ['a message'],
    );
  }
  assert.equal((await channel.presence.history()).items.length, 3);
});

scenario('what goes in comes out: bytes and objects, in both formats', async ({ clients }) => {
  const name = 'presence-data';
  const bytes = Buffer.from([0, 1, 254, 255]);
  const watchers = [];
  for (const useBinaryProtocol of [true, false]) {
    watchers.push(await Watcher.attach(await clients.realtime(2, { useBinaryProtocol }), name));
  }
  for (const useBinaryProtocol of [true, false]) {
    const clientId = `binary-${useBinaryProtocol}`;
    const { presence } = (await clients.realtime(1, { useBinaryProtocol, clientId })).channels.get(name);
    await presence.enter(bytes);
    await presence.update({ deep: [1, null] });
    for (const watcher of watchers) {
      assert.deepEqual((await watcher.saw('update', clientId)).data, { deep: [1, null] });
      assert.deepEqual(Buffer.from((await watcher.saw('enter', clientId)).data), bytes);
    }
  }
});

scenario('an update without an enter enters; a leave of nobody is fine', async ({ clients }) => {
  const name = 'presence-odd';
  const watcher = await Watcher.attach(await clients.realtime(2), name);
  const { presence } = (await clients.realtime(1, { clientId: 'ada' })).channels.get(name);
  await presence.update('first');
  await watcher.saw('enter', 'ada');
  await presence.leave();
  await watcher.saw('leave', 'ada');
  await presence.leave();
  assert.deepEqual(watcher.of('ada'), ['enter "first"', 'leave "first"']);
});

scenario('a member hears of itself even without presence_subscribe; others do not', async ({ clients }) => {
  const name = 'presence-modes';
  const deaf = async (node, clientId) => {
    const client = await clients.realtime(node, { clientId });
    const channel = client.channels.get(name, {
      modes: ['PRESENCE', 'PUBLISH', 'SUBSCRIBE'],
      attachOnSubscribe: false,
    });
    const heard = [];
    await channel.presence.subscribe((event) => heard.push(event.clientId));
    await channel.attach();
    return { channel, heard };
  };
  const [ada, bob] = [await deaf(1, 'ada'), await deaf(2, 'bob')];
  await ada.channel.presence.enter();
  await bob.channel.presence.enter();
  await until(() => ada.heard.length > 0 && bob.heard.length > 0, { what: 'each to hear of itself' });
  // A message after the last event shows that nothing else is on its way.
  const [last] = await Promise.all([
    new Promise((resolve) => ada.channel.subscribe('end', resolve)),
    bob.channel.publish('end'),
  ]);
  assert.equal(last.name, 'end');
  assert.deepEqual([ada.heard, bob.heard], [['ada'], ['bob']]);
});

scenario('who may not be present is told why', async ({ clients }) => {
  const name = 'presence-refused';
  const token = async (claims) => (await clients.rest(1).auth.requestToken(claims)).token;
  const anonymous = await clients.realtime(1, { token: await token({}) });
  assert.equal((await refusal(anonymous.channels.get(name).presence.enterClient('ada'))).code, 91000);

  const named = await clients.realtime(2, { token: await token({ clientId: 'ada' }) });
  assert.equal((await refusal(named.channels.get(name).presence.enterClient('bob'))).code, 40012);

  const capability = { [name]: ['subscribe', 'publish'] };
  const mute = await clients.realtime(3, { token: await token({ clientId: 'ada', capability }) });
  assert.equal((await refusal(mute.channels.get(name).presence.enter())).code, 40160);

  const modes = ['SUBSCRIBE', 'PRESENCE_SUBSCRIBE'];
  const closed = (await clients.realtime(1, { clientId: 'ada' })).channels.get(name, { modes });
  assert.equal((await refusal(closed.presence.enter())).code, 40165);
  assert.deepEqual(await restMembers(clients, 2, name), []);
});

scenario('a channel takes two hundred members and more, but not without end', async (given) => {
  const { clients } = given;
  const name = 'presence-full';
  const { presence } = (await clients.realtime(2)).channels.get(name);
  const inside = [];
  let refused;
  for (let n = 0; n < 1_100 && !refused; n++) {
    const id = `member-${n}`;
    await presence.enterClient(id).then(
      () => inside.push(id),
      (error) => (refused = error),
    );
  }
  assert.equal(refused?.code, 91003, `${inside.length} members`);
  assert.ok(inside.length >= 200, `${inside.length} members`);
  // Who is inside may go on changing, and a place that is left is free again.
  await presence.updateClient(inside[0], 'still');
  await presence.leaveClient(inside.pop());
  await presence.enterClient('the next one');
  await assertListed(given, name, [...inside, 'the next one']);
});
