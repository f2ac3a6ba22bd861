// What a person sees of what was read: documents in, elements out. Pure.

import { chart } from "./chart.js";
import { el } from "./dom.js";
import * as words from "./words.js";

const TONES = {
  completed: "good", finalized: "good", failed: "bad", paused: "warn", awaiting_cutover: "warn",
  cancelled: "quiet", rolled_back: "quiet",
};
const VERBS = { // in the order of their buttons: what loses work comes last
  pause: "Pause", resume: "Resume", retry: "Retry", cutover: "Cut over",
  cancel: "Cancel…", rollback: "Roll back…", finalize: "Finalize…",
};
const FIRST = 12; // galleries; what goes on in the others comes first, and is not to be scrolled for
const OVERLAP = { name: "overlap_at_10", label: "overlap@10", hint: "share of the hits of before that are hits still" };

/** A dry run that failed is over; any other upgrade that failed waits for a person. The service tells them apart. */
export const isActive = (upgrade) => upgrade.finished_at === null;

/** The title of the tab: how far the upgrade is, for those who look at another tab. */
export const tab = (upgrade) =>
  upgrade && isActive(upgrade) ? `${words.percent(upgrade.progress.fraction)} ${upgrade.gallery} – Forwardfill` : "Forwardfill";

// --- galleries -------------------------------------------------------------------------------------------------------

/** Those that an upgrade is under way in come first, then the rest, each by name: of many, the first few are shown. */
export function galleries({ galleries: found, trouble, all, sought }, upgrades) {
  if (trouble.galleries) return problem(trouble.galleries);
  if (!found) return reading();
  if (!found.length) {
    const create = code('POST /galleries {"name": "photos", "model": "my-model"}');
    return hint("No gallery yet. Register a model with ", code("POST /models"), ", then create one: ", create);
  }
  const matching = matches(found, sought);
  if (!matching.length) return hint(`No gallery has “${sought}” in its name.`);
  const shown = all ? matching : matching.slice(0, FIRST);
  const newest = new Map(upgrades.toReversed().map((upgrade) => [upgrade.gallery, upgrade]));
  return [
    el("div", { class: "cards", id: "cards" }, shown.map((each) => gallery(each, newest.get(each.name)))),
    matching.length > FIRST && el("button", {
      type: "button", id: "all", "data-action": "all", "data-key": "all", "aria-expanded": String(all), "aria-controls": "cards",
    }, all ? `Show the first ${FIRST} only` : `Show all ${words.count(matching.length)}`),
  ];
}

/** Those whose name has what is sought, in the order in which they are shown. */
export function matches(found, sought) {
  const matching = found.filter(({ name }) => name.includes(sought));
  return [...matching.filter((each) => each.active_upgrade), ...matching.filter((each) => !each.active_upgrade)];
}

export const areMany = (found) => found?.length > FIRST;
export const found = ({ galleries: all, sought }) => `${words.count(matches(all, sought).length)} of ${words.count(all.length)}`;

export function gallery({ name, model, items, segments, version, columns, side_information: side }, newest) {
  return el("article", { class: "card", "data-key": name },
    el("h3", null, name),
    el("p", { class: "model" }, "Model ", el("b", null, model)),
    newest && lately(newest),
    items === 0
      ? hint("Empty. Send items: ", code(`POST /galleries/${name}/items`))
      : el("ul", { class: "plain columns", "aria-label": "Vectors by model" }, columns.map((each) => column(each, items))),
    facts([
      words.counted(items, "item"),
      words.counted(segments, "segment"),
      `version ${words.count(version)}`,
      side.items > 0 && `${side.items === items ? "all" : words.count(side.items)} with side-information`,
    ]));
}

