// Publishes at a steady rate for a long time and watches what the nodes' memory and disks do: with retention both must
// become flat. `make soak MINUTES=60`; results in target/soak.
//
// Settings, from the environment: MINUTES (60), RATE messages per second (500), BYTES each (1000), CHANNELS (64), OUT.

import fs from 'node:fs';
import path from 'node:path';

import { Cluster } from '../sdk/lib/cluster.mjs';
import { dataOf, diskBytes, segments } from '../sdk/lib/disk.mjs';
import { ROOT } from '../sdk/lib/process.mjs';
import { Clients, describe, history } from '../sdk/lib/sdk.mjs';
import { pause } from '../sdk/lib/wait.mjs';
import { draw, line, table } from './curve.mjs';

const number = (name, value) => Number(process.env[name] ?? value);
const MINUTES = number('MINUTES', 60);
const RATE = number('RATE', 500);
const BYTES = number('BYTES', 1000);
const CHANNELS = number('CHANNELS', 64);
const OUT = process.env.OUT ?? path.join(ROOT, 'target/soak');
const SAMPLE_MS = 10_000;
const TABLE_MS = 60_000;
// One message a second stays for a day.
const PERSISTED = 'persisted:soak';
const PERSISTED_MS = 1_000;
// Retention is two minutes; the last ones of them are left to clocks and ticks.
const KEPT_MS = 100_000;
// Growth over the second half that counts as flat: a share of what is there, per hour, beyond what must grow.
const GROWTH_MAX = 0.1;
// Before that, memory still fills what is meant to be full: the log's tail, and two minutes of retention.
const JUDGED_MINUTES = 15;
const MB = 1 << 20;

/** One node's numbers now; `null` once its process is gone. */
function look(cluster, node) {
  try {
    const status = fs.readFileSync(`/proc/${node.pid}/status`, 'utf8');
    const kilobytes = (field) => Number(new RegExp(`^${field}:\\s+(\\d+)`, 'm').exec(status)?.[1] ?? NaN);
    const folder = dataOf(cluster, node.id);
    return {
      node: node.id,
      rss: kilobytes('VmRSS') * 1024,
      anon: kilobytes('RssAnon') * 1024,
      disk: diskBytes(folder),
      segments: segments(folder).length,
      fds: fs.readdirSync(`/proc/${node.pid}/fd`).length,
      threads: Number(/^Threads:\s+(\d+)/m.exec(status)?.[1] ?? NaN),
    };
  } catch (error) {
    if (error.code === 'ENOENT' || error.code === 'ESRCH') return null;
    throw error;
  }
}

/** Publishes each message in its turn by the clock, and remembers what was acknowledged lately. */
class Publisher {
  acked = 0;
  refused = 0;
  reasons = new Map();
  late = 0;
  /** `{name, text, at}` of the acknowledgements that retention cannot have taken. */
  recent = [];
  waiting = new Set();

  constructor(channels, names) {
    this.channels = channels;
    this.names = names;
  }

  async run(until, stopped) {
    const began = Date.now();
    let next = 0;
    while (Date.now() < until && !stopped()) {
      const due = Math.floor(((Date.now() - began) / 1000) * RATE);
      // What cannot be kept up with is told, not piled up.
      if (due - next > 2 * RATE) {
        this.late += due - next;
        next = due;
      }
      for (; next < due; next++) this.publish(next % this.names.length, `message ${next}`);
      await pause(5);
    }
    await Promise.all(this.waiting);
  }

  publish(n, what) {
    const name = this.names[n];
    const text = `${what}|`.padEnd(BYTES, 'x');
    const publish = this.channels[n].publish('m', text).then(
      () => {
        this.acked++;
        this.recent.push({ name, text: what, at: Date.now() });
        while (this.recent.length > 0 && this.recent[0].at < Date.now() - KEPT_MS) this.recent.shift();
      },
      (error) => {
        this.refused++;
        const reason = describe(error);
        this.reasons.set(reason, (this.reasons.get(reason) ?? 0) + 1);
      });
    this.waiting.add(publish);
    publish.finally(() => this.waiting.delete(publish));
  }
}

