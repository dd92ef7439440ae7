// What tests of presence ask: who is listed where, and who was seen coming and going.

import assert from 'node:assert/strict';

import { until } from './wait.mjs';

/** Attaches, and keeps every presence event in order as `[action, clientId, data]`. */
export class Watcher {
  events = [];

  static async attach(client, name) {
    const watcher = new Watcher();
    watcher.channel = client.channels.get(name);
    await watcher.channel.presence.subscribe(({ action, clientId, connectionId, data, id, timestamp }) => {
      watcher.events.push({ action, clientId, connectionId, data, id, timestamp });
    });
    await watcher.channel.attach();
    return watcher;
  }

  /** Events of one client as `action data`, in order. */
  of(clientId) {
    const own = this.events.filter((event) => event.clientId === clientId);
    return own.map(({ action, data }) => `${action} ${JSON.stringify(data ?? null)}`);
  }

  count(action, clientId) {
    return this.events.filter((event) => event.action === action && event.clientId === clientId).length;
  }

  /** Waits for the first event of that kind and that client, which it answers. */
  async saw(action, clientId, { within = 20_000 } = {}) {
    const find = () => this.events.find((event) => event.action === action && event.clientId === clientId);
    return until(find, { what: `${action} of ${clientId}; seen: ${JSON.stringify(this.events.slice(-6))}`, within });
  }

  /** Who the SDK says is there, by client id. */
  async listed() {
    return (await this.channel.presence.get()).map(({ clientId }) => clientId).sort();
  }
}

/** Client ids that node `id` lists on the channel, over as many pages as it takes. */
export async function restMembers(clients, id, name) {
  const found = [];
  let page = await clients.rest(id).channels.get(name).presence.get({ limit: 100 });
  for (;;) {
    found.push(...page.items.map(({ clientId }) => clientId));
    if (!page.hasNext()) return found.sort();
    page = await page.next();
  }
}

/** Every living node lists exactly these, at once: what was acknowledged anywhere is read everywhere. */
export async function assertListed(given, name, wanted) {
  for (const id of given.cluster.living()) {
    assert.deepEqual(
      await restMembers(given.clients, id, name),
      [...wanted].sort(),
      `members of ${name} on node ${id}`,
    );
  }
}