/** The gallery's newest upgrade in short, so that the first look answers: how far, and is it better? */
function lately(upgrade) {
  const { id, gallery: name, source_model: source, target_model: target, state, dry_run: dry } = upgrade;
  const choose = (said, model) => el("button", {
    type: "button", class: "inline", "data-action": "choose", "data-id": id, "aria-controls": "chosen", "aria-label": `${said} ${model}: ${name}`,
  }, `${said} `, el("b", null, model));
  if (isActive(upgrade)) {
    const heading = el("p", null, choose("Upgrade to", target), " ", badge(upgrade));
    return el("div", null, heading, bar(upgrade, `Upgrade of ${name}`), verdict(upgrade));
  }
  if (dry || words.UNDONE.has(state)) return null;
  const when = words.ago(upgrade.finished_at ?? upgrade.created_at);
  return el("div", null, el("p", null, choose("Upgraded from", source), ` ${when}`), verdict(upgrade));
}

function column({ model, native_items: native, derived_items: derived, bytes, index }, items) {
  const held = `${words.count(native)} native and ${words.count(derived)} derived vectors for ${words.counted(items, "item")}`;
  return el("li", { "data-key": model },
    el("div", { class: "ends" }, el("span", null, model), el("b", null, words.percent((native + derived) / items))),
    el("div", { class: "bar", role: "img", "aria-label": `${model}: ${held}` },
      el("i", { class: "native", width: width(native / items) }),
      el("i", { class: "derived", width: width(derived / items) })),
    facts([
      native > 0 && [el("i", { class: "swatch native" }), `${words.count(native)} native`],
      derived > 0 && [el("i", { class: "swatch derived" }), `${words.count(derived)} derived`],
      index.kind === "flat" ? "exact search" : `index ${index.kind}`,
      words.isNumber(index.recall_at_10) && `recall@10 ${words.share(index.recall_at_10)}`,
      words.bytes(bytes),
    ]));
}

// --- upgrades --------------------------------------------------------------------------------------------------------

export function upgrades({ trouble, token, galleries: known }, found, chosen) {
  if (trouble.upgrades) return problem(trouble.upgrades);
  if (!found) return reading();
  if (!found.length) {
    const start = code(`POST /admin/upgrades {"gallery": "${known?.[0]?.name ?? "photos"}", "target_model": "my-new-model"}`);
    return hint("No upgrade yet. Register the new model and a transformation to it, then start one: ", start);
  }
  return [
    el("ol", { class: "plain", "aria-label": "Upgrades, the newest first" }, found.map((each) => row(each, each === chosen))),
    token && el("button", { type: "button", "data-action": "older", "data-key": "older" }, "Show older ones"),
  ];
}

export function row(upgrade, isChosen) {
  const { id, gallery: name, target_model: target, transformation, conditions, created_at: created } = upgrade;
  const choose = { type: "button", class: "link", "data-action": "choose", "data-id": id, "aria-controls": "chosen" };
  return el("li", { class: `card row-card${isChosen ? " chosen" : ""}`, "data-key": id },
    el("div", { class: "ends" }, el("button", { ...choose, "aria-pressed": String(isChosen) }, title(upgrade)), badge(upgrade)),
    bar(upgrade, `Progress of ${name} to ${target}`),
    facts([transformation, ...pace(upgrade), words.ago(created)]),
    verdict(upgrade),
    conditions.map(({ type, reason }) => el("p", { class: "why" }, `${words.spoken(type)}: ${words.spoken(reason)}`)));
}

const title = ({ gallery: name, source_model: source, target_model: target }) => `${name}: ${source} → ${target}`;

/** How far and how fast, as long as that says something. */
function pace({ state, progress: { fraction, items_per_second: speed, eta_seconds: eta } }) {
  return [words.percent(fraction), speed !== null && fraction > 0 && words.rate(speed), state === "running" && words.left(eta)];
}

// --- the chosen one --------------------------------------------------------------------------------------------------

