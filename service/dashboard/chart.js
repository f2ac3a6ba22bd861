// One measure over the progress of an upgrade: what it was before, what it is, what it is expected to become.

import { el, svg } from "./dom.js";
import { isNumber, percent, share } from "./words.js";

const WIDTH = 240; // about as many pixels as it gets, so that its letters are as large as they say
const HEIGHT = 130;
const INSIDE = { left: 46, right: 8, top: 8, bottom: 22 };

export function chart({ name, label, hint }, { before, now, expected_after, by_progress }) {
  const [was, is, will] = [before, now, expected_after].map((measures) => measures?.[name]);
  const points = by_progress.filter((point) => isNumber(point[name])).map((point) => [point.fraction, point[name]]);
  if (!points.length) return null; // the table says the same, and better
  const levels = [was, is, will, ...points.map(([, value]) => value)].filter(isNumber);
  const [low, high] = range(levels);
  const x = (fraction) => INSIDE.left + fraction * (WIDTH - INSIDE.left - INSIDE.right);
  const y = (value) => INSIDE.top + ((high - value) / (high - low)) * (HEIGHT - INSIDE.top - INSIDE.bottom);
  const level = (value, kind) => isNumber(value) && svg("path", { class: kind, d: `M${x(0)} ${y(value)}H${x(1)}` });
  const told = [[was, "before"], [is, "now"], [will, "expected after"]].filter(([value]) => isNumber(value));
  const summary = `${label} over progress: ${told.map(([value, when]) => `${when} ${share(value)}`).join(", ")}`;
  return el("figure", { class: "chart", "data-key": name },
    el("figcaption", null, el("b", null, label), ` ${hint}`),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": summary },
      [low, (low + high) / 2, high].map((value) => [
        svg("path", { class: "grid", d: `M${x(0)} ${y(value)}H${x(1)}` }),
        svg("text", { x: INSIDE.left - 6, y: y(value) + 4, "text-anchor": "end" }, tick(value, high - low)),
      ]),
      [0, 0.5, 1].map((fraction) =>
        svg("text", { x: x(fraction), y: HEIGHT - 6, "text-anchor": ["start", "middle", "end"][fraction * 2] }, percent(fraction))),
      level(was, "before"),
      level(will, "expected"),
      points.length > 1 && svg("polyline", { class: "now", points: points.map(([fraction, value]) => `${x(fraction)},${y(value)}`).join(" ") }),
      svg("circle", { class: "now", cx: x(points.at(-1)[0]), cy: y(points.at(-1)[1]), r: 3.5 })),
  );
}

/** Room above and below, within what a share can be; an axis that began at zero would flatten every difference that counts. */
function range(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const room = Math.max((most - least) * 0.15, 0.01);
  return [Math.max(0, least - room), Math.min(1, most + room)];
}

const tick = (value, span) => `${Number((value * 100).toFixed(span > 0.06 ? 0 : 1))} %`;
