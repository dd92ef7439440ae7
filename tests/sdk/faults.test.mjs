// Promises 2, 3, 4 and 6 under random kills, pauses and cuts, with every official SDK at once and a subscriber without
// one; what each sent and received is recorded and judged.
//
// From the environment: MINUTES (1), SDK (names of `SDKS` or how they begin, by commas; all), CLIENTS of each (1), SEED
// (by the clock), OUT (target/faults) for the history of a run that failed. The same SEED plays the same faults again.

import assert from 'node:assert/strict';
import path from 'node:path';

import { dice } from './lib/dice.mjs';
import { schedule, torment } from './lib/nemesis.mjs';
import { Observer } from './lib/observer.mjs';
import { ROOT } from './lib/process.mjs';
import { History, SDKS, participant } from './lib/recorder.mjs';
import { history as storedIn } from './lib/sdk.mjs';
import { suite } from './lib/suite.mjs';
import { judge, summary } from './lib/verdict.mjs';
import { inParallel, pause, until } from './lib/wait.mjs';

const MINUTES = Number(process.env.MINUTES || 1);
const CLIENTS = Number(process.env.CLIENTS || 1);
const SEED = Number(process.env.SEED || Date.now() % 1_000_000);
const OUT = process.env.OUT || path.join(ROOT, 'target/faults');
const WANTED = (process.env.SDK || '').split(',').filter(Boolean);
const NAMES = Object.keys(SDKS).filter((name) => WANTED.length === 0 || WANTED.some((part) => name.startsWith(part)));
// Two whose history is kept for a day, and one that forgets after two minutes.
const CHANNELS = ['persisted:faults-a', 'persisted:faults-b', 'faults-c'];
const ROOM = 'persisted:faults-room';
// Of one client, between two publishes.
const PACE_MS = 150;
const SETTLE_MS = 90_000;
// Records of a read in between.
const PAGE = 50;

const scenario = suite({ scenarioMs: MINUTES * 60_000 + 300_000 });

scenario(`${MINUTES} minutes of faults with ${NAMES.join(', ')}; SEED=${SEED}`, async (given) => {
  const { cluster, clients, t } = given;
  const history = new History();
  const participants = [];
  const speakers = [];
  const mortals = [];
  try {
    const names = Array.from({ length: CLIENTS }, (_, n) => NAMES.map((sdk) => [sdk, `${sdk}-${n}`])).flat();
    for (const [i, [sdk, name]] of names.entries()) {
      speakers.push(await join(sdk, { name, cluster, node: (i % 3) + 1, history }));
    }
    const observer = await Observer.open({ name: 'observer', cluster, node: 1, history });
    participants.push(...speakers, observer);
    for (const channel of [...CHANNELS, ROOM]) await observer.subscribe(channel);
    const stopped = { yes: false };
    const faults = torment(cluster, schedule(SEED), { participants, history, stopped });
    const work = speakers.map((one, i) => publishUntil(stopped, one, { chance: dice(SEED + i), cluster }));
    const presence = speakers.map((one, i) => appearUntil(stopped, one, dice(SEED - i)));
    const deaths = dieUntil(stopped, mortals, (n) => {
      const sdk = NAMES[n % NAMES.length];
      return participant(sdk, { name: `mortal-${n}-${sdk}`, cluster, node: (n % 3) + 1, history });
    });
    await Promise.race([pause(MINUTES * 60_000), faults]);
    stopped.yes = true;
    await Promise.all([faults, deaths, ...work, ...presence]);

    await Promise.all(participants.map((one) => one.settled({ within: SETTLE_MS })));
    await Promise.all(speakers.map((one, i) => beSure(one, i)));
    await endEverywhere(participants);
    await lists({ cluster, participants, mortals, history });
    await stories({ cluster, clients, history });
    t.diagnostic(JSON.stringify(summary(history.events)));
    const faultsFound = judge(history.events);
    assert.deepEqual(told(faultsFound), [], `SEED=${SEED}`);
    assert.ok(history.count('acked') > MINUTES * 100, 'the clients were hardly ever able to publish');
  } catch (error) {
    const file = path.join(OUT, `history-${SEED}.jsonl`);
    history.save(file);
    error.message += `\nthe whole history is in ${file}; again: make faults SEED=${SEED} MINUTES=${MINUTES} SDK=${WANTED}`;
    throw error;
  } finally {
    await Promise.all([...new Set([...participants, ...speakers, ...mortals])].map((one) => one.close()));
  }
});

async function join(sdk, options) {
  const one = await participant(sdk, options);
  for (const channel of CHANNELS) await one.subscribe(channel);
  await one.subscribe(ROOM, { presence: true });
  return one;
}

