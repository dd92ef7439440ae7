// The official JavaScript SDK, of both generations, pointed at one node or at all of them, with what every test wants of it.

import Ably from 'ably';
import Ably1 from 'ably-1';

import { Line } from './line.mjs';
import { inParallel, inTime, until } from './wait.mjs';

// A test has no 15 s to wait for the SDK's second attempt; nothing else of the SDK's behaviour is changed.
const IMPATIENT = { disconnectedRetryTimeout: 200, suspendedRetryTimeout: 500, channelRetryTimeout: 500 };

/** Makes SDK clients and closes them all at the end of a scenario. */
export class Clients {
  #open = [];
  #lines = [];

  constructor(cluster) {
    this.cluster = cluster;
  }

  /** A realtime client of node `id`, connected. */
  async realtime(id, options = {}) {
    return this.connect({ port: this.cluster.port(id), ...options });
  }

  /** A realtime client with the given host and port, connected. */
  async connect(options) {
    const client = this.create(options);
    await connected(client);
    return client;
  }

  /** A connected client behind a load balancer: of node `id` while that lives, then of another. `{client, line}`. */
  async roaming(id, options = {}) {
    const line = await this.line(id);
    return { line, client: await this.connect({ port: line.port, ...options }) };
  }

  /** A way to node `id`, closed with the clients. */
  async line(id) {
    const line = await Line.open(this.cluster, id);
    this.#lines.push(line);
    return line;
  }

  /** A realtime client that is connecting. `sdk` is the SDK's generation, 2 or 1. */
  create({ sdk = 2, ...options }) {
    const Realtime = sdk === 1 ? Ably1.Realtime.Promise : Ably.Realtime;
    const client = new Realtime(this.#options(sdk, { ...IMPATIENT, ...options }));
    this.#open.push(client);
    return client;
  }

  /** A REST client of node `id`. */
  rest(id, { sdk = 2, ...options } = {}) {
    const Rest = sdk === 1 ? Ably1.Rest.Promise : Ably.Rest;
    return new Rest(this.#options(sdk, { port: this.cluster.port(id), ...options }));
  }

  closeAll() {
    for (const client of this.#open.splice(0)) client.close();
    for (const line of this.#lines.splice(0)) line.close();
  }

  #options(sdk, options) {
    const quiet = { logLevel: 0, disableConnectivityCheck: true };
    const where = sdk === 1 ? { restHost: '127.0.0.1', realtimeHost: '127.0.0.1' } : { endpoint: '127.0.0.1' };
    // Whoever brings other credentials does not want the key.
    const credential = ['token', 'tokenDetails', 'authCallback', 'authUrl'].some((name) => name in options)
      ? {} : { key: this.cluster.key };
    // Two hosts at once are refused by the SDK, so what a caller says replaces both names.
    if ('endpoint' in options) delete where.endpoint;
    return { ...credential, ...where, tls: false, useBinaryProtocol: true, ...quiet, ...options };
  }
}

/** What `promise` fails with; an error when it does not. */
export async function refusal(promise, what = 'a refusal') {
  const answer = await inTime(Promise.resolve(promise).then((value) => ({ value }), (error) => ({ error })), { what });
  if (!answer.error) throw new Error(`${what}: it was allowed, with ${JSON.stringify(answer.value)}`);
  return answer.error;
}

/** Waits for the SDK to be connected; an error with the server's reason when it gives up. */
export async function connected(client, { within = 20_000 } = {}) {
  const { connection } = client;
  const settled = new Promise((resolve, reject) => {
    const look = () => {
      if (connection.state === 'connected') resolve();
      if (connection.state === 'failed') reject(new Error(`connection failed: ${describe(connection.errorReason)}`));
    };
    connection.on(look);
    look();
  });
  await inTime(settled, { what: 'the SDK to connect', within });
}

/** Waits for a connection or channel state of the SDK. */
export async function state(thing, wanted, { within = 20_000 } = {}) {
  await until(() => thing.state === wanted, { what: `state ${wanted}`, within, every: 10 });
}

/** A subscriber that keeps all it receives, in order, and every sign of lost continuity. */
export class Subscriber {
  messages = [];
  losses = [];

  /** Attaches `client` to the channel; what is published from now on is received. */
  static async attach(client, name) {
    const subscriber = new Subscriber();
    subscriber.channel = client.channels.get(name);
    await subscriber.channel.subscribe((message) => subscriber.messages.push(message));
    subscriber.channel.on(['attached', 'update'], (change) => {
      if (!change.resumed) subscriber.losses.push(`${change.previous} → ${change.current}: ${describe(change.reason)}`);
    });
    return subscriber;
  }

  get data() {
    return this.messages.map((message) => message.data);
  }

  get serials() {
    return this.messages.map((message) => message.serial);
  }

  /** Waits until `count` messages have come. */
  async received(count, { within = 60_000 } = {}) {
    const { name } = this.channel;
    const what = () => `${count} messages on ${name}`;
    await until(() => this.messages.length >= count, { what: what(), within }).catch((error) => {
      throw new Error(`${error.message}; ${this.messages.length} came; losses: ${this.losses.join('; ') || 'none'}`);
    });
  }
}

/** Publishes every text in order, keeping `window` publishes in flight on the one connection.
 *
 * Answers `{acked, refused}`: texts whose publish was acknowledged, and `{text, error}` of those that were not.
 * `onAck(text)` is called with each acknowledgement.
 */
export async function publishAll(channel, texts, { window = 100, onAck = () => {} } = {}) {
  const acked = [];
  const refused = [];
  // Started strictly in order, and the SDK numbers them as they start: so the order of sending is that of `texts`.
  await inParallel(window, texts, async (text) => {
    try {
      await channel.publish('m', text);
      acked.push(text);
      onAck(text);
    } catch (error) {
      refused.push({ text, error: describe(error) });
    }
  });
  return { acked, refused };
}

/** All of a channel's history in the order of publishing, over as many pages as the server offers. */
export async function history(rest, name) {
  const newestFirst = [];
  let page = await rest.channels.get(name).history({ limit: 1000 });
  for (;;) {
    newestFirst.push(...page.items);
    if (!page.hasNext()) return newestFirst.reverse();
    page = await page.next();
  }
}

export function describe(error) {
  return error ? `${error.code ?? ''} ${error.message ?? error}`.trim() : 'no reason';
}
