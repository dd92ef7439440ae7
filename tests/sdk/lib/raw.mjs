// The protocol by hand, for frames that no SDK would send.

import WebSocket from 'ws';

import { inTime, until } from './wait.mjs';

/** Protocol message actions (client protocol §2.3.1). */
export const ACTION = {
  HEARTBEAT: 0, ACK: 1, NACK: 2, CONNECTED: 4, DISCONNECTED: 6, CLOSE: 7, CLOSED: 8, ERROR: 9, ATTACH: 10,
  ATTACHED: 11, DETACH: 12, DETACHED: 13, PRESENCE: 14, MESSAGE: 15,
};

/** One WebSocket that speaks JSON frames and keeps all it got in `frames`. */
export class RawClient {
  frames = [];
  #taken = 0;

  /** Opens a connection to `url`; `query` goes beside `format=json&v=6`. CONNECTED is not awaited. */
  static async open(url, query) {
    const target = new URL(url.replace(/^http/, 'ws'));
    target.search = new URLSearchParams({ format: 'json', v: '6', ...query });
    const client = new RawClient(new WebSocket(target, { perMessageDeflate: false }));
    await client.opened;
    return client;
  }

  constructor(socket) {
    this.socket = socket;
    this.opened = inTime(new Promise((resolve, reject) => {
      socket.once('open', resolve);
      socket.once('error', reject);
    }), { what: 'a WebSocket to open' });
    // After the opening an error is followed by a close, which is what tests look at.
    socket.on('error', () => {});
    socket.on('message', (data, binary) => this.frames.push(binary ? data : JSON.parse(data)));
    this.closed = new Promise((resolve) => socket.once('close', (code) => resolve(code)));
  }

  /** Sends a frame; texts and buffers go as they are. */
  send(frame) {
    this.socket.send(typeof frame === 'string' || Buffer.isBuffer(frame) ? frame : JSON.stringify(frame));
  }

  /** The next frame with that action that was not answered yet; heartbeats and others in between are skipped. */
  async next(action) {
    const find = () => {
      while (this.#taken < this.frames.length) {
        const frame = this.frames[this.#taken++];
        if (frame.action === action) return frame;
      }
      return undefined;
    };
    return until(find, { what: `a frame with action ${action}; got ${JSON.stringify(this.frames)}`, every: 5 });
  }

  /** Waits until the server has closed the socket; answers the close code. */
  async gone() {
    return inTime(this.closed, { what: 'the server to close the socket' });
  }

  close() {
    this.socket.terminate();
  }
}
