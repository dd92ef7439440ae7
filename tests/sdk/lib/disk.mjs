// What stands between a test and a node's files: segments to damage, and small disks to fill.

import fs from 'node:fs';
import path from 'node:path';

import { run } from './process.mjs';

const SEGMENT = /^[0-9a-f]{8}\.log$/;

/** The data directory of node `id`. */
export function dataOf(cluster, id) {
  return path.join(cluster.data, `node-${id}`);
}

/** Paths of the node's segment files, oldest first; the last one is being written. */
export function segments(folder) {
  return fs.readdirSync(folder).filter((name) => SEGMENT.test(name)).sort().map((name) => path.join(folder, name));
}

/** Bytes that files below `folder` take on the disk. A file that goes meanwhile counts for nothing. */
export function diskBytes(folder) {
  let bytes = 0;
  for (const name of fs.readdirSync(folder, { recursive: true })) {
    const stat = fs.statSync(path.join(folder, String(name)), { throwIfNoEntry: false });
    if (stat?.isFile()) bytes += stat.blocks * 512;
  }
  return bytes;
}

/** Turns one bit of the byte in the middle of the file. */
export function flipByte(file) {
  const handle = fs.openSync(file, 'r+');
  try {
    const middle = Math.floor(fs.fstatSync(handle).size / 2);
    const byte = Buffer.alloc(1);
    fs.readSync(handle, byte, 0, 1, middle);
    byte[0] ^= 0x10;
    fs.writeSync(handle, byte, 0, 1, middle);
  } finally {
    fs.closeSync(handle);
  }
}

/** Cuts the file to half of its size. */
export function cutShort(file) {
  fs.truncateSync(file, Math.floor(fs.statSync(file).size / 2));
}

/** A disk of its own for a folder, or why there can be none here. */
export class SmallDisk {
  static async mount(folder, megabytes) {
    fs.mkdirSync(folder, { recursive: true });
    const done = await run(['mount', '-t', 'tmpfs', '-o', `size=${megabytes}m`, 'tmpfs', folder]).catch((error) => error);
    if (done.code !== 0) return { refused: `mounting needs rights that are missing here: ${done.stderr ?? done.message}` };
    return new SmallDisk(folder);
  }

  constructor(folder) {
    this.folder = folder;
  }

  async grow(megabytes) {
    const done = await run(['mount', '-o', `remount,size=${megabytes}m`, this.folder]);
    if (done.code !== 0) throw new Error(done.stderr);
  }

  async unmount() {
    await run(['umount', this.folder]);
  }
}
