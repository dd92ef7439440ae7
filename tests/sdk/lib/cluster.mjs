// A Firth cluster of real processes, to be looked at, killed and restarted.

import fs from 'node:fs';
import path from 'node:path';

import { ROOT, alive, run, start, stop, tail, tempFolder } from './process.mjs';
import { fatal, inTime, until } from './wait.mjs';

export const FIRTH = process.env.FIRTH_BIN ?? path.join(ROOT, 'target/release/firth');
// Longer than a busy two-core machine needs; a healthy one takes a second.
const START_MS = 60_000;

/** `firth` with arguments, run to its end. */
export function firth(args, options) {
  return run([FIRTH, ...args], options);
}

/** A cluster made by `firth dev` in a folder of its own. Nodes are named by their number, from 1. */
export class Cluster {
  /** Starts a cluster and waits until every node serves and every shard has a leader.
   *
   * `kafka` is a HOST:PORT to mirror with; `data` an existing folder to start on again, which then outlives `stop`.
   */
  static async start({ nodes = 3, kafka, data } = {}) {
    if (!fs.existsSync(FIRTH)) throw new Error(`${FIRTH} is missing; run: cargo build --release`);
    const cluster = new Cluster(data);
    const more = kafka ? ['--kafka', kafka] : [];
    const args = ['dev', '--nodes', String(nodes), '--port', '0', '--data', cluster.data];
    const argv = [FIRTH, ...args, '--ready-file', cluster.readyFile, ...more];
    cluster.process = start(argv, { log: cluster.log });
    try {
      await cluster.#ready();
      return cluster;
    } catch (error) {
      const logs = cluster.logs();
      await cluster.destroy();
      throw new Error(`${error.message}\n${logs}`);
    }
  }

  constructor(data) {
    this.folder = tempFolder('cluster');
    this.data = data ?? path.join(this.folder, 'data');
    this.readyFile = path.join(this.folder, 'ready.json');
    this.log = path.join(this.folder, 'firth.log');
    this.restarted = new Map();
    this.nodes = [];
  }

  /** The app's API key, `app.key:secret`. */
  get key() {
    return this.ready.key;
  }

  get app() {
    return this.key.split('.')[0];
  }

  node(id) {
    const node = this.nodes.find((one) => one.id === id);
    if (!node) throw new Error(`there is no node ${id}`);
    return node;
  }

  /** Numbers of the nodes whose processes live. */
  living() {
    return this.nodes.filter((node) => alive(node.pid)).map((node) => node.id);
  }

  url(id) {
    return this.node(id).url;
  }

  port(id) {
    return Number(new URL(this.url(id)).port);
  }

  /** `GET` or another method on a node's client door, with the API key: `{status, headers, body}`. */
  async rest(id, target, { method = 'GET', body, headers = {}, key = this.key } = {}) {
    const authorization = `Basic ${Buffer.from(key).toString('base64')}`;
    const response = await fetch(new URL(target, this.url(id)), {
      method,
      headers: { authorization, ...(body ? { 'content-type': 'application/json' } : {}), ...headers },
      body: body && (typeof body === 'string' ? body : JSON.stringify(body)),
      signal: AbortSignal.timeout(15_000),
    });
    const text = await response.text();
    return { status: response.status, headers: response.headers, body: parse(text) };
  }

  /** What a node's admin listener says of itself. */
  async status(id) {
    return json(new URL('/status', this.node(id).admin));
  }

  /** `{shard, leader}` of a channel as node `id` sees it; `leader` is null while unknown. */
  async whereIs(channel, id = this.living()[0]) {
    return json(new URL(`/channels/${this.app}/${encodeURIComponent(channel)}`, this.node(id).admin));
  }

  /** The living node that leads the channel's shard, awaited. */
  async leaderOf(channel, { through, within = 15_000 } = {}) {
    return until(
      async () => {
        const { leader } = await this.whereIs(channel, through);
        return this.living().includes(leader) && leader;
      },
      { what: `a living leader of channel ${channel}`, within, every: 10 },
    );
  }

  /** A channel name that starts with `prefix` and whose shard is led by node `id`, awaited: a cluster that has just
   * started spreads its leaders for some seconds. */
  async channelLedBy(id, prefix) {
    const names = Array.from({ length: 200 }, (_, i) => `${prefix}-${i}`);
    const found = async () => {
      for (const name of names) if ((await this.leaderOf(name)) === id) return name;
      return false;
    };
    return until(found, { what: `node ${id} to lead one of ${names.length} channels`, within: 30_000, every: 200 });
  }