/** Publishes one after the other, single messages and batches, on one channel or another. */
async function publishUntil(stopped, one, { chance, cluster }) {
  for (let n = 0; !stopped.yes; n++) {
    const count = chance.chance(0.2) ? 3 : 1;
    const texts = Array.from({ length: count }, (_, i) => `${one.name}/${n}/${i}`);
    const channel = chance.pick(CHANNELS);
    const publish = one.publish(channel, texts);
    const node = chance.pick(cluster.nodes).id;
    // Mostly several are on their way at once; sometimes each waits for the one before, and looks whether it is there.
    if (chance.chance(0.3) && (await publish)) await read(one, { cluster, node, channel, after: texts.at(-1) });
    await pause(PACE_MS);
  }
}

/** Writes down the newest history as a node tells it; a node that is away tells nothing. */
async function read({ history }, { cluster, node, channel, after }) {
  const target = `/channels/${encodeURIComponent(channel)}/messages?limit=${PAGE}`;
  const answer = await cluster.rest(node, target).catch(() => ({ status: 0 }));
  if (answer.status !== 200) return;
  const records = answer.body.map(({ data, serial }) => ({ text: data, serial }));
  history.add('read', { channel, node, after, limit: PAGE, records });
}

async function appearUntil(stopped, one, chance) {
  for (let n = 0; !stopped.yes; n++) {
    const operation = chance.pick(['enter', 'update', 'update', 'leave']);
    await one.appear(operation, ROOM, operation === 'leave' ? undefined : `${one.name} ${n}`);
    await pause(chance.between(200, 3_000));
  }
}

/** Every few seconds somebody comes, enters, and is gone without a word. */
async function dieUntil(stopped, mortals, make) {
  for (let n = 0; !stopped.yes; n++) {
    const one = await make(n);
    mortals.push(one);
    // It comes into a cluster that is being tormented: that it cannot even attach is no fault.
    const inside = one.subscribe(ROOM, { presence: true }).then(
      () => one.appear('enter', ROOM, one.name),
      () => false,
    );
    await Promise.race([inside, pause(15_000)]);
    await pause(500);
    one.die();
    await pause(4_000);
  }
}

/** The last word of each client on its presence is acknowledged. Of each three one is gone and one enters; one has said
 * enough if it is there for sure, for what it says now would hide that it was lost.
 */
async function beSure(one, i) {
  // ably-go, once it has attached again, enters with the data that it had before an update which waited meanwhile.
  const repeats = one.name.startsWith('go-');
  if (i % 3 === 0 && !repeats && one.surely.get(ROOM) === 'present') return;
  const said = async () =>
    i % 3 === 2 ? one.appear('leave', ROOM) : one.appear('enter', ROOM, `${one.name} at the end`);
  await until(said, { what: `an acknowledgement of the presence of ${one.name}`, within: SETTLE_MS, every: 500 });
}

/** A last message on each channel, which everybody receives after all others. */
async function endEverywhere(participants) {
  for (const channel of CHANNELS) {
    const text = `the end of ${channel}`;
    await until(() => participants[0].publish(channel, [text]), {
      what: `the last publish on ${channel}`,
      within: SETTLE_MS,
    });
    for (const one of participants) {
      // Not waited for longer: who has not got it by then will be found by the judge.
      await until(() => one.last?.get(channel) === text, { what: text, within: 20_000 }).catch(() => {});
    }
  }
}

/** Writes down who is listed, by every client and every node, once the dead had time to leave. */
async function lists({ cluster, participants, mortals, history }) {
  const gone = new Set(mortals.map(({ name }) => name));
  const target = `/channels/${encodeURIComponent(ROOM)}/presence?limit=1000`;
  const listed = async (id) => (await cluster.rest(id, target)).body;
  const left = async () =>
    (await Promise.all([1, 2, 3].map(listed))).flat().every(({ clientId }) => !gone.has(clientId));
  // Who stays listed after that is found by the judge.
  await until(left, { what: 'the dead to leave', within: SETTLE_MS, every: 500 }).catch(() => {});
  await pause(1_000);
  for (const { id } of cluster.nodes) {
    history.add('members', { channel: ROOM, from: `node ${id}`, members: await listed(id) });
  }
  for (const one of participants) {
    history.add('members', { channel: ROOM, from: one.name, members: await one.members(ROOM) });
  }
}

/** Writes down what each node tells of each channel that is kept. */
async function stories({ cluster, clients, history }) {
  const kept = CHANNELS.filter((channel) => channel.startsWith('persisted:'));
  await inParallel(
    1,
    cluster.nodes.flatMap(({ id }) => kept.map((channel) => [id, channel])),
    async ([id, channel]) => {
      const records = (await storedIn(clients.rest(id), channel)).map(({ data, serial, id: own }) => ({
        text: data,
        serial,
        id: own,
      }));
      history.add('stored', { channel, node: id, records });
    },
  );
}

/** A thousand gaps are told by the first few and their number. */
function told(faults) {
  const kinds = new Map();
  for (const fault of faults) {
    const key = [fault.fault, fault.channel, fault.client].filter(Boolean).join(' · ');
    if (!kinds.has(key)) kinds.set(key, []);
    kinds.get(key).push(fault.detail);
  }
  return [...kinds].map(([key, details]) => `${key}: ${details.length} times: ${details.slice(0, 3).join('; ')}`);
}
