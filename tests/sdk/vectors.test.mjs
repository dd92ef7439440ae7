// The golden bytes of proto/vectors, read and written by the official SDK's own codecs. No cluster is needed.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import test from 'node:test';

import Ably from 'ably';

const file = new URL('../../proto/vectors/frames.json', import.meta.url);
const vectors = JSON.parse(fs.readFileSync(file, 'utf8'));
const msgpack = Ably.Realtime._MsgPack;
const toProtocolMessage = Ably.makeProtocolMessageFromDeserialized();

/** Messages or presence events as the SDK writes them: its `toJSON` takes arguments for JSON, and none for MessagePack. */
const written = (items, format) =>
  items?.map((item) => (format === 'json' ? JSON.parse(JSON.stringify(item)) : item.toJSON()));

/** The fields of a frame as the SDK understood it, without what it adds of its own. */
function understood(message, format, sent) {
  const frame = {};
  for (const [name, value] of Object.entries(message)) {
    if (value === undefined || typeof value === 'function') continue;
    frame[name] = ['messages', 'presence'].includes(name) ? written(value, format) : value;
  }
  if (message.error) {
    const { code, statusCode, message: text, href } = message.error;
    // The SDK makes up a help page where the server names none.
    frame.error = { code, statusCode, message: text, ...(sent.error.href && { href }) };
  }
  return plain(frame);
}

/** Without prototypes and undefined fields; bytes as arrays of the one kind. */
function plain(value) {
  if (ArrayBuffer.isView(value) || value instanceof ArrayBuffer) return Buffer.from(value);
  if (Array.isArray(value)) return value.map(plain);
  if (value === null || typeof value !== 'object') return value;
  const fields = Object.entries(value).filter(([, field]) => field !== undefined);
  return Object.fromEntries(fields.map(([name, field]) => [name, plain(field)]));
}

/** What MessagePack holds where JSON holds base64. */
function binary(frame) {
  const step = ({ data, encoding, ...rest }) => {
    const steps = encoding?.split('/') ?? [];
    if (steps.at(-1) !== 'base64') return { ...rest, ...(data !== undefined && { data }), ...(encoding && { encoding }) };
    const before = steps.slice(0, -1).join('/');
    return { ...rest, data: Buffer.from(data, 'base64'), ...(before && { encoding: before }) };
  };
  const { messages, presence, ...rest } = frame;
  return { ...rest, ...(messages && { messages: messages.map(step) }), ...(presence && { presence: presence.map(step) }) };
}

test('there are vectors, and the SDK has its codecs', () => {
  assert.ok(vectors.length >= 30, `${vectors.length} vectors`);
  assert.equal(typeof msgpack.decode, 'function');
  assert.equal(typeof toProtocolMessage, 'function');
});

for (const { name, json, msgpack: hex } of vectors) {
  test(`${name}: JSON`, () => {
    const value = JSON.parse(json);
    assert.equal(JSON.stringify(value), json, 'the bytes are those that JSON.stringify writes');
    assert.deepEqual(understood(toProtocolMessage(structuredClone(value)), 'json', value), plain(value));
  });

  test(`${name}: MessagePack`, () => {
    const bytes = Buffer.from(hex, 'hex');
    const value = msgpack.decode(bytes);
    assert.deepEqual(plain(value), plain(binary(JSON.parse(json))), 'both formats say the same');
    // The SDK writes integers in their shortest form and maps in the order of their fields, as the server does.
    const leavesOut = !holdsNull(value);
    assert.equal(Buffer.from(msgpack.encode(value, leavesOut)).toString('hex'), hex);
    assert.deepEqual(understood(toProtocolMessage(structuredClone(value)), 'msgpack', value), plain(value));
  });
}

/** The SDK's encoder leaves out nulls too when it is told, as it is for frames, to leave out what is absent. */
function holdsNull(value) {
  if (value === null) return true;
  return typeof value === 'object' && !ArrayBuffer.isView(value) && Object.values(value).some(holdsNull);
}
