// One client's way to the cluster: a TCP forwarder that can be cut, held up and pointed at another node.

import net from 'node:net';

/** Plain TCP on a port of its own, as a level-4 load balancer would be; it knows nothing of the protocol.
 *
 * New connections go to node `target`, or to any living node while that one is dead; of a line that was `spread`, to the
 * nodes in turn.
 */
export class Line {
  #server;
  #pairs = new Set();
  #held = false;
  #refusing = false;
  #spread = false;
  /** Connections by node. */
  came = new Map();

  static async open(cluster, target) {
    const line = new Line();
    line.cluster = cluster;
    line.target = target;
    line.#server = net.createServer((outside) => line.#join(outside));
    await new Promise((resolve, reject) => {
      line.#server.once('error', reject);
      line.#server.listen(0, '127.0.0.1', resolve);
    });
    line.port = line.#server.address().port;
    return line;
  }

  /** Breaks every connection; the next one may come at once. */
  cut() {
    this.#held = false;
    for (const pair of [...this.#pairs]) pair.end();
  }

  /** From now on nothing goes through, in either direction, and nobody is told. */
  hold() {
    this.#held = true;
    for (const pair of this.#pairs) pair.pause();
  }

  /** Ends `hold`: what was held up goes on, in order. */
  release() {
    this.#held = false;
    for (const pair of this.#pairs) pair.resume();
  }

  /** Points at another node. Connections that exist stay where they are until they are cut. */
  move(target) {
    this.target = target;
  }

  /** From now on new connections come to the nodes in turn. */
  spread() {
    this.#spread = true;
  }

  /** Whether new connections are turned away. */
  refuse(yes) {
    this.#refusing = yes;
  }

  /** Cuts, and lets nobody through any more: what the death of the client's machine looks like from the cluster. */
  die() {
    this.refuse(true);
    this.cut();
  }

  close() {
    this.#server.close();
    this.die();
  }

  #join(outside) {
    if (this.#refusing) {
      outside.destroy();
      return;
    }
    const living = this.cluster.living();
    const node = living.includes(this.target) ? this.target : (living[0] ?? this.target);
    if (this.#spread) this.target = living[(living.indexOf(node) + 1) % living.length] ?? node;
    this.came.set(node, (this.came.get(node) ?? 0) + 1);
    const inside = net.connect(this.cluster.port(node), '127.0.0.1');
    const both = [outside, inside];
    const pair = {
      pause: () => both.forEach((socket) => socket.pause()),
      resume: () => both.forEach((socket) => socket.resume()),
      end: () => both.forEach((socket) => socket.destroy()),
    };
    this.#pairs.add(pair);
    for (const [socket, peer] of [
      [outside, inside],
      [inside, outside],
    ]) {
      socket.setNoDelay(true);
      socket.on('data', (part) => {
        if (!peer.write(part)) socket.pause();
      });
      socket.on('drain', () => this.#held || peer.resume());
      // Half-closed is closed: neither side of this protocol has anything to say after that.
      socket.on('end', () => peer.end());
      socket.on('error', () => peer.destroy());
      socket.on('close', () => {
        this.#pairs.delete(pair);
        peer.destroy();
      });
    }
    if (this.#held) pair.pause();
  }
}
