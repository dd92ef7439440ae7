// A real Apache Kafka (KRaft) on loopback, and its own console tools as witnesses.

import fs from 'node:fs';
import path from 'node:path';
import readline from 'node:readline';

import { ROOT, freePorts, run, start, startPiped, stop, tail, tempFolder } from './process.mjs';
import { fatal, inTime, until } from './wait.mjs';

const JARS = process.env.FIRTH_KAFKA_JARS ?? path.join(ROOT, 'target/kafka');
const CLUSTER_ID = 'FirthTestsKafkaCluster';
// Tools live for seconds: the second compiler would cost more than it brings.
const TOOL_OPTIONS = ['-Xmx256m', '-XX:TieredStopAtLevel=1', '-XX:+UseSerialGC'];
const SERVER_OPTIONS = ['-Xms512m', '-Xmx512m', '-XX:+UseSerialGC'];
const STARTED = 'Kafka Server started';
// A header's value may hold commas (JSON does), but no such control character.
const HEADER_SEPARATOR = '\x1f';

/** One Kafka cluster: brokers that are controllers too. Topics are made with `createTopic`. */
export class Kafka {
  /** Starts `brokers` brokers and waits until each serves. */
  static async start({ brokers = 1 } = {}) {
    if (!fs.existsSync(JARS)) throw new Error(`${JARS} is missing; run: make kafka-jars`);
    for (let attempt = 1; ; attempt++) {
      const kafka = new Kafka(brokers, await freePorts(2 * brokers));
      try {
        await kafka.#format();
        await Promise.all(kafka.brokers.map((broker) => kafka.startBroker(broker.id)));
        return kafka;
      } catch (error) {
        const logs = kafka.logs();
        await kafka.destroy();
        const portTaken = /BindException|Address already in use/.test(logs);
        if (!portTaken || attempt === 3) throw new Error(`${error.message}\n${logs}`);
      }
    }
  }

  constructor(count, ports) {
    this.folder = tempFolder('kafka');
    this.brokers = Array.from({ length: count }, (_, i) => ({
      id: i + 1,
      port: ports[2 * i],
      controllerPort: ports[2 * i + 1],
      properties: path.join(this.folder, `broker-${i + 1}.properties`),
      log: path.join(this.folder, `broker-${i + 1}.log`),
      process: null,
    }));
    this.bootstrap = this.brokers.map((broker) => `127.0.0.1:${broker.port}`).join(',');
    for (const broker of this.brokers) fs.writeFileSync(broker.properties, this.#properties(broker));
  }

  /** Starts a broker that does not run: at first, or again on its own folder. */
  async startBroker(id) {
    const broker = this.#broker(id);
    const before = count(broker.log, STARTED);
    const logging = ['defaultLogLevel=warn', 'showDateTime=true', 'log.kafka.server.KafkaRaftServer=info'];
    const options = [...SERVER_OPTIONS, ...logging.map((setting) => `-Dorg.slf4j.simpleLogger.${setting}`)];
    broker.process = start(java(options, 'kafka.Kafka', broker.properties), { log: broker.log });
    await until(
      () => {
        if (broker.process.exitCode !== null) throw fatal(`broker ${id} ended with ${broker.process.exitCode}`);
        return count(broker.log, STARTED) > before;
      },
      { what: `Kafka broker ${id} to serve`, within: 90_000, every: 100 },
    );
  }

  /** Kills a broker as `kill -9` does. */
  async killBroker(id) {
    await stop(this.#broker(id).process, { signal: 'SIGKILL' });
  }

  /** Creates a topic; an error when it exists. */
  async createTopic(topic, { partitions = 4, config = [] } = {}) {
    const settings = config.flatMap((setting) => ['--config', setting]);
    const replicas = String(Math.min(3, this.brokers.length));
    const args = ['--create', '--topic', topic, '--partitions', String(partitions), '--replication-factor', replicas];
    await this.#tool('org.apache.kafka.tools.TopicCommand', ...args, ...settings);
  }

  /** Starts a console producer for records `{key, value, headers?}`; keys and values hold neither tab nor newline. */
  producer(topic, { headers = false } = {}) {
    const properties = ['parse.key=true', ...(headers ? ['parse.headers=true'] : [])];
    const child = startPiped(
      java(
        TOOL_OPTIONS,
        'org.apache.kafka.tools.ConsoleProducer',
        ...['--bootstrap-server', this.bootstrap, '--topic', topic],
        ...['--request-required-acks', '-1', '--request-timeout-ms', '30000', '--message-send-max-retries', '1000'],
        ...properties.flatMap((property) => ['--reader-property', property]),
      ),
    );
    return new ConsoleProducer(child, headers);
  }

  /** Produces all records with one console producer and waits until Kafka has acknowledged them. */
  async produce(topic, records, options) {
    const producer = this.producer(topic, options);
    await producer.send(records);
    await producer.close();
  }

  /** Follows a topic from its beginning with a console consumer. */
  consumer(topic, { isolation = 'read_committed', idleMs } = {}) {
    const headers = `headers.separator=${HEADER_SEPARATOR}`;
    const fields = [headers, 'print.partition=true', 'print.offset=true', 'print.headers=true', 'print.key=true'];
    const child = startPiped(
      java(
        TOOL_OPTIONS,
        'org.apache.kafka.tools.consumer.ConsoleConsumer',
        ...['--bootstrap-server', this.bootstrap, '--topic', topic, '--from-beginning', '--isolation-level', isolation],
        ...fields.flatMap((property) => ['--formatter-property', property]),
        ...(idleMs ? ['--timeout-ms', String(idleMs)] : []),
      ),
    );
    return new ConsoleConsumer(child);
  }

  /** Everything in a topic, read until nothing has come for `idleMs`. */
  async consume(topic, { idleMs = 10_000, within = 120_000, ...options } = {}) {
    const consumer = this.consumer(topic, { idleMs, ...options });
    try {
      await inTime(consumer.closed, { what: `the end of topic ${topic}`, within });
    } finally {
      await consumer.stop();
    }
    return consumer.records;
  }

  /** The brokers' last words, for the report of a failure. */
  logs() {
    return this.brokers.map((broker) => `--- Kafka broker ${broker.id}\n${tail(broker.log, 40)}`).join('\n');
  }

  /** Ends all brokers at once and removes their data. */
  async destroy() {
    const running = this.brokers.filter((broker) => broker.process);
    await Promise.all(running.map((broker) => stop(broker.process, { signal: 'SIGKILL' })));
    fs.rmSync(this.folder, { recursive: true, force: true });
  }

  async #format() {
    for (const broker of this.brokers) {
      const args = ['format', '-t', CLUSTER_ID, '-c', broker.properties];
      const { code, stdout, stderr } = await run(java(TOOL_OPTIONS, 'kafka.tools.StorageTool', ...args));
      if (code !== 0) throw new Error(`StorageTool ended with ${code}\n${stdout}${stderr}`);
    }
  }

  async #tool(name, ...args) {
    const argv = java(TOOL_OPTIONS, name, '--bootstrap-server', this.bootstrap, ...args);
    const { code, stdout, stderr } = await run(argv);
    if (code !== 0) throw new Error(`${name} ${args.join(' ')} ended with ${code}\n${stdout}${stderr}`);
    return stdout;
  }

