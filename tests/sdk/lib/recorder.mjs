// What each SDK sent and received, written down as it happens; `verdict.mjs` judges it.
//
// A history is a list of plain events in the order in which this process saw them, each with `at` in milliseconds:
//
//   connection  {client, state, connectionId, reason}
//   channel     {client, channel, state, resumed, attachSerial?, reason}; state `update` is an event, not a state
//   publish     {client, channel, texts, ref}, then one of
//   acked       {client, channel, texts, ref, serials?}      refused {client, channel, texts, ref, error}
//   message     {client, channel, text, serial?, id, connectionId}
//   presence    {client, channel, action, clientId, connectionId, data, id}
//   present     {client, channel, clientId, data}: a presence operation was acknowledged; `absent` the same of a leave;
//               `unsure`: it was not
//   read        {channel, node, after, limit, records}: the newest records, asked for when `after` was acknowledged
//   died        {client, connectionId}: its machine is gone without a word
//   fault       {what}: what the nemesis did; of no meaning to the judge
//   stored      {channel, node, records: [{text, serial, id}]} oldest first, all of them
//   members     {channel, from, members: [{clientId, connectionId, data}]}: at the end, from a client or a node

import fs from 'node:fs';
import path from 'node:path';
import readline from 'node:readline';
import { fileURLToPath } from 'node:url';

import Ably from 'ably';
import Ably1 from 'ably-1';

import { Line } from './line.mjs';
import { ROOT, startPiped } from './process.mjs';
import { describe } from './sdk.mjs';
import { until } from './wait.mjs';

const PYTHON = process.env.FIRTH_PYTHON ?? path.join(ROOT, 'target/venv/bin/python');
const DRIVER = fileURLToPath(new URL('../python/recorder.py', import.meta.url));
// Built where there is a Go toolchain.
const GO = process.env.FIRTH_GO ?? path.join(ROOT, 'target/go/recorder');
const IMPATIENT = { disconnectedRetryTimeout: 200, suspendedRetryTimeout: 500, channelRetryTimeout: 500 };

/** The SDKs that can be recorded, by the name that `SDK=` takes. */
export const SDKS = {
  'js2-json': (options) => JavaScript.open(options, js2(options, false)),
  'js2-msgpack': (options) => JavaScript.open(options, js2(options, true)),
  'js1-json': (options) => JavaScript.open(options, js1(options, false)),
  'js1-msgpack': (options) => JavaScript.open(options, js1(options, true)),
  'python-json': (options) => Driven.open(options, [PYTHON, DRIVER], 'json'),
  'python-msgpack': (options) => Driven.open(options, [PYTHON, DRIVER], 'msgpack'),
  ...(fs.existsSync(GO) && {
    'go-json': (options) => Driven.open(options, [GO], 'json'),
    'go-msgpack': (options) => Driven.open(options, [GO], 'msgpack'),
  }),
};

/** The list of events, in order. */
export class History {
  events = [];
  #start = performance.now();

