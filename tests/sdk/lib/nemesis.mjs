// What goes wrong, and when: a schedule drawn from a seed, and its execution on a cluster and on clients' lines.

import { dice } from './dice.mjs';
import { pause, until } from './wait.mjs';

/** Members stay for 15 s. */
const AWAY_MS = 17_000;

/** An endless schedule: `{afterMs, fault, node?, forMs?, client?}`; `client` is a number to take modulo their count.
 *
 * The same seed gives the same schedule whatever happens meanwhile.
 */
export function* schedule(seed, { nodes = 3 } = {}) {
  const chance = dice(seed);
  const faults = ['kill', 'kill', 'pause', 'pause', 'evacuate', 'cut', 'cut', 'cut', 'cut-all', 'move', 'hold', 'away'];
  for (;;) {
    const step = { afterMs: chance.between(500, 3_000), fault: chance.pick(faults) };
    yield {
      ...step,
      node: chance.between(1, nodes),
      // Two at once leave no majority: what is published then waits, and may be lost by nobody.
      second: chance.chance(0.1),
      forMs: chance.between(300, 7_000),
      client: chance.between(0, 999),
    };
  }
}

/** Carries out the schedule until `stopped.yes`; then everything is as it was: all nodes run, all lines are open. */
export async function torment(cluster, steps, { participants, history, stopped }) {
  const living = () => participants.filter((one) => !one.dead);
  const tell = (what) => history.add('fault', { what });
  const wait = (ms) => sleep(ms, stopped);
  const away = new Map();
  const others = (node) => cluster.nodes.map(({ id }) => id).filter((id) => id !== node);
  const faults = {
    kill: async ({ node, second, forMs }) => {
      const down = second ? [node, others(node)[0]] : [node];
      tell(`kill -9 of node ${down.join(' and ')} for ${forMs} ms`);
      for (const id of down) await cluster.kill(id);
      await wait(forMs);
      // Neither serves before both run: they make the majority.
      for (const id of down) await cluster.restart(id, { serving: false });
      for (const id of down) await cluster.serving(id);
      tell(`node ${down.join(' and ')} serves again`);
    },
    pause: async ({ node, second, forMs }) => {
      const down = second ? [node, others(node)[0]] : [node];
      tell(`SIGSTOP of node ${down.join(' and ')} for ${forMs} ms`);
      await paused(cluster, down, () => wait(forMs));
    },
    // What a load balancer does with a node that does not answer; the node wakes up and finds its clients taken over.
    evacuate: async ({ node, forMs }) => {
      tell(`SIGSTOP of node ${node} for ${forMs} ms, its clients go elsewhere`);
      await paused(cluster, [node], async () => {
        for (const { line } of living().filter((one) => one.line.target === node)) {
          line.move(others(node)[0]);
          line.cut();
        }
        await wait(forMs);
      });
    },
    cut: async ({ client }) => {
      const one = living()[client % living().length];
      tell(`cut ${one.name}`);
      one.line.cut();
    },
    'cut-all': async () => {
      tell('cut everybody');
      for (const { line } of living()) line.cut();
    },
    move: async ({ client, node }) => {
      const one = living()[client % living().length];
      tell(`move ${one.name} to node ${node}`);
      one.line.move(node);
      one.line.cut();
    },
    hold: async ({ client, forMs }) => {
      const one = living()[client % living().length];
      tell(`nothing goes through from or to ${one.name} for ${forMs} ms, then it is cut`);
      one.line.hold();
      await wait(forMs);
      one.line.cut();
    },
    // For longer than a member stays without its client. Meanwhile other things go wrong.
    away: async ({ client, forMs }) => {
      const one = living()[client % living().length];
      if (away.has(one)) return;
      const ms = AWAY_MS + forMs;
      tell(`${one.name} is away for ${ms} ms`);
      one.line.die();
      const back = wait(ms).then(() => {
        tell(`${one.name} may come back`);
        one.line.refuse(false);
        away.delete(one);
      });
      away.set(one, back);
    },
  };
  for (const step of steps) {
    await wait(step.afterMs);
    if (stopped.yes) break;
    await faults[step.fault](step);
  }
  await Promise.all(away.values());
}

async function paused(cluster, nodes, meanwhile) {
  const pids = nodes.map((id) => cluster.node(id).pid);
  for (const pid of pids) process.kill(pid, 'SIGSTOP');
  try {
    await meanwhile();
  } finally {
    for (const pid of pids) process.kill(pid, 'SIGCONT');
  }
  for (const id of nodes) await cluster.serving(id);
}

/** `ms`, or less when it is over. */
async function sleep(ms, stopped) {
  await Promise.race([
    pause(ms),
    until(() => stopped.yes, { what: 'the end', within: ms + 1_000, every: 50 }).catch(() => {}),
  ]);
}
