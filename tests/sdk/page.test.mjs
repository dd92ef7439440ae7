// The page that each node serves, in a real browser: two tabs on two nodes, and what they say when a node dies.

import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';

import { chromium } from 'playwright-core';

import { ROOT, tempFolder } from './lib/process.mjs';
import { suite } from './lib/suite.mjs';
import { until } from './lib/wait.mjs';

const SCREENSHOTS = path.join(ROOT, 'target/screenshots');
const CHROMIUM = process.env.FIRTH_CHROMIUM ?? findOnPath(['chromium', 'chromium-browser', 'google-chrome']);
// As root Chromium has no sandbox; nothing it opens here is foreign. The rest keeps it from calling home.
const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync', '--no-proxy-server'];

const scenario = suite();

/** A scenario with a browser; `open(node, nick, hash)` opens the page of a node, connected to `channel` by its hash. */
function inBrowser(name, body) {
  scenario(name, async (given) => {
    const { cluster } = given;
    assert.ok(CHROMIUM, 'no Chromium on the PATH; run: make setup');
    const profile = tempFolder('chromium');
    const context = await chromium.launchPersistentContext(profile, {
      executablePath: CHROMIUM, args: FLAGS, headless: true, viewport: { width: 1200, height: 800 },
    });
    const complaints = [];
    const foreign = [];
    context.on('page', (page) => {
      page.setDefaultTimeout(20_000);
      page.on('pageerror', (error) => complaints.push(String(error)));
      page.on('console', (line) => line.type() === 'error' && complaints.push(line.text()));
      page.on('request', (request) => {
        const { hostname, protocol } = new URL(request.url());
        if (protocol !== 'data:' && hostname !== '127.0.0.1') foreign.push(request.url());
      });
    });
    const open = async (node, nick, { channel, key = cluster.key } = {}) => {
      const page = await context.newPage();
      await page.goto(`${cluster.url(node)}/#${new URLSearchParams({ key, channel, nick })}`);
      return page;
    };
    try {
      await body({ ...given, context, open, complaints });
      assert.deepEqual(foreign, [], 'the page needs nothing from elsewhere');
    } catch (error) {
      for (const [i, page] of context.pages().entries()) await shoot(page, `failed-${i}`).catch(() => {});
      throw error;
    } finally {
      await context.close();
      fs.rmSync(profile, { recursive: true, force: true });
    }
  });
}

inBrowser('two tabs on two nodes chat through a channel and see who leads it', async (given) => {
  const { cluster, context, open, complaints } = given;
  const channel = await cluster.channelLedBy(3, 'persisted:harbour');
  const ada = await open(1, 'Ada', { channel });
  const bo = await open(2, 'Bo', { channel });
  for (const page of [ada, bo]) await shows(page, 'state', 'connected');
  assert.doesNotMatch(ada.url(), /secret|key=/, 'the key does not stay in the address bar');

  await say(ada, 'Hello from node 1 – <b>no</b> markup ≈');
  await say(bo, 'And back from node 2');
  for (const page of [ada, bo]) {
    await until(async () => (await texts(page)).length === 2, { what: 'both messages in both tabs' });
    assert.deepEqual(await texts(page), ['Hello from node 1 – <b>no</b> markup ≈', 'And back from node 2']);
    await page.locator('[data-testid="pending"] > li').waitFor({ state: 'detached' });
    await page.locator('.message.own[data-state="stored"]').waitFor();
  }
  await shows(ada, 'node', '1');
  await shows(bo, 'node', '2');
  const { shard } = await cluster.whereIs(channel);
  for (const page of [ada, bo]) {
    await shows(page, 'leader', 'node 3');
    await shows(page, 'shard', String(shard));
    assert.equal(await page.getByTestId('node-3').getAttribute('data-leads'), 'true');
    assert.equal(await page.getByTestId('node-1').getAttribute('data-leads'), 'false');
  }

  // The way to the other nodes: the same channel, with what was said before.
  const opened = context.waitForEvent('page');
  await ada.getByTestId('node-3').click();
  const third = await opened;
  await shows(third, 'state', 'connected');
  await shows(third, 'leader', 'node 3 (this one)');
  await until(async () => (await texts(third)).length === 2, { what: 'the history in the third tab' });
  assert.deepEqual(await texts(third), await texts(ada));
  await say(third, 'Three of us');
  await until(async () => (await texts(ada)).at(-1) === 'Three of us', { what: 'the third tab to be heard' });
  assert.deepEqual(complaints, []);

  await shoot(ada, 'two-nodes-light');
  await bo.emulateMedia({ colorScheme: 'dark' });
  await shoot(bo, 'two-nodes-dark');
  await third.setViewportSize({ width: 390, height: 844 });
  await shoot(third, 'narrow');
});

