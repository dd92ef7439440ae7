// The presence half of the verdict, promise 6: who is listed is there, who is there is listed, the dead leave once.

const LEAVE_WITHIN_MS = 60_000;
// Members stay for 15 s without their client. A node may see it go a little earlier than the client itself.
const STAYS_MS = 12_000;
// A leave is seen that long after it was due: the node that attends the member, or who looks, may have been away.
const SEEN_LATE_MS = 45_000;
// The ids of leaves that no client asked for.
const LEFT = 'left-';

/** `add(fault, channel, client, detail)` for every fault of presence in the history. */
export function judgeMembers(events, { leaveWithinMs = LEAVE_WITHIN_MS, add }) {
  judgeLists(events, add);
  judgeLeaves(events, { leaveWithinMs, add });
  judgeHaste(events, add);
}

/** Nobody is made to leave whose client is there, or is away for a moment. */
function judgeHaste(events, add) {
  const absences = new Map();
  const now = new Map();
  const of = (client) => {
    if (!absences.has(client)) absences.set(client, []);
    return absences.get(client);
  };
  const told = new Set();
  for (const { kind, client, state, connectionId, at, action, clientId, channel, id } of events) {
    if (kind === 'died') of(client).push({ from: at, to: Infinity });
    if (kind === 'connection') {
      const last = of(client).at(-1);
      if (state === 'connected') {
        now.set(client, connectionId);
        if (last?.to === Infinity) last.to = at;
      } else if (last?.to !== Infinity) {
        of(client).push({ from: at, to: Infinity });
      }
    }
    if (kind !== 'presence' || action !== 'leave' || !id?.startsWith(LEFT) || told.has(id + clientId)) continue;
    // Of a connection that the client has not any more, or of somebody nobody knows.
    if (now.get(clientId) !== connectionId) continue;
    told.add(id + clientId);
    const long = ({ from, to }) => Math.min(to, at) - from >= STAYS_MS && to >= at - SEEN_LATE_MS;
    if (!of(clientId).some(long)) {
      add('early-leave', channel, client, `${clientId} (${connectionId}) left at ${at} ms, and was not away for long`);
    }
  }
}

/** At the end every list of members equals the set of those who are present. */
function judgeLists(events, add) {
  const expected = new Map();
  const unsure = new Map();
  const died = new Set();
  const entry = (map, channel) => {
    if (!map.has(channel)) map.set(channel, new Map());
    return map.get(channel);
  };
  for (const { kind, client, channel, clientId, data } of events) {
    if (kind === 'died') died.add(client);
    if (kind === 'present') entry(expected, channel).set(clientId, data);
    if (kind === 'absent') entry(expected, channel).delete(clientId);
    // Asked for and refused, or not answered: it may have happened, so nothing is said of this member until it is sure.
    if (kind === 'unsure') entry(unsure, channel).set(clientId, true);
    if (kind === 'present' || kind === 'absent') entry(unsure, channel).delete(clientId);
  }
  for (const all of expected.values()) for (const clientId of died) all.delete(clientId);

  for (const { kind, channel, from, members } of events) {
    if (kind !== 'members') continue;
    const wanted = entry(expected, channel);
    const doubtful = entry(unsure, channel);
    const listed = new Map();
    for (const member of members) {
      if (listed.has(member.clientId)) {
        add(
          'ghost',
          channel,
          from,
          `${member.clientId} is listed with ${listed.get(member.clientId).connectionId} and ${member.connectionId}`,
        );
      }
      listed.set(member.clientId, member);
      if (doubtful.has(member.clientId)) continue;
      if (!wanted.has(member.clientId))
        add('ghost', channel, from, `${member.clientId} (${member.connectionId}) is listed`);
      else if (!same(member.data, wanted.get(member.clientId))) {
        add('stale', channel, from, `${member.clientId}: ${member.data} instead of ${wanted.get(member.clientId)}`);
      }
    }
    for (const clientId of wanted.keys()) {
      if (!listed.has(clientId) && !doubtful.has(clientId)) add('missing', channel, from, `${clientId} is not listed`);
    }
  }
}

/** A member leaves once for whoever saw it, and the dead ones leave in time. */
function judgeLeaves(events, { leaveWithinMs, add }) {
  const deaths = new Map();
  for (const { kind, client, connectionId, at } of events)
    if (kind === 'died') deaths.set(client, { connectionId, at });
  const seen = new Map();
  for (const event of events) {
    if (event.kind !== 'presence') continue;
    const { client, channel, action, clientId, connectionId, at } = event;
    const key = JSON.stringify([client, channel, clientId, connectionId]);
    const inside = seen.get(key) === true;
    if (action === 'leave') {
      if (!inside) add('double-leave', channel, client, `${clientId} (${connectionId}) left, and was not there`);
      const death = deaths.get(clientId);
      if (death && death.connectionId === connectionId && at - death.at > leaveWithinMs) {
        add('late-leave', channel, client, `${clientId} left ${at - death.at} ms after its death`);
      }
    }
    seen.set(key, action !== 'leave' && action !== 'absent');
  }
  for (const [key, inside] of seen) {
    const [client, channel, clientId, connectionId] = JSON.parse(key);
    if (inside && deaths.has(clientId) && !deaths.has(client)) {
      add('no-leave', channel, client, `${clientId} (${connectionId}) died and never left`);
    }
  }
}

function same(a, b) {
  return JSON.stringify(a ?? null) === JSON.stringify(b ?? null);
}
