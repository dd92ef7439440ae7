// Child processes that cannot outlive the test, with their output in a file.

import { spawn } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

import { inTime } from './wait.mjs';

/** The repository. */
export const ROOT = fileURLToPath(new URL('../../../', import.meta.url));

const living = new Set();
process.on('exit', () => {
  for (const child of living) child.kill('SIGKILL');
});
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.on(signal, () => process.exit(128 + os.constants.signals[signal]));
}

/** A new empty folder under the system's temporary one. */
export function tempFolder(name) {
  return fs.mkdtempSync(path.join(os.tmpdir(), `firth-${name}-`));
}

/** Starts `argv` with both outputs appended to the file `log`. */
export function start(argv, { log, env = {}, cwd } = {}) {
  const out = log ? fs.openSync(log, 'a') : 'ignore';
  const child = spawn(argv[0], argv.slice(1), {
    stdio: ['ignore', out, out],
    env: { ...process.env, ...env },
    cwd,
  });
  if (log) fs.closeSync(out);
  return watch(child);
}

/** Starts `argv` with pipes for all three streams. */
export function startPiped(argv, { env = {}, cwd } = {}) {
  return watch(spawn(argv[0], argv.slice(1), { stdio: 'pipe', env: { ...process.env, ...env }, cwd }));
}

/** Runs `argv` to its end: `{code, signal, stdout, stderr}`; a non-zero code is no error here. */
export async function run(argv, { input, env, cwd, within = 60_000 } = {}) {
  const child = startPiped(argv, { env, cwd });
  const text = { stdout: '', stderr: '' };
  for (const stream of ['stdout', 'stderr']) {
    child[stream].setEncoding('utf8').on('data', (part) => (text[stream] += part));
  }
  child.stdin.on('error', () => {});
  child.stdin.end(input ?? '');
  try {
    await inTime(child.closed, { what: `the end of ${argv.join(' ')}`, within });
  } catch (error) {
    child.kill('SIGKILL');
    throw new Error(`${error.message}\n${text.stdout}${text.stderr}`);
  }
  return { code: child.exitCode, signal: child.signalCode, ...text };
}

/** Signals the child and waits for its end; SIGKILL and an error when that takes longer than `within`. */
export async function stop(child, { signal = 'SIGTERM', within = 20_000 } = {}) {
  if (child.exitCode !== null || child.signalCode !== null) return;
  child.kill(signal);
  try {
    await inTime(child.ended, { what: `process ${child.pid} to end after ${signal}`, within });
  } catch (error) {
    child.kill('SIGKILL');
    await child.ended;
    throw error;
  }
}

/** Whether a process of that id exists and is not a zombie. */
export function alive(pid) {
  try {
    const stat = fs.readFileSync(`/proc/${pid}/stat`, 'utf8');
    return !'ZX'.includes(stat.slice(stat.lastIndexOf(')') + 2)[0]);
  } catch {
    return false;
  }
}

/** `count` TCP ports of 127.0.0.1 that are free now. Another process may still take one: callers try again. */
export async function freePorts(count) {
  const servers = await Promise.all(
    Array.from({ length: count }, () => new Promise((resolve, reject) => {
      const server = net.createServer().on('error', reject);
      server.listen(0, '127.0.0.1', () => resolve(server));
    })),
  );
  const ports = servers.map((server) => server.address().port);
  await Promise.all(servers.map((server) => new Promise((done) => server.close(done))));
  return ports;
}

/** The last `lines` lines of a file; an empty text where there is none. */
export function tail(file, lines = 80) {
  try {
    return fs.readFileSync(file, 'utf8').trimEnd().split('\n').slice(-lines).join('\n');
  } catch {
    return '';
  }
}

function watch(child) {
  living.add(child);
  child.ended = new Promise((resolve) => child.once('exit', resolve));
  child.closed = new Promise((resolve) => child.once('close', resolve));
  child.ended.then(() => living.delete(child));
  child.on('error', (error) => {
    living.delete(child);
    child.failure = error;
    child.emit('exit', 127, null);
    child.emit('close', 127, null);
  });
  return child;
}
