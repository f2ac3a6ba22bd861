// The page: what it has read, when it reads again, and what happens where a person clicks.

import { keepingFocus, renew, show } from "./dom.js";
import * as service from "./service.js";
import * as view from "./view.js";

const LOOK_MS = 3000; // the chosen upgrade has its stream, all else is read
const AGAIN_MS = 1500; // after a failure
const NEWEST = 20; // upgrades that are read each time; older ones when somebody asks for them
const OTHERS = 12; // older ones that are active: so many are read each time, in turns
const PAGE = 200; // galleries; of more than that a page is read each time, in turns
const FAILURES = 50;
// verbs that a person may insist on, by the problem that says what it costs
const INSIST = { native_items_would_be_unreachable: { accept_unreachable: true }, gate_closed: { accept_below_gate: true } };

const LOST = "The service cannot be reached";

const byId = (id) => document.getElementById(id);
const seen = fresh();
const lastIds = new Map(); // of each upgrade that was followed, the last event
const readIn = new Map(); // of each upgrade that was read by itself, the reading that did
let following = null;
let turns = 0;
let timer = null;

function fresh() {
  const picked = location.hash.slice(1) || null;
  return {
    galleries: null, round: { found: [] }, upgrades: null, token: null, picked, failures: [], trouble: {}, refused: null, busy: false,
    lost: null, all: false, sought: "",
  };
}

// --- reading ---------------------------------------------------------------------------------------------------------

/** Read, show, and come again; not while nobody looks. */
async function look() {
  clearTimeout(timer);
  if (document.hidden) return;
  const turn = ++turns;
  if (byId("main").hidden) said("status", "reading");
  const [galleries, upgrades] = await Promise.allSettled([moreGalleries(seen.galleries, seen.round), newest()]);
  const failures = await Promise.resolve(upgrades.value && failuresOf(chosen(upgrades.value))).catch(() => seen.failures);
  if (turn !== turns) return; // a later reading has begun meanwhile
  const errors = [galleries.reason, upgrades.reason].filter(Boolean);
  if (errors.some(({ status }) => status === 401)) return askForKey();
  const wasAsked = !byId("key-form").hidden;
  byId("key-form").hidden = byId("key-problem").hidden = true;
  seen.lost = errors.find((error) => !(error instanceof service.Refused) || error.status >= 500 || error.status === 429) ?? null;
  if (!seen.lost) {
    Object.assign(seen, galleries.value ?? { galleries: null }, { upgrades: upgrades.value ?? null, failures: failures ?? [] });
    seen.trouble = { galleries: galleries.reason?.message, upgrades: upgrades.reason?.message };
  }
  listen();
  render();
  if (wasAsked) byId("galleries").focus(); // the field that had the focus is gone
  comeAgain(seen.lost ? AGAIN_MS : LOOK_MS);
}

const comeAgain = (ms) => {
  clearTimeout(timer);
  timer = setTimeout(look, ms);
};

/** All galleries at first; later a page of them at each reading, so that thousands ask no more of the service than a page does.
 * `round` has what was read since the last time that all were: what is not in it when it is over is gone. */
async function moreGalleries(known, { found, token }) {
  const { galleries: page, next_page_token: next } = await service.read(`galleries?page_size=${PAGE}${service.next(token)}`);
  const round = { found: [...found, ...page], token: next };
  if (!next) return { galleries: round.found, round: { found: [] } };
  if (!known) return moreGalleries(known, round);
  return { galleries: [...new Map([...known, ...page].map((each) => [each.name, each])).values()], round };
}

/** The newest upgrades as they are now, and with them what else is of interest: what is active, what is chosen, and what was
 * asked for before. */
async function newest() {
  const { upgrades: page, next_page_token: token } = await service.read(`admin/upgrades?page_size=${NEWEST}`);
  seen.token ??= seen.upgrades ? null : token;
  const found = new Map([...(seen.upgrades ?? []), ...page].map((each) => [each.id, each]));
  const current = new Set(page.map(({ id }) => id));
  await Promise.all(due(found, current).map(async (id) => {
    const other = await one(id);
    readIn.set(id, turns);
    if (other) found.set(id, other);
    else found.delete(id);
    if (!other && id === seen.picked) seen.picked = null;
  }));
  return sorted(found);
}

/** Which upgrades are read by themselves: the chosen one, then the active ones that waited longest, first those whose galleries are
 * shown first. */