inBrowser('the page says so when its node dies, and catches up by itself', async ({ cluster, open }) => {
  const channel = await cluster.channelLedBy(2, 'persisted:storm');
  const ada = await open(1, 'Ada', { channel });
  const bo = await open(2, 'Bo', { channel });
  for (const page of [ada, bo]) await shows(page, 'state', 'connected');
  await say(bo, 'before the storm');
  await until(async () => (await texts(ada)).length === 1, { what: 'the first message' });

  await cluster.kill(2);
  await until(async () => (await bo.getByTestId('state').getAttribute('data-state')) === 'lost', { what: 'the loss' });
  await bo.getByTestId('trouble').waitFor();
  // Written into the void: it waits, visibly, and is sent when the node is back.
  await say(bo, 'said while lost');
  await bo.locator('[data-testid="pending"] [data-state="sending"]').waitFor();
  await shoot(bo, 'node-lost');
  // The others elect a leader and go on.
  const leader = await cluster.leaderOf(channel);
  assert.notEqual(leader, 2);
  await until(async () => (await ada.getByTestId('leader').textContent()).includes(`node ${leader}`), {
    what: 'the new leader on the page',
  });
  await say(ada, 'said meanwhile');
  await ada.locator('.message.own[data-state="stored"]').waitFor();

  await cluster.restart(2);
  await shows(bo, 'state', 'connected');
  await bo.getByText('Back, and nothing was missed').waitFor();
  for (const page of [ada, bo]) {
    await until(async () => (await texts(page)).length === 3, { what: 'three messages everywhere' });
    assert.deepEqual(await texts(page), ['before the storm', 'said meanwhile', 'said while lost']);
  }
  assert.equal(await bo.locator('.message.own[data-state="stored"]').count(), 2);
  await shoot(bo, 'resumed');
});

inBrowser('a wrong key is refused in words', async ({ cluster, open }) => {
  const key = `${cluster.key.split(':')[0]}:wrong`;
  const page = await open(3, 'Mallory', { channel: 'a', key });
  await until(async () => (await page.getByTestId('state').getAttribute('data-state')) === 'failed', { what: 'a refusal' });
  assert.match(await page.getByTestId('trouble').textContent(), /40101/);
  assert.ok(await page.getByTestId('key').isEnabled(), 'one can try another key');
  await page.getByTestId('key').fill(cluster.key);
  await page.getByTestId('connect').click();
  await shows(page, 'state', 'connected');
  await page.getByTestId('disconnect').click();
  await shows(page, 'state', 'not connected');
});

async function say(page, text) {
  await page.getByTestId('text').fill(text);
  await page.getByTestId('send').click();
}

/** What stands in the channel, in its order; what waits is not yet in it. */
function texts(page) {
  return page.locator('[data-testid="log"] .message .text').allTextContents();
}

async function shows(page, id, wanted) {
  await until(async () => (await page.getByTestId(id).textContent()) === wanted, { what: `${id} to show ${wanted}` });
}

async function shoot(page, name) {
  fs.mkdirSync(SCREENSHOTS, { recursive: true });
  await page.screenshot({ path: path.join(SCREENSHOTS, `${name}.png`) });
}

function findOnPath(names) {
  const folders = (process.env.PATH ?? '').split(path.delimiter);
  return names.flatMap((name) => folders.map((folder) => path.join(folder, name))).find((file) => fs.existsSync(file));
}
