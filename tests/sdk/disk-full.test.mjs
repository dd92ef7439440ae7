// Promises 1 and 7 when a disk is full: the node stops acknowledging and says why, the others go on, and with room again
// it is back.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';

import { assertSameHistories, large } from './lib/compare.mjs';
import { Cluster } from './lib/cluster.mjs';
import { SmallDisk, dataOf } from './lib/disk.mjs';
import { alive, tail, tempFolder } from './lib/process.mjs';
import { Clients, publishAll } from './lib/sdk.mjs';
import { until } from './lib/wait.mjs';

const FULL = 3;
// Room for one segment of 64 MiB and not for a second one.
const MEGABYTES = 100;
const NAMES = [0, 1, 2, 3].map((n) => `persisted:full-${n}`);
const BYTES = 48_000;
const ROUNDS_MAX = 60;

test('a node whose disk is full stops and says why; the others go on; with room it comes back', async (t) => {
  const data = tempFolder('disk-full');
  const disk = await SmallDisk.mount(path.join(data, `node-${FULL}`), MEGABYTES);
  if (disk.refused) {
    fs.rmSync(data, { recursive: true });
    t.skip(disk.refused);
    return;
  }
  let cluster;
  let clients;
  let ok = false;
  try {
    cluster = await Cluster.start({ data });
    clients = new Clients(cluster);
    const acked = await publishUntilFull(cluster, clients, t);
    const { pid, log } = cluster.node(FULL);
    await until(() => !alive(pid), { what: 'the node with the full disk to end' });
    assert.match(tail(log, 400), /no space left|disk is full|os error 28/i, 'it says why');

    // The two that are left acknowledge as before.
    await publishRound(clients, [1, 2], 'after', acked);
    await assertSameHistories(clients, [1, 2], NAMES, acked);
    await until(() => cluster.living().length === 2, { what: 'two nodes to be left' });

    await disk.grow(1200);
    await cluster.restart(FULL);
    await publishRound(clients, [FULL], 'with room', acked);
    await assertSameHistories(clients, [FULL, 1], NAMES, acked);
    ok = true;
  } finally {
    clients?.closeAll();
    if (!ok && cluster) console.error(cluster.logs());
    await cluster?.destroy();
    await until(async () => {
      await disk.unmount();
      return !fs.existsSync(path.join(dataOf({ data }, FULL), 'identity'));
    }, { what: 'the small disk to be unmounted' });
    fs.rmSync(data, { recursive: true, force: true });
  }
}, { timeout: 240_000 });

/** Publishes through the two others until the full one is gone; they acknowledge all the while. */
async function publishUntilFull(cluster, clients, t) {
  const acked = new Map(NAMES.map((name) => [name, []]));
  const { pid } = cluster.node(FULL);
  for (let round = 0; alive(pid); round++) {
    assert.ok(round < ROUNDS_MAX, 'the disk never gets full');
    await publishRound(clients, [1, 2], `round ${round}`, acked);
  }
  t.diagnostic(`${[...acked.values()].flat().length} messages of ${BYTES} bytes until the disk was full`);
  return acked;
}

async function publishRound(clients, nodes, what, acked) {
  await Promise.all(NAMES.map(async (name, n) => {
    const client = await clients.realtime(nodes[n % nodes.length]);
    const texts = Array.from({ length: 40 }, (_, m) => large(`${what} ${m}`, BYTES));
    const result = await publishAll(client.channels.get(name), texts, { window: 8 });
    // A slow machine may refuse some, as may an election; never all.
    assert.ok(result.acked.length > 0, JSON.stringify(result.refused[0]));
    acked.get(name).push(...result.acked.map((text) => text.slice(0, 40)));
    client.close();
  }));
}
