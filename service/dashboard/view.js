// What a person sees of what was read: documents in, elements out. Pure.

import { chart } from "./chart.js";
import { el } from "./dom.js";
import * as words from "./words.js";

const OVER = new Set(["completed", "finalized", "cancelled", "rolled_back"]);
const TONES = { completed: "good", finalized: "good", failed: "bad", paused: "warn", awaiting_cutover: "warn", cancelled: "quiet", rolled_back: "quiet" };
const VERBS = { pause: "Pause", resume: "Resume", retry: "Retry failed segments", cutover: "Cut over", cancel: "Cancel…", rollback: "Roll back…", finalize: "Finalize…" };

export const isActive = (upgrade) => !OVER.has(upgrade.state);

// --- galleries -------------------------------------------------------------------------------------------------------

export function galleries({ galleries: found, trouble }, upgrades) {
  if (trouble.galleries) return problem(trouble.galleries);
  if (!found) return el("p", { class: "quiet" }, "Reading…");
  if (!found.length)
    return hint("No gallery yet. Register a model with ", code("POST /models"), ", then create one: ", code('POST /galleries {"name": "photos", "model": "my-model"}'));
  return el("div", { class: "cards" }, found.map((each) => gallery(each, upgrades.find(({ gallery }) => gallery === each.name))));
}

function gallery(found, newest) {
  const side = found.side_information.items;
  const facts = [words.counted(found.items, "item"), words.counted(found.segments, "segment"), `version ${words.count(found.version)}`];
  if (side) facts.push(side === found.items ? "all with side-information" : `${words.count(side)} with side-information`);
  return el("article", { class: "card", "data-key": found.name },
    el("h3", null, found.name),
    el("p", { class: "model" }, "Model ", el("b", null, found.model)),
    newest && lately(newest),
    found.items === 0
      ? hint("Empty. Send items: ", code(`POST /galleries/${found.name}/items`))
      : el("ul", { class: "plain columns", "aria-label": "Vectors by model" }, found.columns.map((each) => column(each, found.items))),
    el("p", { class: "quiet" }, facts.join(" · ")));
}

/** The gallery's newest upgrade in one line, so that the first look answers: how far, and is it better? */
function lately(upgrade) {
  const told = words.verdict(upgrade);
  const quality = told && el("p", { class: `tone ${told.tone}` }, told.text);
  if (isActive(upgrade))
    return el("div", null, el("p", null, "Upgrade to ", el("b", null, upgrade.target_model), " ", badge(upgrade)), bar(upgrade, `Upgrade of ${upgrade.gallery}`), quality);
  if (upgrade.dry_run || !["completed", "finalized"].includes(upgrade.state)) return null;
  return el("div", null, el("p", null, "Upgraded from ", el("b", null, upgrade.source_model), " ", words.ago(upgrade.finished_at ?? upgrade.created_at)), quality);
}

function column({ model, native_items: native, derived_items: derived, bytes, index }, items) {
  const recall = index.recall_at_10;
  const facts = [
    native > 0 && [el("i", { class: "swatch native" }), `${words.count(native)} native`],
    derived > 0 && [el("i", { class: "swatch derived" }), `${words.count(derived)} derived`],
    index.kind === "flat" ? "exact search" : `index ${index.kind}`,
    words.isNumber(recall) && `recall@10 ${words.share(recall)}`,
    words.bytes(bytes),
  ].filter(Boolean);
  const fraction = items ? (native + derived) / items : 0;
  return el("li", { "data-key": model },
    el("div", { class: "ends" }, el("span", null, model), el("b", null, words.percent(fraction))),
    el("div", { class: "bar", role: "img", "aria-label": `${model}: ${words.count(native)} native and ${words.count(derived)} derived vectors for ${words.counted(items, "item")}` },
      el("i", { class: "native", width: width(native / items) }), el("i", { class: "derived", width: width(derived / items) })),
    el("p", { class: "quiet facts" }, facts.map((fact) => el("span", null, fact))));
}

// --- upgrades --------------------------------------------------------------------------------------------------------

export function upgrades({ trouble, token, galleries }, found, chosen) {
  if (trouble.upgrades) return problem(trouble.upgrades);
  if (!found) return el("p", { class: "quiet" }, "Reading…");
  if (!found.length) {
    const name = galleries?.[0]?.name ?? "photos";
    return hint("No upgrade yet. Register the new model and a transformation to it, then start one: ", code(`POST /admin/upgrades {"gallery": "${name}", "target_model": "my-new-model"}`));
  }
  return [
    el("ol", { class: "plain", "aria-label": "Upgrades, the newest first" }, found.map((each) => row(each, each === chosen))),
    token && el("button", { type: "button", "data-action": "older", "data-key": "older" }, "Show older ones"),
  ];
}

