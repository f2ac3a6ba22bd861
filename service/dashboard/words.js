// Numbers, times and settings in words. Pure.

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export const count = (n) => whole.format(n);
export const counted = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;
export const spoken = (word) => word.replaceAll("_", " ");

/** Never 100 % before all is done, and never 0 % once something is. */
export function percent(fraction) {
  if (fraction > 0 && fraction < 0.001) return "< 0.1 %";
  const shown = fraction < 1 ? Math.min(fraction * 100, 99.9) : fraction * 100;
  return `${shown < 10 || shown > 99 ? round(shown, 1) : Math.round(shown)} %`;
}

export const share = (value) => (value === null || value === undefined ? "–" : `${(value * 100).toFixed(1)} %`);

export function bytes(n) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  const power = n < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log2(n) / 10));
  return `${power ? short.format(n / 1024 ** power) : count(n)} ${units[power]}`;
}

export const rate = (perSecond) => `${perSecond < 100 ? short.format(perSecond) : count(Math.round(perSecond))} items/s`;

/** How long, as a person would say it. */
export function duration(seconds) {
  if (seconds < 1) return "a moment";
  const [size, unit] = [[86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]].find(([least]) => seconds >= least * 0.95);
  return counted(Math.max(1, Math.round(seconds / size)), unit);
}

export const left = (seconds) => (seconds === null ? "time left unknown" : seconds < 1 ? "almost done" : `about ${duration(seconds)} left`);

export function ago(time, now = Date.now()) {
  const seconds = (now - Date.parse(time)) / 1000;
  return seconds < 5 ? "just now" : `${duration(seconds)} ago`;
}

export const clock = (time) => new Date(time).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" });

export function throttle(limits) {
  const said = [
    limits.items_per_second && `at most ${rate(limits.items_per_second)}`,
    limits.duty_cycle && `works ${percent(limits.duty_cycle)} of the time`,
    limits.max_search_p99_ms && `waits while the slowest hundredth of searches takes over ${short.format(limits.max_search_p99_ms)} ms`,
  ].filter(Boolean);
  return said.join("; ") || "none, full speed";
}

const LIMITS = {
  min_cmc1: (v) => `CMC-1 at least ${share(v)}`,
  min_recall_at_10: (v) => `recall@10 at least ${share(v)}`,
  min_map: (v) => `mAP at least ${share(v)}`,
  min_overlap_at_10: (v) => `overlap@10 at least ${share(v)}`,
  max_negative_flips: (v) => `at most ${counted(v, "negative flip")}`,
  max_cmc1_drop: (v) => `CMC-1 falls by at most ${points(v)}`,
  max_recall_drop: (v) => `recall@10 falls by at most ${points(v)}`,
  max_map_drop: (v) => `mAP falls by at most ${points(v)}`,
};

export const gate = (limits) =>
  Object.entries(limits).map(([name, value]) => LIMITS[name]?.(value) ?? `${spoken(name)} ${value}`).join("; ") || "none";

export const points = (difference) => `${(Math.abs(difference) * 100).toFixed(1)} points`;

/** What probes say of an upgrade, in one sentence; null where they say nothing, or nothing of it is left. */
export function verdict({ quality: { before, now, expected_after }, state, dry_run, started_at }) {
  if (UNDONE.has(state)) return null;
  const begun = started_at && !dry_run;
  const [after, when] = begun && now ? [now, "is"] : [expected_after, "is expected to be"];
  const measure = MEASURES.find(({ name }) => isNumber(before?.[name]) && isNumber(after?.[name]));
  if (!measure) return null;
  const difference = after[measure.name] - before[measure.name];
  const same = Math.abs(difference) < 0.0005;
  const how = same ? "as good as before" : `${points(difference)} ${difference > 0 ? "better" : "worse"} than before`;
  return { tone: same ? "same" : difference > 0 ? "good" : "bad", text: `${measure.label} ${when} ${how}` };
}

/** Nothing of what they did is left. */
export const UNDONE = new Set(["cancelled", "rolled_back"]);

/** The measures that are compared; overlap has no before. */
export const MEASURES = [
  { name: "cmc1", label: "CMC-1", hint: "share of the probes whose first hit is relevant" },
  { name: "recall_at_10", label: "recall@10", hint: "share of the relevant items among ten hits" },
  { name: "map", label: "mAP", hint: "mean average precision over ten hits" },
];

export const isNumber = (value) => typeof value === "number";

const round = (value, digits) => String(Number(value.toFixed(digits)));
