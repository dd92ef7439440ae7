// The promises as assertions over lists of texts, with messages that name what is wrong.

import assert from 'node:assert/strict';

/** Every text of `wanted` is in `seen` once; `what` names `seen`. */
export function assertEachOnce(seen, wanted, what) {
  const times = countAll(seen);
  const missing = wanted.filter((text) => !times.has(text));
  const doubled = wanted.filter((text) => times.get(text) > 1);
  assert.deepEqual({ missing: some(missing), doubled: some(doubled) }, { missing: [], doubled: [] }, what);
}

/** `seen` holds exactly the texts of `wanted`, each once, in any order. */
export function assertSameSet(seen, wanted, what) {
  assertEachOnce(seen, wanted, what);
  const expected = new Set(wanted);
  assert.deepEqual(some(seen.filter((text) => !expected.has(text))), [], `${what}: nobody published these`);
}

/** Two lists are equal; says where they part instead of printing both. */
export function assertSameOrder(seen, wanted, what) {
  const length = Math.max(seen.length, wanted.length);
  for (let i = 0; i < length; i++) {
    if (seen[i] !== wanted[i]) {
      assert.fail(`${what}: at ${i} of ${wanted.length} comes ${seen[i]} instead of ${wanted[i]}`);
    }
  }
}

/** The texts that start with `prefix` are in `seen` in the order of `sent`. */
export function assertKeepsOrder(seen, sent, what) {
  const own = new Set(sent);
  assertSameOrder(seen.filter((text) => own.has(text)), sent, what);
}

function countAll(texts) {
  const times = new Map();
  for (const text of texts) times.set(text, (times.get(text) ?? 0) + 1);
  return times;
}

// Ten thousand missing messages are told by the first few and their number.
function some(texts) {
  return texts.length > 5 ? [...texts.slice(0, 5), `… ${texts.length} in all`] : texts;
}