export function detail(upgrade, { failures, refused, busy }) {
  if (!upgrade) return null;
  const { id, progress, conditions, error } = upgrade;
  return el("article", { class: "card", "data-key": id, "aria-labelledby": "chosen-title" },
    el("div", { class: "ends" },
      el("h3", { id: "chosen-title", tabindex: -1 }, title(upgrade)),
      badge(upgrade, { role: "status", "aria-live": "polite" })),
    bar(upgrade, "Progress of the chosen upgrade", "large"),
    facts([
      ...pace(upgrade),
      `${words.count(progress.items_done)} of ${words.counted(progress.items_total, "item")}`,
      `${words.count(progress.segments_done)} of ${words.counted(progress.segments_total, "segment")}`,
    ], "facts"),
    conditions.map(condition),
    error && !conditions.some((each) => each.detail === error) && problem(error),
    el("div", { class: "row", role: "group", "aria-label": "What can be done", tabindex: -1, "data-key": "verbs" }, verbs(upgrade).map((verb) => button(verb, busy))),
    refused?.id === id && problem(`${words.spoken(refused.verb)} was refused: ${refused.detail}`, { role: "alert", "data-key": "refused" }),
    el("h4", null, "Quality"), quality(upgrade),
    failures.length > 0 && [el("h4", null, "Failed segments"), failed(failures, progress.segments_failed)],
    el("h4", null, "Settings"), settings(upgrade),
    checks(upgrade.report.checks));
}

const condition = ({ type, reason, since, detail: said }) =>
  el("div", { class: "note", "data-key": `${type} ${reason}` },
    el("b", null, words.spoken(type)), ` – ${words.spoken(reason)}, since ${words.clock(since)}`, el("p", null, said));

const verbs = (upgrade) => Object.keys(VERBS).filter((verb) => upgrade.allowed.includes(verb) && isOfUse(verb, upgrade));

/** The service takes a retry before anything failed, too; then it does nothing. */
const isOfUse = (verb, { state, progress }) => verb !== "retry" || state === "failed" || progress.segments_failed > 0;

const button = (verb, busy) =>
  el("button", {
    type: "button", class: verb === "finalize" || verb === "cancel" ? "danger" : null,
    "data-key": verb, "data-action": "verb", "data-verb": verb, "aria-disabled": busy ? "true" : null, // disabled would lose the focus
  }, VERBS[verb]);

function quality(upgrade) {
  const { quality: found, gallery: name, source_model: source, target_model: target } = upgrade;
  const kinds = [found.before, found.now, found.expected_after];
  const rows = [...words.MEASURES, OVERLAP].filter((measure) => kinds.some((kind) => words.isNumber(kind?.[measure.name])));
  if (!rows.length) {
    const add = code(`PUT /galleries/${name}/probes`);
    return hint("Nothing to measure with. Add probe queries, and the next upgrade is measured: ", add);
  }
  const { probes, judged } = kinds.find(Boolean);
  const charts = words.MEASURES.map((measure) => chart(measure, found)).filter(Boolean);
  return el("div", null,
    verdict(upgrade, "large"),
    el("p", { class: "quiet" }, `By ${words.count(probes)} probe queries, ${words.count(judged)} of them with known relevant items.`),
    table(
      ["", ["Before", small(source)], ["Now", small(target)], ["Expected", small(target)]],
      rows.map(({ name: measure, label }) => [label, ...kinds.map((kind) => words.share(kind?.[measure]))])),
    charts.length > 0 && [el("div", { class: "charts" }, charts), legend()],
    found.by_progress.length > 0 && el("details", { "data-key": "points" },
      el("summary", null, "Quality over progress as a table"),
      table(
        ["Progress", ...words.MEASURES.map(({ label }) => label)],
        found.by_progress.map((at) => [words.percent(at.fraction), ...words.MEASURES.map(({ name: measure }) => words.share(at[measure]))]))));
}

const legend = () =>
  facts([["now", "now, over progress"], ["before", "before"], ["expected", "expected after"]].map(
    ([kind, said]) => [el("i", { class: `line ${kind}` }), said]));

const failed = (failures, total) => [
  table(
    ["Segment", "Items", "Attempts", "Error"],
    failures.map(({ segment, items, attempts, error }) => [segment, words.count(items), attempts, error ?? "–"]), "last-text"),
  total > failures.length && el("p", { class: "quiet" }, `These are the first ${failures.length} of ${words.count(total)}.`),
];

