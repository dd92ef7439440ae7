// A subscriber without an SDK, in the history of `recorder.mjs`: SDKs hide what comes twice, this one does not.

import WebSocket from 'ws';

import { Line } from './line.mjs';
import { ACTION } from './raw.mjs';
import { Participant } from './recorder.mjs';
import { describe } from './sdk.mjs';
import { until } from './wait.mjs';

const SYNC = 16;
const FLAG = { HAS_PRESENCE: 1, RESUMED: 4 };
const ACTIONS = ['absent', 'present', 'enter', 'leave', 'update'];
const AGAIN_MS = 200;
// The server says something every 15 s at the least.
const SILENCE_MS = 25_000;

/** Attaches, resumes and listens by the letter of the protocol; it never publishes. */
export class Observer extends Participant {
  #channels = new Map();
  #closed = false;

  static async open({ name, cluster, node, history }) {
    const line = await Line.open(cluster, node);
    const self = new Observer({ name, history, line });
    self.target = (query) =>
      `ws://127.0.0.1:${line.port}/?${new URLSearchParams({ key: cluster.key, format: 'json', v: '6', ...query })}`;
    self.#connect();
    return self;
  }

  async subscribe(name) {
    this.#channels.set(name, { serial: undefined, members: new Map() });
    if (this.state === 'connected') this.#attach(name);
    await until(() => this.attached.get(name) === 'attached', { what: `${this.name} to attach to ${name}` });
  }

  async members(name) {
    return [...this.#channels.get(name).members.values()];
  }

  async close() {
    this.#closed = true;
    this.socket.terminate();
    this.line.close();
  }

  #connect() {
    this.socket = new WebSocket(this.target(this.key && { resume: this.key }), { perMessageDeflate: false });
    const { socket } = this;
    let silence;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => socket.terminate(), SILENCE_MS);
    };
    heard();
    socket.on('error', () => {});
    socket.on('message', (text) => {
      heard();
      this.#onFrame(JSON.parse(text));
    });
    socket.on('close', () => {
      clearTimeout(silence);
      if (this.state === 'connected') this.onConnection({ state: 'disconnected' });
      if (!this.#closed) setTimeout(() => this.#closed || this.#connect(), AGAIN_MS);
    });
  }

  #attach(name) {
    const { serial } = this.#channels.get(name);
    this.attached.set(name, 'attaching');
    this.socket.send(JSON.stringify({ action: ACTION.ATTACH, channel: name, channelSerial: serial }));
  }

  #onFrame(frame) {
    const channel = this.#channels.get(frame.channel);
    if (frame.action === ACTION.CONNECTED) {
      this.key = frame.connectionDetails.connectionKey;
      this.onConnection({
        state: 'connected',
        connectionId: frame.connectionId,
        reason: frame.error && describe(frame.error),
      });
      for (const name of this.#channels.keys()) this.#attach(name);
    } else if (frame.action === ACTION.ATTACHED) {
      this.#onAttached(channel, frame);
    } else if (frame.action === ACTION.MESSAGE) {
      channel.serial = frame.channelSerial;
      for (const { data, serial, id } of frame.messages) {
        this.onMessage({ channel: frame.channel, text: data, serial, id, connectionId: frame.connectionId });
      }
    } else if (frame.action === ACTION.PRESENCE) {
      channel.serial = frame.channelSerial;
      for (const event of frame.presence) this.#onMember(channel, frame.channel, event, frame.connectionId);
    } else if (frame.action === SYNC) {
      this.#onSync(channel, frame);
    } else if (frame.action === ACTION.DISCONNECTED || frame.action === ACTION.ERROR) {
      this.add('told', { error: describe(frame.error), channel: frame.channel });
      if (!frame.channel) this.socket.close();
    }
  }

  #onAttached(channel, { channel: name, channelSerial, flags, error }) {
    const resumed = (flags & FLAG.RESUMED) !== 0;
    const state = this.attached.get(name) === 'attached' ? 'update' : 'attached';
    channel.serial = channelSerial;
    this.onChannel({ channel: name, state, resumed, attachSerial: channelSerial, reason: error && describe(error) });
    // Resumed or not, members are what SYNC says: who left meanwhile is not in it.
    channel.listed = new Set();
    if (!(flags & FLAG.HAS_PRESENCE)) this.#onListed(channel, name);
  }

  #onSync(channel, { channel: name, channelSerial, presence }) {
    for (const event of presence) {
      channel.listed?.add(`${event.connectionId}:${event.clientId}`);
      this.#onMember(channel, name, event);
    }
    if (!channelSerial || channelSerial.endsWith(':')) this.#onListed(channel, name);
  }

  #onListed(channel, name) {
    if (!channel.listed) return;
    for (const [key, member] of channel.members) {
      if (channel.listed.has(key)) continue;
      channel.members.delete(key);
      this.add('presence', { channel: name, ...member, action: 'absent' });
    }
    channel.listed = undefined;
  }

  #onMember(channel, name, { action, clientId, connectionId, data, id }, publisher) {
    const member = { clientId, connectionId: connectionId ?? publisher, data, id };
    const key = `${member.connectionId}:${clientId}`;
    channel.listed?.add(key);
    // A leave carries the last data; the member itself is what is kept.
    if (ACTIONS[action] === 'leave') channel.members.delete(key);
    else channel.members.set(key, member);
    this.add('presence', { channel: name, ...member, action: ACTIONS[action] });
  }
}