  #broker(id) {
    return this.brokers[id - 1];
  }

  #properties(broker) {
    const replicas = Math.min(3, this.brokers.length);
    return Object.entries({
      'process.roles': 'broker,controller',
      'node.id': broker.id,
      'controller.quorum.voters': this.brokers.map((b) => `${b.id}@127.0.0.1:${b.controllerPort}`).join(','),
      'controller.listener.names': 'CONTROLLER',
      listeners: `PLAINTEXT://127.0.0.1:${broker.port},CONTROLLER://127.0.0.1:${broker.controllerPort}`,
      'advertised.listeners': `PLAINTEXT://127.0.0.1:${broker.port}`,
      'inter.broker.listener.name': 'PLAINTEXT',
      'listener.security.protocol.map': 'PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT',
      'log.dirs': path.join(this.folder, `data-${broker.id}`),
      'num.partitions': 4,
      'offsets.topic.replication.factor': replicas,
      'offsets.topic.num.partitions': 4,
      'transaction.state.log.replication.factor': replicas,
      'transaction.state.log.min.isr': Math.min(2, replicas),
      'transaction.state.log.num.partitions': 4,
      'share.coordinator.state.topic.replication.factor': replicas,
      'share.coordinator.state.topic.min.isr': Math.min(2, replicas),
      'group.initial.rebalance.delay.ms': 0,
    })
      .map(([key, value]) => `${key}=${value}\n`)
      .join('');
  }
}

class ConsoleProducer {
  #child;
  #headers;
  #stderr = '';

  constructor(child, headers) {
    this.#child = child;
    this.#headers = headers;
    child.stdout.resume();
    child.stderr.setEncoding('utf8').on('data', (part) => (this.#stderr += part));
  }

  /** Hands records to the producer's standard input; they are on their way, not yet acknowledged. */
  async send(records) {
    const lines = records.map(({ key, value, headers = {} }) => {
      const head = Object.entries(headers).map(([name, text]) => `${name}:${text}`);
      return [...(this.#headers ? [head.join(',')] : []), key, value].join('\t');
    });
    const { stdin } = this.#child;
    await new Promise((resolve, reject) => {
      stdin.once('error', reject);
      stdin.write(`${lines.join('\n')}\n`, resolve);
    });
  }

  /** Ends the input and waits until Kafka has acknowledged everything. */
  async close() {
    this.#child.stdin.end();
    await inTime(this.#child.closed, { what: 'the console producer to end', within: 90_000 });
    // The tool ends with 0 after losing records, so what it said counts too.
    if (this.#child.exitCode !== 0 || /ERROR/.test(this.#stderr)) {
      throw new Error(`the console producer ended with ${this.#child.exitCode}\n${this.#stderr}`);
    }
  }
}

class ConsoleConsumer {
  /** `{partition, offset, headers, key, value}` in the order of arrival; `headers` maps names to texts. */
  records = [];
  #child;

  constructor(child) {
    this.#child = child;
    child.stdin.end();
    child.stderr.resume();
    const lines = readline.createInterface({ input: child.stdout });
    lines.on('line', (line) => this.records.push(parseRecord(line)));
    this.closed = Promise.all([child.closed, new Promise((resolve) => lines.once('close', resolve))]);
  }

  async stop() {
    await stop(this.#child, { signal: 'SIGKILL' });
  }
}

function parseRecord(line) {
  const [partition, offset, headers, key, ...value] = line.split('\t');
  const pairs = headers === 'NO_HEADERS' ? [] : headers.split(HEADER_SEPARATOR).map((pair) => pair.split(/:(.*)/s).slice(0, 2));
  return {
    partition: Number(partition.replace('Partition:', '')),
    offset: Number(offset.replace('Offset:', '')),
    headers: Object.fromEntries(pairs),
    key,
    value: value.join('\t'),
  };
}

function java(options, main, ...args) {
  return ['java', ...options, '-cp', path.join(JARS, '*'), main, ...args];
}

function count(file, text) {
  return fs.existsSync(file) ? fs.readFileSync(file, 'utf8').split(text).length - 1 : 0;
}