function due(found, current) {
  const mine = seen.picked ?? chosen()?.id;
  const active = [...found.values()].filter(view.isActive).map(({ id }) => id);
  const ofGalleries = view.matches(seen.galleries ?? [], seen.sought).map((gallery) => gallery.active_upgrade);
  const wanted = [...new Set([mine, ...ofGalleries, ...active])].filter((id) => id && !current.has(id));
  const since = (id) => (id === mine ? -1 : readIn.get(id) ?? 0);
  return wanted.sort((one, other) => since(one) - since(other)).slice(0, OTHERS);
}

const one = (id) =>
  service.read(service.upgrade(id)).catch((error) => {
    if (error.status === 404) return null; // the page's address may name anything
    throw error;
  });

const sorted = (found) => [...found.values()].sort((one, other) => (one.id < other.id ? 1 : -1)); // ids begin with their time

/** Add the next page. A reading that is under way lacks it, so its result is dropped, and another begins. */
async function older() {
  const page = await service.read(`admin/upgrades?page_size=${NEWEST}${service.next(seen.token)}`);
  seen.token = page.next_page_token;
  seen.upgrades = sorted(new Map([...page.upgrades, ...seen.upgrades].map((each) => [each.id, each])));
  render();
  look();
}

const failuresOf = async (upgrade) =>
  upgrade?.progress.segments_failed ? (await service.read(service.upgrade(upgrade.id, `/failures?page_size=${FAILURES}`))).failures : [];

const chosen = (upgrades = seen.upgrades ?? []) =>
  upgrades.find(({ id }) => id === seen.picked) ?? upgrades.find(view.isActive) ?? upgrades[0];

// --- live ------------------------------------------------------------------------------------------------------------

/** Follow the chosen upgrade while it is active, and only that one: browsers open six connections to a host, and the others
 * are read every few seconds anyway. */
function listen() {
  const upgrade = chosen();
  const id = upgrade && view.isActive(upgrade) && !document.hidden ? upgrade.id : null;
  if (id === (following?.id ?? null)) return;
  following?.abort.abort();
  following = id && { id, abort: new AbortController() };
  if (following) stay(following);
}