function row(upgrade, isChosen) {
  const told = words.verdict(upgrade);
  return el("li", { class: `card row-card${isChosen ? " chosen" : ""}`, "data-key": upgrade.id },
    el("div", { class: "ends" },
      el("button", { type: "button", class: "link", "data-action": "choose", "data-id": upgrade.id, "aria-controls": "chosen", "aria-pressed": String(isChosen) }, title(upgrade)),
      badge(upgrade)),
    bar(upgrade, `Progress of ${upgrade.gallery} to ${upgrade.target_model}`),
    el("p", { class: "quiet facts" }, [...pace(upgrade), words.ago(upgrade.created_at)].map((fact) => el("span", null, fact))),
    told && el("p", { class: `tone ${told.tone}` }, told.text),
    upgrade.conditions.map((each) => el("p", { class: "why" }, `${words.spoken(each.type)}: ${words.spoken(each.reason)}`)));
}

const title = ({ gallery, source_model, target_model }) => `${gallery}: ${source_model} → ${target_model}`;

const badge = (upgrade, live = {}) =>
  el("span", { class: `badge ${TONES[upgrade.state] ?? "busy"}`, ...live }, words.spoken(upgrade.state) + (upgrade.dry_run ? ", dry run" : ""));

/** How far and how fast, as long as that says something. */
function pace({ state, progress, transformation }) {
  const { fraction, items_per_second, eta_seconds } = progress;
  const speed = items_per_second !== null && fraction > 0 && words.rate(items_per_second);
  return [transformation, words.percent(fraction), speed, state === "running" && words.left(eta_seconds)].filter(Boolean);
}

// --- the chosen one --------------------------------------------------------------------------------------------------

export function detail(upgrade, { failures, refused, busy }) {
  if (!upgrade) return null;
  const { progress } = upgrade;
  return el("article", { class: "card", "data-key": upgrade.id, "aria-labelledby": "chosen-title" },
    el("div", { class: "ends" }, el("h3", { id: "chosen-title" }, title(upgrade)), badge(upgrade, { role: "status", "aria-live": "polite" })),
    bar(upgrade, "Progress of the chosen upgrade", "large"),
    el("p", { class: "facts" }, [...pace(upgrade).slice(1), `${words.count(progress.items_done)} of ${words.counted(progress.items_total, "item")}`, `${words.count(progress.segments_done)} of ${words.counted(progress.segments_total, "segment")}`].map((fact) => el("span", null, fact))),
    upgrade.conditions.map((each) => el("div", { class: "note", "data-key": `${each.type} ${each.reason}` },
      el("b", null, words.spoken(each.type)), ` – ${words.spoken(each.reason)}, since ${words.clock(each.since)}`, el("p", null, each.detail))),
    upgrade.error && !upgrade.conditions.some(({ detail }) => detail === upgrade.error) && el("p", { class: "problem" }, upgrade.error),
    el("div", { class: "row", role: "group", "aria-label": "What can be done" }, upgrade.allowed.map((verb) => el("button", {
      type: "button", class: verb === "finalize" || verb === "cancel" ? "danger" : null, "data-key": verb, "data-action": "verb", "data-verb": verb,
      "aria-disabled": busy ? "true" : null }, VERBS[verb] ?? words.spoken(verb)))),
    refused?.id === upgrade.id && el("p", { class: "problem", role: "alert", "data-key": "refused" }, `${words.spoken(refused.verb)} was refused: ${refused.detail}`),
    el("h4", null, "Quality"), quality(upgrade),
    failures.length > 0 && [el("h4", null, "Failed segments"), failed(failures, progress.segments_failed)],
    el("h4", null, "Settings"), settings(upgrade),
    checks(upgrade.report.checks));
}

function quality(upgrade) {
  const { quality: found, gallery, source_model, target_model } = upgrade;
  const measures = [...words.MEASURES, { name: "overlap_at_10", label: "overlap@10", hint: "share of the hits of before that are hits still" }];
  const kinds = [["Before", source_model, found.before], ["Now", target_model, found.now], ["Expected", target_model, found.expected_after]];
  const rows = measures.filter(({ name }) => kinds.some(([, , measured]) => words.isNumber(measured?.[name])));
  if (!rows.length) return hint("Nothing to measure with. Add probe queries, and the next upgrade is measured: ", code(`PUT /galleries/${gallery}/probes`));
  const told = words.verdict(upgrade);
  const charts = words.MEASURES.map((measure) => chart(measure, found)).filter(Boolean);
  const { probes, judged } = found.now ?? found.expected_after ?? found.before;
  return el("div", null,
    told && el("p", { class: `tone large ${told.tone}` }, told.text),
    el("p", { class: "quiet" }, `By ${words.counted(probes, "probe query", "probe queries")}, ${words.count(judged)} of them with known relevant items.`),
    el("div", { class: "scroll" }, el("table", null,
      el("thead", null, el("tr", null, el("td"), kinds.map(([when, model]) => el("th", { scope: "col" }, when, el("small", null, model))))),
      el("tbody", null, rows.map(({ name, label, hint }) => el("tr", null, el("th", { scope: "row", title: hint }, label), kinds.map(([, , measured]) => el("td", null, words.share(measured?.[name])))))))),
    charts.length > 0 && [
      el("div", { class: "charts" }, charts),
      el("p", { class: "quiet facts" }, el("span", null, el("i", { class: "line now" }), "now, over progress"), el("span", null, el("i", { class: "line before" }), "before"), el("span", null, el("i", { class: "line expected" }), "expected after"))],
    found.by_progress.length > 0 && el("details", { "data-key": "points" }, el("summary", null, "Quality over progress as a table"), points(found.by_progress)));
}