  /** Which living node carries which partitions of a Kafka topic into channels: node number → partition numbers. */
  async bridgingNodes(topic) {
    const found = new Map();
    for (const id of this.living()) {
      const { bridges } = await this.status(id);
      const own = bridges.flatMap((bridge) => bridge.inbound).filter((partition) => partition.topic === topic);
      if (own.length > 0) found.set(id, own.map((partition) => partition.partition));
    }
    return found;
  }

  /** `kill -9` of one node. */
  async kill(id) {
    const { pid } = this.node(id);
    process.kill(pid, 'SIGKILL');
    await until(() => !alive(pid), { what: `node ${id} (process ${pid}) to be gone`, every: 2 });
  }

  /** `kill -9` of a node, `body` without it, and its restart whatever comes of that. */
  async without(id, body) {
    await this.kill(id);
    try {
      return await body();
    } finally {
      await this.restart(id);
    }
  }

  /** The numbers of the other nodes. */
  others(id) {
    return this.nodes.map((node) => node.id).filter((other) => other !== id);
  }

  /** Starts a killed node again by its own command and waits until it serves. */
  async restart(id, { serving = true } = {}) {
    const node = this.node(id);
    const child = start(node.command, { log: this.log });
    this.restarted.set(id, child);
    node.pid = child.pid;
    if (serving) await this.serving(id);
  }

  /** Waits until node `id` answers clients and knows a leader of every shard. */
  async serving(id) {
    const child = this.restarted.get(id) ?? this.process;
    await until(
      async () => {
        if (child.exitCode !== null) throw fatal(`node ${id}: process ended with ${child.exitCode}`);
        const [time, status] = await Promise.all([this.rest(id, '/time'), this.status(id)]);
        const leaderless = status.shards.filter((shard) => !shard.leader).map((shard) => shard.id);
        if (leaderless.length > 0) throw new Error(`shards without a leader: ${leaderless}`);
        return time.status === 200 && status.shards.length > 0;
      },
      { what: `node ${id} to serve`, within: START_MS },
    );
  }

  /** Ends everything as an operator would, and fails when a process stays. */
  async stop() {
    await Promise.all([this.process, ...this.restarted.values()].map((child) => stop(child)));
    await until(() => this.living().length === 0, { what: 'all nodes to end with their cluster' });
  }

  /** Ends everything at once and removes the cluster's folder; `data` given to `start` stays. */
  async destroy({ keep = false } = {}) {
    for (const id of this.living()) process.kill(this.node(id).pid, 'SIGKILL');
    const children = [this.process, ...this.restarted.values()];
    await Promise.all(children.map((child) => stop(child, { signal: 'SIGKILL' })));
    if (!keep) fs.rmSync(this.folder, { recursive: true, force: true });
  }

  /** The end of what all processes said, for the report of a failure. */
  logs() {
    const files = fs.existsSync(this.data) ? fs.readdirSync(this.data, { recursive: true }) : [];
    // A node's own words, `node-1.log`; segments of its log end like that too.
    const words = files.filter((file) => /^node-\d+\.log$/.test(String(file)));
    const more = words.map((file) => path.join(this.data, String(file)));
    return [this.log, ...more].map((file) => `--- ${file}\n${tail(file)}`).join('\n');
  }

  async #ready() {
    const wait = { what: 'firth dev to write its ready file', within: START_MS };
    this.ready = await until(() => {
      if (this.process.exitCode !== null) throw fatal(`firth dev ended with ${this.process.exitCode}`);
      return JSON.parse(fs.readFileSync(this.readyFile, 'utf8'));
    }, wait);
    this.nodes = this.ready.nodes;
    await Promise.all(this.nodes.map((node) => this.serving(node.id)));
  }

  /** Waits for the end of `firth dev` itself, which has no node left. */
  async ended() {
    await inTime(this.process.ended, { what: 'firth dev to end after its last node' });
  }
}

async function json(url) {
  const response = await fetch(url, { signal: AbortSignal.timeout(5_000) });
  if (!response.ok) throw new Error(`${url} answered ${response.status}: ${await response.text()}`);
  return response.json();
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