async function stay(mine) {
  const { id, abort: { signal } } = mine;
  for (let goesOn = true; goesOn && !signal.aborted; ) {
    try {
      goesOn = await service.follow(id, lastIds.get(id), signal, (message) => heard(id, message));
    } catch (error) {
      goesOn = !(error instanceof service.Refused);
    }
    if (goesOn && !signal.aborted) await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
  if (following === mine) following = null;
}

function heard(id, { id: eventId, event, data }) {
  lastIds.set(id, eventId);
  const at = seen.upgrades?.findIndex((each) => each.id === id) ?? -1;
  if (at < 0) return;
  if (event === "progress") {
    seen.upgrades[at] = { ...seen.upgrades[at], progress: JSON.parse(data) };
    renderMoved(seen.upgrades[at]);
  } else if (JSON.parse(data).state !== seen.upgrades[at].state) look(); // verbs, conditions and the gallery changed with it
}

// --- showing ---------------------------------------------------------------------------------------------------------

function render() {
  if (!byId("key-form").hidden) return; // nothing is known
  const upgrade = chosen();
  byId("main").hidden = false;
  byId("forget").hidden = !service.key.get();
  byId("finder").hidden = !view.areMany(seen.galleries);
  said("matches", seen.sought && seen.galleries ? view.found(seen) : "");
  byId("banner").hidden = !seen.lost;
  if (seen.lost) said("banner", `${seen.lost instanceof service.Refused ? seen.lost.message : LOST}. Trying again; what you see may be old.`);
  said("status", seen.lost ? "not connected" : following ? "live" : "up to date");
  byId("status").className = seen.lost ? "bad" : following ? "live" : "";
  keepingFocus(() => {
    show(byId("galleries"), view.galleries(seen, seen.upgrades ?? []));
    show(byId("upgrades"), view.upgrades(seen, seen.upgrades, upgrade));
    show(byId("chosen"), view.detail(upgrade, seen));
  });
  document.title = view.tab(upgrade);
}

/** Show how far an upgrade is, which is told twice a second: what stands still, perhaps a thousand galleries, is not made anew. */
function renderMoved(upgrade) {
  const gallery = seen.galleries?.find(({ name }) => name === upgrade.gallery);
  const isNewest = seen.upgrades.find((each) => each.gallery === upgrade.gallery) === upgrade;
  keepingFocus(() => {
    if (gallery && isNewest) renew(byId("galleries"), view.gallery(gallery, upgrade));
    renew(byId("upgrades"), view.row(upgrade, upgrade === chosen()));
    if (upgrade === chosen()) show(byId("chosen"), view.detail(upgrade, seen));
  });
  document.title = view.tab(chosen());
}

/** Write a text only if it differs: a screen reader reads a live region aloud each time it is written to. */
function said(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

// --- the key ---------------------------------------------------------------------------------------------------------

function askForKey() {
  const wrong = service.key.get() !== null;
  forget();
  byId("key-form").hidden = false;
  if (wrong) {
    byId("key-problem").hidden = false;
    said("key-problem", "The service does not take this key: it is mistyped, or was revoked.");
  }
  byId("key").focus();
}

function forget() {
  service.key.forget();
  following?.abort.abort();
  following = null;
  Object.assign(seen, fresh());
  byId("sought").value = "";
  byId("question").close("no"); // nobody could reach the page behind it
  for (const id of ["galleries", "upgrades", "chosen"]) byId(id).replaceChildren();
  byId("main").hidden = byId("forget").hidden = byId("banner").hidden = true;
  said("status", "");
  document.title = view.tab(null);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  service.key.set(byId("key").value.replace(/[^\x21-\x7e]/g, "")); // spaces and the like that were copied along: a header cannot hold them
  byId("key").value = "";
  byId("key-problem").hidden = true; // of the key before
  look();
});

// --- acting ----------------------------------------------------------------------------------------------------------

async function act(verb) {
  const upgrade = chosen();
  const question = view.question(upgrade, verb);
  if (seen.busy || (question && !(await agreed(question)))) return;
  Object.assign(seen, { busy: true, refused: null });
  render();
  await send(upgrade, verb);
  seen.busy = false;
  render();
  look();
}

async function send(upgrade, verb, body) {
  try {
    await service.ask(service.upgrade(upgrade.id, `/${verb}`), { method: "POST", body });
  } catch (error) {
    const insist = !body && INSIST[error.code];
    if (insist && (await agreed({ title: "The service asks for your consent", text: error.message, yes: "Do it all the same" }))) {
      await send(upgrade, verb, insist);
      return;
    }
    seen.refused = { id: upgrade.id, verb, detail: error instanceof service.Refused ? error.message : LOST };
  }
}

function agreed({ title, text, yes, no = "No" }) {
  const dialog = byId("question");
  for (const [part, words] of Object.entries({ title, text, yes, no })) byId(`question-${part}`).textContent = words;
  dialog.returnValue = "";
  const asker = document.activeElement;
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    if (!asker.isConnected) byId("chosen").querySelector("[data-key=verbs]")?.focus(); // it went while the question was open
    resolve(dialog.returnValue === "yes");
  }, { once: true }));
}

function choose(id, byKey) {
  Object.assign(seen, { picked: id, failures: [] });
  history.replaceState(null, "", `#${id}`); // to be bookmarked, and to survive a reload
  listen();
  render();
  look();
  reveal(byId("chosen-title"), byKey);
}

/** Into view, what can be done with it follows. The focus goes there too where what was pressed is out of view then, or was pressed by
 * a key: the next Tab leads to the verbs, and not through all other upgrades. Escape goes back. */
function reveal(title, byKey) {
  title?.scrollIntoView({ block: "nearest" });
  const { top, bottom } = document.activeElement.getBoundingClientRect();
  if (byKey || bottom < 0 || top > innerHeight) title?.focus({ preventScroll: true });
}

function find(sought) {
  seen.sought = sought.trim().toLowerCase(); // as all names are
  render();
}

const ACTIONS = {
  choose: ({ id }, { detail: presses }) => choose(id, presses === 0),
  all: () => {
    seen.all = !seen.all;
    render();
    if (!seen.all) byId("all").scrollIntoView({ block: "nearest" }); // the rows above it are gone
  },
  older: () => older().catch(look),
  verb: ({ verb }) => act(verb),
  forget: () => {
    forget();
    look();
  },
  yes: () => byId("question").close("yes"),
  no: () => byId("question").close("no"),
};

// One listener on the document, because elements come and go with each reading.
document.addEventListener("click", (event) => {
  const asked = event.target.closest("[data-action]");
  if (asked) ACTIONS[asked.dataset.action](asked.dataset, event);
});
byId("sought").addEventListener("input", ({ target }) => find(target.value));
byId("chosen").addEventListener("keydown", ({ key }) => {
  if (key === "Escape") byId("upgrades").querySelector("[aria-pressed=true]")?.focus();
});
document.addEventListener("visibilitychange", () => (document.hidden ? following?.abort.abort() : look()));
window.addEventListener("hashchange", () => choose(location.hash.slice(1)));

look();