const points = (found) => el("div", { class: "scroll" }, el("table", null,
  el("thead", null, el("tr", null, ["Progress", ...words.MEASURES.map(({ label }) => label)].map((label) => el("th", { scope: "col" }, label)))),
  el("tbody", null, found.map((point) => el("tr", null, el("th", { scope: "row" }, words.percent(point.fraction)), words.MEASURES.map(({ name }) => el("td", null, words.share(point[name]))))))));

const failed = (failures, total) => el("div", { class: "scroll", "data-key": "failures" }, el("table", null,
  total > failures.length && el("caption", null, `The first ${failures.length} of ${words.count(total)}`),
  el("thead", null, el("tr", null, ["Segment", "Items", "Attempts", "Error"].map((label) => el("th", { scope: "col", class: label === "Error" ? "text" : null }, label)))),
  el("tbody", null, failures.map((each) => el("tr", null, el("th", { scope: "row" }, each.segment), el("td", null, words.count(each.items)), el("td", null, each.attempts), el("td", { class: "text" }, each.error ?? "–"))))));

function settings(upgrade) {
  const rows = [
    ["Transformation", upgrade.transformation], ["Cutover", upgrade.cutover], ["Order", words.spoken(upgrade.order)],
    ["Throttle", words.throttle(upgrade.throttle)], ["Gate", words.gate(upgrade.gate)], ["Missing side-information", upgrade.on_missing_side_information],
    ["Created", words.clock(upgrade.created_at)], ["Finished", upgrade.finished_at && words.clock(upgrade.finished_at)],
    ["Finalize frees", words.isNumber(upgrade.finalize_frees) && words.bytes(upgrade.finalize_frees)], ["Id", upgrade.id],
  ];
  return el("dl", null, rows.filter(([, said]) => said).map(([name, said]) => el("div", { "data-key": name }, el("dt", null, name), el("dd", null, said))));
}

const checks = (found) => found?.length > 0 && el("details", { "data-key": "checks" },
  el("summary", null, `Checks before the first write: ${words.count(found.filter(({ passed }) => passed).length)} of ${words.count(found.length)} passed`),
  el("ul", { class: "plain" }, found.map((each) => el("li", { class: `tone ${each.passed ? "good" : "bad"}` }, `${words.spoken(each.check)}: ${each.detail}`))));

// --- before something that cannot be undone --------------------------------------------------------------------------

export function question(upgrade, verb) {
  const { finalize_frees: frees, source_model: source, gallery } = upgrade;
  return {
    finalize: { yes: "Finalize", title: `Finalize the upgrade of ${gallery}?`, text: `The vectors of ${source} are deleted${words.isNumber(frees) ? `, which frees ${words.bytes(frees)}` : ""}. After that there is no way back, and queries of ${source} are answered only if a backward transformation serves them.` },
    cancel: { yes: "Cancel the upgrade", no: "Keep it", title: `Cancel the upgrade of ${gallery}?`, text: "What it made so far is dropped, no item is. A later upgrade begins anew." },
    rollback: { yes: "Roll back", title: `Roll back the upgrade of ${gallery}?`, text: `The gallery goes back to ${source}, byte for byte. What the upgrade made is dropped; going forward again takes a new upgrade.` },
  }[verb];
}

// --- pieces ----------------------------------------------------------------------------------------------------------

const width = (fraction) => `${Math.min(100, fraction * 100).toFixed(2)}%`;
const code = (text) => el("code", null, text);
const hint = (...said) => el("p", { class: "hint" }, said);
const problem = (text) => el("p", { class: "problem" }, text);

const bar = ({ state, progress: { fraction } }, label, size = "") => el("div", {
  class: `bar ${size} ${words.UNDONE.has(state) ? "undone" : ""}`, role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100,
  "aria-valuenow": Math.floor(fraction * 100), "aria-valuetext": words.percent(fraction) }, el("i", { class: "done", width: width(fraction) }));

/** Of the tab: how far it is, for whoever looks at another one. */
export const tab = (upgrade) => (upgrade && isActive(upgrade) ? `${words.percent(upgrade.progress.fraction)} ${upgrade.gallery} – Forwardfill` : "Forwardfill");