  add(kind, event) {
    this.events.push({ at: Math.round(performance.now() - this.#start), kind, ...event });
  }

  count(kind) {
    return this.events.reduce((sum, event) => sum + (event.kind === kind), 0);
  }

  /** One event a line. */
  save(file) {
    fs.mkdirSync(path.dirname(file), { recursive: true });
    fs.writeFileSync(file, this.events.map((event) => `${JSON.stringify(event)}\n`).join(''));
  }
}

/** A client of some SDK on a line of its own, whose every word goes into the history. */
export class Participant {
  /** The last text that came, by channel. */
  last = new Map();
  state = 'initialized';
  attached = new Map();
  /** What became of the last presence operation, by channel. */
  surely = new Map();
  unanswered = 0;
  #ref = 0;

  constructor({ name, history, line }) {
    Object.assign(this, { name, history, line });
  }

  /** Publishes the texts as one atomic batch; answers whether it was acknowledged. */
  async publish(channel, texts) {
    const ref = `${this.name}#${this.#ref++}`;
    this.add('publish', { channel, texts, ref });
    this.unanswered++;
    try {
      const serials = await this.sendPublish(channel, texts);
      this.add('acked', { channel, texts, ref, serials: serials?.length ? serials : undefined });
      return true;
    } catch (error) {
      this.add('refused', { channel, texts, ref, error: describe(error) });
      return false;
    } finally {
      this.unanswered--;
    }
  }

  /** Enters, updates or leaves; answers whether that was acknowledged. */
  async appear(operation, channel, data) {
    this.unanswered++;
    try {
      await this.sendPresence(operation, channel, data);
      const now = operation === 'leave' ? 'absent' : 'present';
      this.surely.set(channel, now);
      this.add(now, { channel, clientId: this.name, data });
      return true;
    } catch (error) {
      this.surely.set(channel, 'unsure');
      this.add('unsure', { channel, clientId: this.name, operation, error: describe(error) });
      return false;
    } finally {
      this.unanswered--;
    }
  }

  /** The machine of this client is gone; nothing of it says goodbye. */
  die() {
    this.dead = true;
    this.add('died', { connectionId: this.connectionId });
    this.line.die();
  }

  async settled({ within = 60_000 } = {}) {
    const ready = () =>
      this.state === 'connected' && [...this.attached.values()].every((state) => state === 'attached');
    const what = () => `${this.name} to be connected and attached; it is ${this.state}, ${[...this.attached.values()]}`;
    await until(ready, { what: what(), within }).catch((error) => {
      throw new Error(`${error.message}; now ${what()}`);
    });
    await until(() => this.unanswered === 0, { what: `${this.name}: an answer to everything it asked`, within });
  }

  add(kind, event) {
    if (this.dead && kind !== 'died') return;
    this.history.add(kind, { client: this.name, ...event });
  }

  onConnection({ state, connectionId, reason }) {
    this.state = state;
    if (state === 'connected') this.connectionId = connectionId;
    this.add('connection', { state, connectionId, reason });
  }

  onChannel({ channel, state, ...more }) {
    // What happens to a channel without a change of state leaves it attached.
    this.attached.set(channel, state === 'update' ? 'attached' : state);
    this.add('channel', { channel, state, ...more });
  }

  onMessage(event) {
    this.last.set(event.channel, event.text);
    this.add('message', event);
  }
}

function js2({ key, name, line }, useBinaryProtocol) {
  const where = { endpoint: '127.0.0.1', port: line.port, tls: false };
  return new Ably.Realtime({ key, clientId: name, useBinaryProtocol, ...where, ...QUIET, ...IMPATIENT });
}

function js1({ key, name, line }, useBinaryProtocol) {
  const where = { restHost: '127.0.0.1', realtimeHost: '127.0.0.1', port: line.port, tls: false };
  return new Ably1.Realtime.Promise({ key, clientId: name, useBinaryProtocol, ...where, ...QUIET, ...IMPATIENT });
}

const QUIET = { logLevel: 0, disableConnectivityCheck: true };

/** ably-js, of either generation: the calls used here have the same names in both. */
class JavaScript extends Participant {
  static async open(options, client) {
    const self = new JavaScript(options);
    self.client = client;
    client.connection.on((change) =>
      self.onConnection({
        state: change.current,
        connectionId: client.connection.id,
        reason: change.reason && describe(change.reason),
      }),
    );
    return self;
  }

  async subscribe(name, { presence = false } = {}) {
    const channel = this.client.channels.get(name);
    channel.on((change) =>
      this.onChannel({
        channel: name,
        state:
          channel.state === 'attached' && change.previous === 'attached' && change.current === 'attached'
            ? 'update'
            : change.current,
        resumed: change.resumed,
        attachSerial: channel.properties.attachSerial,
        reason: change.reason && describe(change.reason),
      }),
    );
    const messages = channel.subscribe((message) =>
      this.onMessage({
        channel: name,
        text: message.data,
        serial: message.serial,
        id: message.id,
        connectionId: message.connectionId,
      }),
    );
    // Both listen before either has waited for the channel: what comes with ATTACHED is heard.
    if (presence) {
      await channel.presence.subscribe((event) => this.add('presence', { channel: name, ...told(event) }));
    }
    await messages;
  }

  async sendPublish(name, texts) {
    const messages = texts.map((data) => ({ name: 'm', data }));
    return (await this.client.channels.get(name).publish(messages))?.serials;
  }

  async sendPresence(operation, name, data) {
    await this.client.channels.get(name).presence[operation](data);
  }

  async members(name) {
    return (await this.client.channels.get(name).presence.get()).map(told);
  }

  die() {
    super.die();
    // Its goodbye goes nowhere: the line is dead already. Without it the SDK would knock for ever.
    this.client.close();
  }

  async close() {
    this.client.close();
    this.line.close();
  }
}

function told({ action, clientId, connectionId, data, id }) {
  return { action, clientId, connectionId, data, id };
}

/** ably-python or ably-go in a process of its own. */
class Driven extends Participant {
  #waiting = new Map();
  #next = 0;
  #complaints = '';

  static async open(options, driver, format) {
    const self = new Driven(options);
    self.process = startPiped([...driver, options.key, `127.0.0.1:${options.line.port}`, options.name, format]);
    self.process.stdin.on('error', () => {});
    self.process.stderr
      .setEncoding('utf8')
      .on('data', (part) => (self.#complaints = (self.#complaints + part).slice(-4000)));
    readline.createInterface({ input: self.process.stdout }).on('line', (line) => self.#onLine(JSON.parse(line)));
    self.process.ended.then(() => self.#onEnd());
    return self;
  }

  async subscribe(name, { presence = false } = {}) {
    await this.#call('subscribe', { channel: name, presence });
  }

  async sendPublish(channel, texts) {
    return this.#call('publish', { channel, texts });
  }

  async sendPresence(operation, channel, data) {
    await this.#call(operation, { channel, data });
  }

  async members(channel) {
    return this.#call('members', { channel });
  }

  die() {
    super.die();
    this.process.kill('SIGKILL');
  }

  async close() {
    this.process.kill('SIGKILL');
    this.line.close();
  }

  #call(what, more) {
    const ref = this.#next++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(ref, { resolve, reject });
      this.process.stdin.write(`${JSON.stringify({ ref, do: what, ...more })}\n`);
    });
  }

  #onLine({ ref, answer, error, event, ...more }) {
    if (event === 'connection') this.onConnection({ ...more, reason: more.reason && describe(more.reason) });
    if (event === 'channel') this.onChannel({ ...more, reason: more.reason && describe(more.reason) });
    if (event === 'message') this.onMessage(more);
    if (event === 'presence') this.add('presence', more);
    const waiting = this.#waiting.get(ref);
    if (event || !waiting) return;
    this.#waiting.delete(ref);
    if (error) waiting.reject(Object.assign(new Error(error.message), { code: error.code }));
    else waiting.resolve(answer);
  }

  #onEnd() {
    const error = new Error(`the driver ended with ${this.process.exitCode}: ${this.#complaints}`);
    for (const { reject } of this.#waiting.values()) reject(error);
    this.#waiting.clear();
  }
}

/** Opens a participant of the SDK `sdk` on a line that leads to `node` at first. */
export async function participant(sdk, { name, cluster, node, history }) {
  const line = await Line.open(cluster, node);
  return SDKS[sdk]({ name, key: cluster.key, history, line });
}
