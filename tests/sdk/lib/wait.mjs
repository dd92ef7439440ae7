// Waiting for a condition, with a deadline and a reason. Nothing here sleeps "until it works".

/** Polls `condition` until it answers something truthy, which is returned.
 *
 * `condition` may be async; what it throws counts as "not yet" and is told when time is up, unless it is `fatal`.
 * `what` ends the sentence "gave up waiting for …". `within` and `every` are in milliseconds.
 */
export async function until(condition, { what, within = 20_000, every = 25 }) {
  const deadline = Date.now() + within;
  let last;
  for (;;) {
    try {
      const answer = await condition();
      if (answer) return answer;
      last = `last answer: ${show(answer)}`;
    } catch (error) {
      if (error.fatal) throw error;
      last = `last error: ${error.message ?? error}`;
    }
    if (Date.now() > deadline) throw new Error(`gave up after ${within} ms waiting for ${what}; ${last}`);
    await pause(every);
  }
}

/** An error that no further waiting can mend. */
export function fatal(message) {
  return Object.assign(new Error(message), { fatal: true });
}

/** `promise`, or an error that names `what` after `within` milliseconds. */
export async function inTime(promise, { what, within = 20_000 }) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`gave up after ${within} ms waiting for ${what}`)), within);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** The next occurrence of `event` on a node EventEmitter, as its first argument. */
export function once(emitter, event, { what = `event ${event}`, within } = {}) {
  return inTime(new Promise((resolve) => emitter.once(event, resolve)), { what, within });
}

/** Used for pacing a load, never for waiting until something has happened. */
export function pause(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Does `work(item, index)` for every item, at most `width` at a time; answers results in order. */
export async function inParallel(width, items, work) {
  const results = new Array(items.length);
  let next = 0;
  const worker = async () => {
    while (next < items.length) {
      const index = next++;
      results[index] = await work(items[index], index);
    }
  };
  await Promise.all(Array.from({ length: Math.min(width, items.length) }, worker));
  return results;
}

function show(value) {
  const text = JSON.stringify(value);
  return text && text.length > 400 ? `${text.slice(0, 400)}…` : text;
}
