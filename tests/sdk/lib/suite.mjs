// One test file: its cluster (and Kafka), its scenarios, and the processes' last words when one of them fails.

import { after, before, test } from 'node:test';

import { Cluster } from './cluster.mjs';
import { Kafka } from './kafka.mjs';
import { Clients } from './sdk.mjs';

const SCENARIO_MS = 240_000;

/** Sets up what a file's scenarios share and answers how to declare one.
 *
 * `topics` maps Kafka topics to partitions, made before the cluster starts; giving it starts a Kafka.
 * `scenarioMs` is how long a scenario may take. A scenario's body gets `{cluster, kafka, clients, t}`; its clients are
 * closed at its end.
 */
export function suite({ topics, scenarioMs = SCENARIO_MS, ...options } = {}) {
  const shared = { cluster: null, kafka: null };
  let failed = false;

  before(async () => {
    if (topics) {
      shared.kafka = await Kafka.start();
      for (const [topic, partitions] of Object.entries(topics)) await shared.kafka.createTopic(topic, { partitions });
      options.kafka = shared.kafka.bootstrap;
    }
    shared.cluster = await Cluster.start(options);
  }, { timeout: SCENARIO_MS });

  after(async () => {
    const { cluster, kafka } = shared;
    if (failed && cluster) {
      console.error(`${cluster.logs()}\n--- data kept in ${cluster.folder}`);
      if (kafka) console.error(kafka.logs());
    }
    try {
      if (!failed) await cluster?.stop();
    } finally {
      await cluster?.destroy({ keep: failed });
      await kafka?.destroy();
    }
  }, { timeout: SCENARIO_MS });

  return function scenario(name, body) {
    test(name, { timeout: scenarioMs }, async (t) => {
      const clients = new Clients(shared.cluster);
      try {
        await body({ ...shared, clients, t });
      } catch (error) {
        failed = true;
        throw error;
      } finally {
        clients.closeAll();
      }
    });
  };
}
