// Large histories, compared by what they hold without holding it.

import { createHash } from 'node:crypto';

import assert from 'node:assert/strict';

import { inParallel } from './wait.mjs';

// Messages of these tests are large: a page of 1000 would be one of 48 MB.
const PAGE = 100;

/** `serial digest` of every message of a channel's history as one node tells it, newest first. */
export async function outline(rest, name) {
  const found = [];
  let page = await rest.channels.get(name).history({ limit: PAGE });
  for (;;) {
    for (const { serial, data } of page.items) {
      found.push({ serial, digest: createHash('sha256').update(String(data)).digest('hex'), text: String(data).slice(0, 40) });
    }
    if (!page.hasNext()) return found;
    page = await page.next();
  }
}

/** Node `id` tells the same history of every channel as node `other`, and it holds what was acknowledged. */
export async function assertSameHistories(clients, [id, other], names, acked) {
  await inParallel(2, names, async (name) => {
    const [mine, theirs] = await Promise.all([id, other].map((node) => outline(clients.rest(node), name)));
    assert.equal(mine.length, theirs.length, `${name}: records on node ${id} against node ${other}`);
    const differs = mine.findIndex((one, at) => one.serial !== theirs[at].serial || one.digest !== theirs[at].digest);
    assert.equal(differs, -1, `${name}: node ${id} has ${JSON.stringify(mine[differs])} instead of ${JSON.stringify(theirs[differs])}`);
    const times = new Map();
    for (const { text } of mine) times.set(key(text), (times.get(key(text)) ?? 0) + 1);
    const wrong = (acked.get(name) ?? []).filter((text) => times.get(key(text)) !== 1);
    assert.deepEqual(wrong.slice(0, 3), [], `${name}: ${wrong.length} acknowledged messages are not there once on node ${id}`);
  });
}

/** A message of `bytes` characters that begins with what makes it unlike any other. */
export function large(what, bytes) {
  return `${what}|`.padEnd(bytes, 'abcdefghijklmnopqrstuvwxyz0123456789');
}

function key(text) {
  return text.split('|')[0];
}