async function main() {
  fs.mkdirSync(OUT, { recursive: true });
  const cluster = await Cluster.start();
  const clients = new Clients(cluster);
  let failed = true;
  try {
    failed = !(await soak(cluster, clients));
  } finally {
    clients.closeAll();
    if (failed) console.error(cluster.logs());
    await cluster.destroy({ keep: failed });
  }
  process.exitCode = failed ? 1 : 0;
}

async function soak(cluster, clients) {
  const names = Array.from({ length: CHANNELS }, (_, n) => `soak-${n}`);
  const sockets = await Promise.all([1, 2, 3].map((id) => clients.realtime(id)));
  const publisher = new Publisher(names.map((name, n) => sockets[n % 3].channels.get(name)), names);
  const kept = [];
  const samples = [];
  const state = { dead: null };
  const began = Date.now();
  const until = began + MINUTES * 60_000;
  say(`${RATE} messages/s of ${BYTES} bytes on ${CHANNELS} channels, 1/s on ${PERSISTED}, for ${MINUTES} minutes`);
  const csv = fs.createWriteStream(path.join(OUT, 'retention.csv'));
  csv.write('seconds,node,rss,anon,disk,segments,fds,threads,acked,refused\n');
  const watching = watch({ cluster, publisher, samples, csv, state, began, until });
  const day = sockets[0].channels.get(PERSISTED);
  const keeping = persist(day, kept, until, () => state.dead);
  await publisher.run(until, () => state.dead);
  await Promise.all([watching, keeping]);
  await new Promise((done) => csv.end(done));
  const verdict = judge(samples, publisher, kept, state);
  if (!state.dead) verdict.push(...(await missing(clients, publisher.recent, kept)));
  fs.writeFileSync(path.join(OUT, 'retention.svg'), draw(panels(samples)));
  for (const { ok, text } of verdict) say(`${ok ? 'ok  ' : 'BAD '} ${text}`);
  say(`curves in ${path.join(OUT, 'retention.svg')}, numbers in retention.csv`);
  return verdict.every((one) => one.ok);
}

async function persist(channel, kept, until, stopped) {
  for (let n = 0; Date.now() < until && !stopped(); n++) {
    const text = `kept ${n}`;
    await channel.publish('m', text).then(() => kept.push(text), () => {});
    await pause(PERSISTED_MS);
  }
}

async function watch({ cluster, publisher, samples, csv, state, began, until }) {
  let shown = 0;
  while (Date.now() < until && !state.dead) {
    const seconds = (Date.now() - began) / 1000;
    const now = cluster.nodes.map((node) => look(cluster, node));
    state.dead = now.some((one) => !one) ? `node ${cluster.nodes[now.indexOf(null)].id} ended` : null;
    for (const one of now.filter(Boolean)) {
      samples.push({ seconds, ...one });
      const { node, rss, anon, disk, segments: files, fds, threads } = one;
      csv.write(`${[seconds.toFixed(1), node, rss, anon, disk, files, fds, threads, publisher.acked, publisher.refused]}\n`);
    }
    if (Date.now() - shown > TABLE_MS) {
      shown = Date.now();
      show(now.filter(Boolean), seconds, publisher);
    }
    await pause(Math.max(0, Math.min(SAMPLE_MS, until - Date.now())));
  }
}

function show(now, seconds, publisher) {
  const mb = (bytes) => (bytes / MB).toFixed(1);
  const head = ['node', 'RSS MB', 'anon MB', 'disk MB', 'segments', 'fds', 'threads'];
  const rows = now.map((one) => [one.node, mb(one.rss), mb(one.anon), mb(one.disk), one.segments, one.fds, one.threads]);
  say(`after ${(seconds / 60).toFixed(1)} min: ${publisher.acked} acknowledged, ${publisher.refused} refused, ${publisher.late} not sent in time`);
  say(table([head, ...rows]));
}

