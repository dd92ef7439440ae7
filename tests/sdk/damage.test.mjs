// Promise 1 on a disk that changes what was written: a damaged node serves again, with what its peers have.

import assert from 'node:assert/strict';
import fs from 'node:fs';

import { assertSameHistories, large } from './lib/compare.mjs';
import { cutShort, dataOf, flipByte, segments } from './lib/disk.mjs';
import { publishAll } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';

const CHANNELS = Array.from({ length: 6 }, (_, n) => `persisted:damage-${n}`);
const BYTES = 48_000;
const AT_ONCE = 60;
const ROUNDS_MAX = 60;

// Small log files, so that there are soon several that nothing is written to any more.
process.env.FIRTH__STORAGE__SEGMENT_BYTES = String(1 << 20);

const scenario = suite();
const acked = new Map(CHANNELS.map((name) => [name, []]));

const HARMS = [
  ['one bit of a byte in the middle of an old segment has turned', flipByte],
  ['an old segment file is gone', (file) => fs.rmSync(file)],
  ['an old segment file is cut short', cutShort],
];

for (const [n, [what, harm]] of HARMS.entries()) {
  scenario(`${what}: the node serves again and tells what the others tell`, async ({ cluster, clients, t }) => {
    const victim = n + 1;
    const other = (victim % 3) + 1;
    await publishUntilSealed(cluster, clients, victim);
    await cluster.kill(victim);
    const sealed = segments(dataOf(cluster, victim)).at(-3);
    harm(sealed);
    t.diagnostic(`${sealed}, of ${segments(dataOf(cluster, victim)).length}`);
    const said = fs.statSync(cluster.log).size;

    await cluster.restart(victim);
    await assertSameHistories(clients, [victim, other], CHANNELS, acked);
    const log = fs.readFileSync(cluster.log, 'utf8').slice(said);
    assert.match(log, /damage|unreadable|missing/i, 'the node says what it found');

    // A node that mended itself counts again: another one may go.
    await cluster.kill(other);
    const client = await clients.realtime(victim);
    const after = await publishAll(client.channels.get(CHANNELS[0]), [large(`after harm ${n}`, 100)]);
    assert.deepEqual(after.refused, []);
    acked.get(CHANNELS[0]).push(...after.acked);
    await cluster.restart(other);
    await assertSameHistories(clients, [victim, other], CHANNELS, acked);
  });
}

scenario('all nodes are damaged in different places: nothing acknowledged is lost', async ({ cluster, clients }) => {
  await publishUntilSealed(cluster, clients, 1);
  await Promise.all([1, 2, 3].map((id) => cluster.kill(id)));
  // Not the same entries: what one lacks, two have.
  for (const id of [1, 2, 3]) flipByte(segments(dataOf(cluster, id)).at(-1 - id));
  await Promise.all([1, 2, 3].map((id) => cluster.restart(id, { serving: false })));
  await Promise.all([1, 2, 3].map((id) => cluster.serving(id)));
  await assertSameHistories(clients, [1, 2], CHANNELS, acked);
  await assertSameHistories(clients, [3, 2], CHANNELS, acked);
});

/** Publishes until the node has several segments that nothing is written to any more, whatever their size. */
async function publishUntilSealed(cluster, clients, id) {
  const publishers = await Promise.all(CHANNELS.map((_, n) => clients.realtime((n % 3) + 1)));
  const before = segments(dataOf(cluster, id)).length;
  for (let round = 0; segments(dataOf(cluster, id)).length < Math.max(before + 1, 5); round++) {
    assert.ok(round < ROUNDS_MAX, `node ${id} begins no new segment`);
    await Promise.all(CHANNELS.map(async (name, n) => {
      const texts = Array.from({ length: AT_ONCE }, (_, m) => large(`${id} ${round} ${m} ${acked.get(name).length}`, BYTES));
      // One that a slow disk kept too long is refused, and counts for nothing.
      const result = await publishAll(publishers[n].channels.get(name), texts, { window: 4 });
      acked.get(name).push(...result.acked.map((text) => text.slice(0, 40)));
    }));
  }
}
