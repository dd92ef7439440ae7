// One address per node, all on one port: what an SDK with fallback hosts needs, since its fallbacks share the port.

import net from 'node:net';

// 127.0.0.1 holds the nodes themselves; all of 127/8 is this machine.
const host = (id) => `127.0.1.${id}`;

/** Plain TCP forwarders, as DNS names or a level-4 load balancer would be; they know nothing of the protocol. */
export class Doors {
  #servers;
  #sockets = new Set();
  #refusing = new Set();
  #swallowing = false;

  static async open(cluster) {
    const doors = new Doors();
    const [first, ...others] = cluster.nodes;
    // Port 0 for the first; the others must get the same one, which is free on their own addresses.
    const server = await doors.#listen(cluster, first.id, 0);
    doors.port = server.address().port;
    doors.#servers = [server, ...(await Promise.all(others.map((node) => doors.#listen(cluster, node.id, doors.port))))];
    return doors;
  }

  /** SDK options: node `id` first, then `fallbacks`. */
  options(id, fallbacks) {
    return { endpoint: host(id), port: this.port, fallbackHosts: fallbacks.map(host) };
  }

  /** From now on nothing that the nodes say reaches a client; what clients say still arrives. */
  swallowAnswers() {
    this.#swallowing = true;
  }

  /** Breaks every connection, heals the doors and, of the given nodes, lets nobody in any more. */
  cut({ refuse = [] } = {}) {
    this.#refusing = new Set(refuse);
    this.#swallowing = false;
    for (const socket of this.#sockets) socket.destroy();
  }

  close() {
    for (const server of this.#servers) server.close();
    for (const socket of this.#sockets) socket.destroy();
  }

  async #listen(cluster, id, port) {
    const server = net.createServer((outside) => {
      if (this.#refusing.has(id)) return outside.destroy();
      const inside = net.connect(cluster.port(id), '127.0.0.1');
      for (const [socket, peer] of [[outside, inside], [inside, outside]]) {
        this.#sockets.add(socket);
        socket.setNoDelay(true);
        socket.on('error', () => peer.destroy());
        socket.on('close', () => {
          this.#sockets.delete(socket);
          peer.destroy();
        });
      }
      outside.pipe(inside);
      inside.on('data', (part) => this.#swallowing || outside.write(part));
      return undefined;
    });
    await new Promise((resolve, reject) => {
      server.once('error', reject);
      server.listen(port, host(id), resolve);
    });
    return server;
  }
}
