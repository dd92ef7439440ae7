// The command line as a person or a script uses it.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import readline from 'node:readline';

import { Cluster, FIRTH, firth } from './lib/cluster.mjs';
import { startPiped, stop } from './lib/process.mjs';
import { Subscriber, history } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { until } from './lib/wait.mjs';

const scenario = suite();

/** `--url` and `--key` of node `id`. */
const at = (cluster, id) => ['--url', cluster.url(id), '--key', cluster.key];

scenario('firth --help names every command, and each has its own help', async () => {
  const { code, stdout } = await firth(['--help']);
  assert.equal(code, 0);
  for (const command of ['dev', 'serve', 'pub', 'sub', 'bench']) {
    assert.match(stdout, new RegExp(`^\\s+${command}\\b`, 'm'));
    const help = await firth([command, '--help']);
    assert.equal(help.code, 0, help.stderr);
    assert.match(help.stdout, /Usage: firth/);
  }
  assert.match((await firth(['--version'])).stdout, /^firth \d+\.\d+\.\d+/);
});

scenario('firth dev tells the URLs, the key and what to open, and an interrupt ends all of it', async ({ cluster }) => {
  const said = fs.readFileSync(cluster.log, 'utf8');
  assert.ok(said.includes(cluster.key), said);
  for (const node of cluster.nodes) assert.ok(said.includes(node.url), `${node.url} in ${said}`);

  const other = await Cluster.start({ nodes: 1 });
  try {
    await stop(other.process, { signal: 'SIGINT' });
    assert.deepEqual(other.living(), []);
    assert.equal(other.process.signalCode, null, 'it ends by itself');
  } finally {
    await other.destroy();
  }
});

scenario('a command that does not exist, and one without its arguments, end with 2', async () => {
  assert.equal((await firth(['fly'])).code, 2);
  assert.equal((await firth(['pub'])).code, 2);
  assert.equal((await firth(['serve'])).code, 2);
});

scenario('firth pub on one node is heard by firth sub and the SDK on others', async ({ cluster, clients }) => {
  const name = 'persisted:cli';
  const heard = await Subscriber.attach(await clients.realtime(3), name);
  const sub = startPiped([FIRTH, 'sub', ...at(cluster, 2), name]);
  const lines = [];
  let complaints = '';
  sub.stderr.setEncoding('utf8').on('data', (part) => (complaints += part));
  readline.createInterface({ input: sub.stdout }).on('line', (line) => lines.push(line));
  try {
    // `sub` starts where it attaches, which nobody outside sees: so one message is repeated until it is heard.
    let n = 0;
    await until(async () => {
      const { code, stderr } = await firth(['pub', ...at(cluster, 1), name, `knock ${n++}`]);
      assert.equal(code, 0, stderr);
      return lines.length > 0;
    }, { what: 'firth sub to hear firth pub' });
    const { code, stderr } = await firth(['pub', ...at(cluster, 1), name, 'the last word']);
    assert.equal(code, 0, stderr);
    await until(() => lines.some((line) => line.includes('the last word')), { what: `the last word; ${complaints}` });
    await heard.received(n + 1);
    assert.equal(heard.data.at(-1), 'the last word');
    assert.equal(lines.filter((line) => line.includes('the last word')).length, 1);
    const stored = await history(clients.rest(1), name);
    assert.equal(stored.length, n + 1);
  } finally {
    await stop(sub, { signal: 'SIGINT' });
  }
});

scenario('firth pub says what is wrong and fails', async ({ cluster }) => {
  const wrongKey = await firth(['pub', '--url', cluster.url(1), '--key', 'app.key:wrong', 'a', 'x']);
  assert.notEqual(wrongKey.code, 0);
  assert.match(wrongKey.stderr, /40101/);
  const nobody = await firth(['pub', '--url', 'http://127.0.0.1:1', '--key', cluster.key, 'a', 'x']);
  assert.notEqual(nobody.code, 0);
  assert.ok(nobody.stderr.length > 0);
  assert.doesNotMatch(nobody.stderr, /panicked/);
});

for (const [kind, flags] of [['publish', ['--messages', '500']], ['fanout', ['--messages', '100', '--subscribers', '20']]]) {
  scenario(`firth bench ${kind} --json tells rates, percentiles, machine and settings`, async ({ cluster }) => {
    const { code, stdout, stderr } = await firth(['bench', kind, ...at(cluster, 1), ...flags, '--json']);
    assert.equal(code, 0, stderr);
    const result = JSON.parse(stdout);
    const numbers = new Map();
    collectNumbers(result, '', numbers);
    const find = (pattern) => [...numbers].filter(([name]) => pattern.test(name)).map(([, value]) => value);
    for (const pattern of [/p50/, /p99/, /max/, /per_s|rate/]) {
      assert.ok(find(pattern).some((value) => value > 0), `${pattern} is missing in ${stdout}`);
    }
    assert.ok(result.machine && result.settings, `machine and settings are missing in ${stdout}`);
    assert.ok(find(/settings.*messages/).some((value) => value > 0), stdout);
  });
}

function collectNumbers(value, name, into) {
  if (typeof value === 'number') into.set(name, value);
  else if (value && typeof value === 'object') {
    for (const [key, inner] of Object.entries(value)) collectNumbers(inner, `${name}.${key}`, into);
  }
}
