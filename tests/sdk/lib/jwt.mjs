// JSON Web Tokens as a customer's own server would sign them.

import { createHmac } from 'node:crypto';

/** HS256 over `claims` with an API key `app.id:secret`; `iat` is now and `exp` in an hour unless they are given. */
export function jwt(key, claims = {}, { header = {}, secret } = {}) {
  const [keyName, keySecret] = key.split(':');
  const now = Math.floor(Date.now() / 1000);
  const parts = [
    { typ: 'JWT', alg: 'HS256', kid: keyName, ...header },
    { iat: now, exp: now + 3600, ...claims },
  ].map((part) => Buffer.from(JSON.stringify(part)).toString('base64url'));
  const signature = createHmac('sha256', secret ?? keySecret)
    .update(parts.join('.'))
    .digest('base64url');
  return [...parts, signature].join('.');
}

/** The claims of a client with an identity and capabilities. */
export function claims({ clientId, capability, ...more } = {}) {
  return {
    ...(capability && { 'x-ably-capability': JSON.stringify(capability) }),
    ...(clientId && { 'x-ably-clientId': clientId }),
    ...more,
  };
}
