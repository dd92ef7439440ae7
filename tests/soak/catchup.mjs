// How fast a node with an emptied disk gets everything back, beside the rate at which the same disk takes plain sequential
// writes, while the cluster goes on serving. `make catchup`.
//
// Settings, from the environment: GB of payload (2), BYTES each (20000), RATE of small messages meanwhile (100), LIMIT in
// bytes per second for catching up (0: none), DIR.

import fs from 'node:fs';
import path from 'node:path';

import { Cluster, firth } from '../sdk/lib/cluster.mjs';
import { dataOf, diskBytes } from '../sdk/lib/disk.mjs';
import { tempFolder } from '../sdk/lib/process.mjs';
import { Clients } from '../sdk/lib/sdk.mjs';
import { pause, until } from '../sdk/lib/wait.mjs';
import { table } from './curve.mjs';

const number = (name, value) => Number(process.env[name] ?? value);
const GB = number('GB', 2);
const BYTES = number('BYTES', 20_000);
const RATE = number('RATE', 100);
const LIMIT = number('LIMIT', 0);
const WIPED = 3;
const MB = 1e6;
const SAMPLE_MS = 250;
const LONG_MS = 30 * 60_000;

/** MB/s of writing so many bytes to a new file, 1 MiB at a time, with a data sync each 16 MiB. */
function sequentialRate(folder, bytes) {
  const file = path.join(folder, 'sequential');
  const block = Buffer.alloc(1 << 20, 'firth');
  const handle = fs.openSync(file, 'w');
  const began = performance.now();
  for (let at = 0; at < bytes; at += block.length) {
    fs.writeSync(handle, block);
    if (at % (16 << 20) === 0) fs.fdatasyncSync(handle);
  }
  fs.fdatasyncSync(handle);
  const seconds = (performance.now() - began) / 1000;
  fs.closeSync(handle);
  fs.rmSync(file);
  return bytes / seconds / MB;
}

/** Publishes small messages by the clock and keeps how long each took to be acknowledged, in milliseconds. */
class Trickle {
  took = [];
  refused = 0;
  ended = false;

  constructor(channels) {
    this.running = this.#run(channels);
  }

  async #run(channels) {
    const began = performance.now();
    const waiting = new Set();
    for (let n = 0; !this.ended; ) {
      const due = ((performance.now() - began) / 1000) * RATE;
      for (; n < due; n++) {
        const sent = performance.now();
        const publish = channels[n % channels.length].publish('m', 'small').then(
          () => this.took.push(performance.now() - sent),
          () => this.refused++);
        waiting.add(publish);
        publish.finally(() => waiting.delete(publish));
      }
      await pause(5);
    }
    await Promise.all(waiting);
  }

  /** What was measured since the last call. */
  take() {
    const took = this.took.splice(0).sort((a, b) => a - b);
    const at = (share) => took[Math.min(took.length - 1, Math.floor(took.length * share))]?.toFixed(1) ?? '-';
    const refused = this.refused;
    this.refused = 0;
    return { count: took.length, p50: at(0.5), p99: at(0.99), max: at(1), refused };
  }

  async end() {
    this.ended = true;
    await this.running;
  }
}

async function main() {
  process.env.FIRTH__STORAGE__CATCH_UP_BYTES_PER_SECOND = String(LIMIT);
  const home = process.env.DIR ? fs.mkdtempSync(path.join(process.env.DIR, 'catchup-')) : tempFolder('catchup');
  const data = path.join(home, 'data');
  fs.mkdirSync(data);
  const cluster = await Cluster.start({ data });
  const clients = new Clients(cluster);
  let failed = true;
  try {
    await measure(cluster, clients, home);
    failed = false;
  } finally {
    clients.closeAll();
    if (failed) console.error(cluster.logs());
    await cluster.destroy({ keep: failed });
    fs.rmSync(home, { recursive: true, force: true });
  }
}

async function measure(cluster, clients, home) {
  const messages = Math.ceil((GB * 1e9) / BYTES);
  say(`publishing ${messages} messages of ${BYTES} bytes`);
  const urls = [1, 2, 3].map((id) => cluster.url(id)).join(',');
  const args = ['bench', 'publish', '--url', urls, '--key', cluster.key, '--prefix', 'persisted:catchup', '--msgpack',
    '--channels', '64', '--publishers', '4', '--window', '64', '--size', String(BYTES), '--messages', String(messages)];
  const filled = await firth(args, { within: LONG_MS });
  if (filled.code !== 0) throw new Error(`${filled.stdout}${filled.stderr}`);
  say(filled.stdout.trimEnd());

  const rates = [sequentialRate(home, GB * 1e9)];
  await cluster.kill(WIPED);
  const folder = dataOf(cluster, WIPED);
  const wanted = diskBytes(dataOf(cluster, 1));
  fs.rmSync(folder, { recursive: true });
  rates.push(sequentialRate(home, GB * 1e9));

  const sockets = await Promise.all([1, 2].map((id) => clients.realtime(id)));
  const trickle = new Trickle(Array.from({ length: 16 }, (_, n) => sockets[n % 2].channels.get(`trickle-${n}`)));
  await pause(5_000);
  const before = trickle.take();
  await cluster.restart(WIPED, { serving: false });
  await until(async () => (await cluster.status(WIPED)) && true, { what: 'the empty node to answer' }).catch(() => {});
  const began = performance.now();
  const elapsed = () => (performance.now() - began) / 1000;
  const curve = [];
  let done = false;
  const admitted = firth(['admin', '--url', cluster.node(1).admin, 'node', 'readmit', String(WIPED)], { within: LONG_MS })
    .finally(() => (done = true));
  while (!done) {
    curve.push([elapsed(), fs.existsSync(folder) ? diskBytes(folder) : 0]);
    await pause(SAMPLE_MS);
  }
  const outcome = await admitted;
  const seconds = elapsed();
  const during = trickle.take();
  if (outcome.code !== 0) throw new Error(outcome.stderr);
  await cluster.serving(WIPED);
  const serving = elapsed();
  await trickle.end();
  rates.push(sequentialRate(home, GB * 1e9));

  const got = diskBytes(folder);
  const nearly = curve.find(([, bytes]) => bytes >= 0.95 * got)?.[0] ?? seconds;
  const raw = [...rates].sort((a, b) => a - b)[1];
  const rate = (GB * 1e9) / seconds / MB;
  const steepest = Math.max(...curve.slice(4).map(([at, bytes], n) => (bytes - curve[n][1]) / (at - curve[n][0]))) / MB;
  say(table([
    ['', 'value'],
    ['disk of node 1, and of the readmitted one', `${(wanted / MB).toFixed(0)} MB, ${(got / MB).toFixed(0)} MB`],
    ['sequential writes before, with two nodes, after', `${rates.map((one) => one.toFixed(0)).join(', ')} MB/s`],
    ['95 % of it back after', `${nearly.toFixed(1)} s`],
    ['votes everywhere after', `${seconds.toFixed(1)} s, serves after ${serving.toFixed(1)} s`],
    ['payload caught up with', `${rate.toFixed(0)} MB/s, ${(rate / raw).toFixed(2)} of sequential`],
    ['steepest second', `${steepest.toFixed(0)} MB/s, ${(steepest / raw).toFixed(2)} of sequential`],
    ['publishing before', told(before)],
    ['publishing meanwhile', told(during)],
  ]));
}

function told({ count, p50, p99, max, refused }) {
  return `${count} acknowledged, p50 ${p50} ms, p99 ${p99} ms, longest ${max} ms, ${refused} refused`;
}

function say(text) {
  process.stdout.write(`${text}\n`);
}

await main();
