// Tenants of a cluster, made and removed by the operator's API.

import { until } from './wait.mjs';

/** Makes an app in one request: `{appId, keys}`, each key as `app.id:secret`.
 *
 * `keys` says what each key may do, `{capability, revocable_tokens}`; `namespaces` are the rules for channels,
 * `{id, retention_ms, …}`.
 */
export async function createApp(cluster, { keys = [{}], namespaces = [], through = 1 } = {}) {
  const { body } = await admin(cluster, through, '/apps', { method: 'POST', body: { keys, namespaces } });
  const made = { appId: body.id, keys: body.keys.map(({ key }) => key) };
  // The other nodes hear of it a moment later.
  for (const id of cluster.living()) {
    await until(() => knows(cluster, id, made.keys[0]), { what: `node ${id} to know app ${made.appId}` });
  }
  return made;
}

async function knows(cluster, id, key) {
  const authorization = `Basic ${Buffer.from(key).toString('base64')}`;
  const response = await fetch(new URL('/channels?limit=1', cluster.url(id)), { headers: { authorization } });
  const { error } = response.ok ? {} : await response.json();
  return error?.code !== 40400;
}

export async function deleteApp(cluster, appId, { through = 1 } = {}) {
  await admin(cluster, through, `/apps/${appId}`, { method: 'DELETE' });
}

async function admin(cluster, id, target, { method, body }) {
  const response = await fetch(new URL(target, cluster.node(id).admin), {
    method,
    headers: body ? { 'content-type': 'application/json' } : {},
    body: body && JSON.stringify(body),
    signal: AbortSignal.timeout(15_000),
  });
  const text = await response.text();
  if (!response.ok) throw new Error(`${method} ${target} answered ${response.status}: ${text}`);
  return { status: response.status, body: text ? JSON.parse(text) : undefined };
}