function judge(samples, publisher, kept, state) {
  const verdict = [{ ok: !state.dead, text: state.dead ?? 'every node lived to the end' }];
  verdict.push({ ok: publisher.acked > 0 && kept.length > 0, text: `${publisher.acked} messages acknowledged, ${kept.length} of them for a day` });
  const refused = [...publisher.reasons].map(([reason, times]) => `${times} × ${reason}`).join('; ');
  verdict.push({ ok: publisher.refused === 0, text: `${publisher.refused} refused ${refused}` });
  const wanted = RATE * MINUTES * 60;
  verdict.push({ ok: publisher.late < wanted / 20, text: `${publisher.late} of ${wanted} messages not sent in time by this driver` });
  for (const node of new Set(samples.map((one) => one.node))) {
    const own = samples.filter((one) => one.node === node);
    const half = own.filter((one) => one.seconds >= own.at(-1).seconds / 2);
    if (half.length < 3) continue;
    for (const field of ['anon', 'disk']) verdict.push(flat(node, field, half, kept));
  }
  return verdict;
}

/** Whether a number stopped to grow, but for the day's messages, which must stay. */
function flat(node, field, half, kept) {
  const { slope, at } = line(half.map((one) => [one.seconds / 3600, one[field]]));
  const level = at(half.at(-1).seconds / 3600);
  const hours = half.at(-1).seconds / 3600;
  const must = field === 'disk' ? (kept.length / hours) * 1000 : 0;
  const share = (slope - must) / level;
  const text = `node ${node}: ${field} ${(level / MB).toFixed(1)} MB, ${(slope / MB).toFixed(1)} MB/hour over the second half`;
  if (MINUTES < JUDGED_MINUTES) return { ok: true, text: `${text}: not judged, the run is shorter than ${JUDGED_MINUTES} minutes` };
  return { ok: share < GROWTH_MAX, text: `${text} (${(share * 100).toFixed(1)} % of it; up to ${GROWTH_MAX * 100} % counts as flat)` };
}

/** What was acknowledged and must be there, and is not: of each channel's last two minutes, and of the day. */
async function missing(clients, recent, kept) {
  const verdict = [];
  const still = recent.filter((one) => one.at > Date.now() - KEPT_MS);
  const byName = new Map();
  for (const { name, text } of still) byName.set(name, [...(byName.get(name) ?? []), text]);
  for (const id of [1, 2, 3]) {
    let lost = 0;
    let doubled = 0;
    for (const [name, texts] of [...byName, [PERSISTED, kept]]) {
      const seen = (await history(clients.rest(id), name)).map((message) => message.data.split('|')[0]);
      const held = new Set(seen);
      doubled += seen.length - held.size;
      lost += texts.filter((text) => !held.has(text)).length;
    }
    const text = `node ${id}: of ${still.length} recent and ${kept.length} kept messages ${lost} are missing, ${doubled} doubled`;
    verdict.push({ ok: lost === 0 && doubled === 0, text });
  }
  return verdict;
}

function panels(samples) {
  const nodes = [...new Set(samples.map((one) => one.node))];
  const series = (field, unit) => nodes.map((node) => {
    const own = samples.filter((one) => one.node === node);
    return { name: `node ${node}`, points: own.map((one) => [one.seconds / 60, one[field] / unit]) };
  });
  return [
    { title: 'Anonymous memory', unit: 'MB', series: series('anon', MB) },
    { title: 'Resident memory', unit: 'MB', series: series('rss', MB) },
    { title: 'Data directory', unit: 'MB', series: series('disk', MB) },
    { title: 'Open files', unit: 'count', series: series('fds', 1) },
  ];
}

function say(text) {
  process.stdout.write(`${text}\n`);
}

await main();
