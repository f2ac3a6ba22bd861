// The service, as this page asks it: JSON, problems, and an upgrade's events.

// Wherever the page came from, behind a proxy's prefix too.
const BASE = new URL("..", import.meta.url);
const PATIENCE_MS = 15_000; // for one reading: a browser waits for minutes, and the page would say `live` all the while

/** What the service refused, in its own words. */
export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail ?? `the service answered with status ${status}`);
    this.status = status;
    this.code = problem.code;
  }
}

export const key = {
  // Of this tab only, and gone with it: what is in localStorage or a cookie outlives the person at the screen. Nothing sends
  // it by itself, so a page of another origin cannot make the browser use it.
  get: () => sessionStorage.getItem("forwardfill.key"),
  set: (value) => sessionStorage.setItem("forwardfill.key", value),
  forget: () => sessionStorage.removeItem("forwardfill.key"),
};

export async function ask(path, { method = "GET", body, signal, headers = {} } = {}) {
  const secret = key.get();
  const sent = { ...headers, ...(secret && { Authorization: `Bearer ${secret}` }), ...(body && { "Content-Type": "application/json" }) };
  const request = { method, headers: sent, body: body && JSON.stringify(body), signal, cache: "no-store", credentials: "omit" };
  const answer = await fetch(new URL(path, BASE), request);
  if (!answer.ok) throw new Refused(answer.status, await answer.json().catch(() => ({})));
  return answer;
}

export const read = async (path) => (await ask(path, { signal: AbortSignal.timeout(PATIENCE_MS) })).json();

export const upgrade = (id, what = "") => `admin/upgrades/${encodeURIComponent(id)}${what}`;
export const next = (token) => (token ? `&page_token=${encodeURIComponent(token)}` : "");

/** Follow an upgrade until it is over or `signal` aborts.
 *
 * EventSource would be shorter, but sends no Authorization header, and a key in a URL ends up in logs. What it does beside
 * reading is three lines here: remember the last id, come again, stop at 204. */
export async function follow(id, lastId, signal, told) {
  const headers = { Accept: "text/event-stream", ...(lastId && { "Last-Event-ID": lastId }) };
  const answer = await ask(upgrade(id, "/events"), { headers, signal });
  if (answer.status === 204) return false;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return true;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const message of blocks.map(parsed)) if (message.data) told(message);
  }
}

/** One event of a stream; a comment has no data. */
function parsed(block) {
  const found = {};
  for (const line of block.split("\n")) {
    const at = line.indexOf(": ");
    if (at > 0) found[line.slice(0, at)] = line.slice(at + 2);
  }
  return found;
}
