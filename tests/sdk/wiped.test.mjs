// Promise 1: a node that lost its disk has forgotten what it voted and acknowledged, so it counts for nothing until it is
// admitted again.

import assert from 'node:assert/strict';
import fs from 'node:fs';

import { assertEachOnce, assertSameOrder } from './lib/check.mjs';
import { firth } from './lib/cluster.mjs';
import { dataOf } from './lib/disk.mjs';
import { history, publishAll } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { pause, until } from './lib/wait.mjs';

const NAMES = [0, 1, 2, 3].map((n) => `persisted:wiped-${n}`);
// Elections take one second; what has not been acknowledged by then waits for a majority.
const LONG_ENOUGH_MS = 6_000;

const scenario = suite();
const acked = new Map(NAMES.map((name) => [name, []]));

// Node 1 gives birth to clusters, so it is the one that must not do so twice.
for (const [round, wiped] of [1, 3].entries()) {
  scenario(`node ${wiped} with an emptied disk neither votes nor serves until it is admitted again`, async (given) => {
    const { cluster, clients, t } = given;
    const [near, far] = [1, 2, 3].filter((id) => id !== wiped);
    await publish(clients, near, `before ${round}`);
    await cluster.kill(wiped);
    fs.rmSync(dataOf(cluster, wiped), { recursive: true });
    const said = fs.statSync(cluster.log).size;
    await cluster.restart(wiped, { serving: false });
    await until(() => /re-?admi/i.test(fs.readFileSync(cluster.log, 'utf8').slice(said)),
      { what: 'the node to say that it must be admitted again' });
    assert.notEqual((await ready(cluster, wiped)), 200, 'it does not say that it is ready');
    await publish(clients, near, `while empty ${round}`);

    // One whole node and an empty one are no majority, however long they have.
    await cluster.kill(far);
    const [late] = await clients.realtime(near).then((client) => NAMES.map((name) => client.channels.get(name)));
    const text = `without a majority ${round}`;
    const outcome = late.publish('m', text).then(() => 'acknowledged', () => 'refused');
    assert.notEqual(await Promise.race([outcome, pause(LONG_ENOUGH_MS)]), 'acknowledged', 'the empty node voted');
    await cluster.restart(far);
    if ((await outcome) === 'acknowledged') acked.get(NAMES[0]).push(text);

    const began = performance.now();
    const done = await firth(['admin', '--url', cluster.node(near).admin, 'node', 'readmit', String(wiped)]);
    assert.equal(done.code, 0, done.stderr);
    await cluster.serving(wiped);
    t.diagnostic(`serves ${Math.round(performance.now() - began)} ms after it was admitted`);
    await publish(clients, wiped, `after ${round}`);

    // Now it counts: with it, one of the others is not needed.
    await cluster.kill(far);
    await publish(clients, wiped, `instead of another ${round}`);
    await cluster.restart(far);
    for (const name of NAMES) {
      const texts = await Promise.all(
        [1, 2, 3].map(async (id) => (await history(clients.rest(id), name)).map((message) => message.data)));
      for (const seen of texts) assertEachOnce(seen, acked.get(name), `acknowledged messages of ${name}`);
      assertSameOrder(texts[1], texts[0], `${name} on node 2`);
      assertSameOrder(texts[2], texts[0], `${name} on node 3`);
    }
  });
}

scenario('a node that kept its disk needs no admission, and admitting it changes nothing', async ({ cluster, clients }) => {
  await cluster.kill(2);
  await cluster.restart(2);
  const done = await firth(['admin', '--url', cluster.node(1).admin, 'node', 'readmit', '2']);
  assert.ok(done.code === 0 || /nothing is to be readmitted/i.test(done.stderr), done.stderr);
  await cluster.serving(2);
  await publish(clients, 2, 'after an admission for nothing');
  const nobody = await firth(['admin', '--url', cluster.node(1).admin, 'node', 'readmit', '9']);
  assert.notEqual(nobody.code, 0);
  assert.match(nobody.stderr, /9/);
});

async function publish(clients, id, what) {
  const client = await clients.realtime(id);
  for (const name of NAMES) {
    const texts = Array.from({ length: 20 }, (_, n) => `${what}: ${n}`);
    const result = await publishAll(client.channels.get(name), texts);
    assert.deepEqual(result.refused, []);
    acked.get(name).push(...result.acked);
  }
}

async function ready(cluster, id) {
  const response = await fetch(new URL('/health/ready', cluster.node(id).admin), { signal: AbortSignal.timeout(5_000) });
  return response.status;
}