function settings(upgrade) {
  const { finished_at: finished, finalize_frees: frees } = upgrade;
  const rows = [
    ["Transformation", upgrade.transformation],
    ["Cutover", upgrade.cutover],
    ["Order", words.spoken(upgrade.order)],
    ["Throttle", words.throttle(upgrade.throttle)],
    ["Gate", words.gate(upgrade.gate)],
    ["Missing side-information", upgrade.on_missing_side_information],
    ["Contradicting items", upgrade.on_contradicting_items],
    ["Created", words.clock(upgrade.created_at)],
    ["Finished", finished && words.clock(finished)],
    ["Finalize frees", words.isNumber(frees) && words.bytes(frees)],
    ["Id", upgrade.id],
  ];
  const said = rows.filter(([, value]) => value);
  return el("dl", null, said.map(([name, value]) => el("div", { "data-key": name }, el("dt", null, name), el("dd", null, value))));
}

function checks(found) {
  if (!found?.length) return null;
  const passed = found.filter((each) => each.passed).length;
  return el("details", { "data-key": "checks" },
    el("summary", null, `Checks before the first write: ${passed} of ${found.length} passed`),
    el("ul", { class: "plain" }, found.map((each) =>
      el("li", { class: `tone ${each.passed ? "good" : "bad"}` }, `${words.spoken(each.check)}: ${each.detail}`))));
}

// --- before something that cannot be undone --------------------------------------------------------------------------

export function question({ gallery: name, source_model: source, finalize_frees: frees }, verb) {
  const freed = words.isNumber(frees) ? `, which frees ${words.bytes(frees)}` : "";
  return {
    finalize: {
      title: `Finalize the upgrade of ${name}?`, yes: "Finalize",
      text: `The vectors of ${source} are deleted${freed}. After that there is no way back, and queries of ${source} are ` +
        "answered only if a backward transformation serves them.",
    },
    cancel: {
      title: `Cancel the upgrade of ${name}?`, yes: "Cancel the upgrade", no: "Keep it",
      text: "What it made so far is dropped, no item is. A later upgrade begins anew.",
    },
    rollback: {
      title: `Roll back the upgrade of ${name}?`, yes: "Roll back",
      text: `The gallery goes back to ${source}, byte for byte. What the upgrade made is dropped; going forward again takes a ` +
        "new upgrade.",
    },
  }[verb];
}

// --- pieces ----------------------------------------------------------------------------------------------------------

const width = (fraction) => `${Math.min(100, fraction * 100).toFixed(2)}%`;
const code = (text) => el("code", null, text);
const small = (text) => el("small", null, text);
const hint = (...said) => el("p", { class: "hint" }, said);
const reading = () => el("p", { class: "quiet" }, "Reading…");
const problem = (text, more = {}) => el("p", { class: "problem", ...more }, text);
const facts = (said, kind = "quiet facts") => el("p", { class: kind }, said.filter(Boolean).map((fact) => el("span", null, fact)));

const badge = ({ state, dry_run: dry }, more = {}) =>
  el("span", { class: `badge ${TONES[state] ?? "busy"}`, ...more }, words.spoken(state) + (dry ? ", dry run" : ""));

function verdict(upgrade, size = "") {
  const told = words.verdict(upgrade);
  return told && el("p", { class: `tone ${told.tone} ${size}` }, told.text);
}

const bar = ({ state, progress: { fraction } }, label, size = "") =>
  el("div", {
    class: `bar ${size} ${words.UNDONE.has(state) ? "undone" : ""}`, role: "progressbar", "aria-label": label,
    "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.floor(fraction * 100), "aria-valuetext": words.percent(fraction),
  }, el("i", { class: "done", width: width(fraction) }));

const table = (heads, rows, kind = "") =>
  el("div", { class: `scroll ${kind}` }, el("table", null,
    el("thead", null, el("tr", null, heads.map((head) => (head ? el("th", { scope: "col" }, head) : el("td"))))),
    el("tbody", null, rows.map(([head, ...cells]) =>
      el("tr", null, el("th", { scope: "row" }, head), cells.map((cell) => el("td", null, cell)))))));
