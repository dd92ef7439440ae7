// What a test must know of a data directory: the identity file of each node's log.
//
// `"FIRTHDIR" | CRC32C of the rest u32 | length u32 | protobuf Identity {version = 1, cluster_id = 2, node = 3, …}`,
// numbers little-endian.

import fs from 'node:fs';
import path from 'node:path';

const MAGIC = 'FIRTHDIR';
const HEADER = 16;
const FIELD_VERSION = 1;
const FIELD_NODE = 3;

/** `{file, version, node}` of every log directory below `folder`. */
export function identities(folder) {
  return fs
    .readdirSync(folder, { recursive: true })
    .map((name) => path.join(folder, String(name)))
    .filter((file) => path.basename(file) === 'identity')
    .map((file) => {
      const fields = decode(body(fs.readFileSync(file)));
      return { file, version: fields.get(FIELD_VERSION), node: fields.get(FIELD_NODE) };
    });
}

/** The bytes of an identity file with another version number, and a checksum that is right. */
export function withVersion(bytes, version) {
  const old = body(bytes);
  if (old[0] !== FIELD_VERSION << 3 || version > 127) throw new Error('version is not the first field, or too large');
  const rest = Buffer.alloc(4 + old.length);
  rest.writeUInt32LE(old.length);
  old.copy(rest, 4);
  rest[5] = version;
  const sum = Buffer.alloc(4);
  sum.writeUInt32LE(crc32c(rest));
  return Buffer.concat([Buffer.from(MAGIC), sum, rest]);
}

function body(bytes) {
  if (bytes.toString('latin1', 0, MAGIC.length) !== MAGIC) throw new Error('not an identity file');
  return bytes.subarray(HEADER);
}

// Top-level varint and length-delimited fields, the only ones an identity has.
function decode(bytes) {
  const fields = new Map();
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const value = varint();
    if ((tag & 7) === 0) {
      fields.set(tag >> 3, value);
    } else {
      fields.set(tag >> 3, bytes.subarray(at, at + value));
      at += value;
    }
  }
  return fields;
}

function crc32c(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0x82f63b78 : 0);
  }
  return ~crc >>> 0;
}
