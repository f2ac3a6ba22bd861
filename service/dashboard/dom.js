// Elements from data, and a document that is changed only where it differs.
//
// What clients named becomes text nodes and attribute values, never markup: there is no innerHTML in these files.

const SVG = "http://www.w3.org/2000/svg";

export const el = (name, attributes, ...children) => filled(document.createElement(name), attributes, children);
export const svg = (name, attributes, ...children) => filled(document.createElementNS(SVG, name), attributes, children);

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    // The page's policy refuses style attributes; a property of the style object is no attribute to it.
    if (name === "width" && node instanceof HTMLElement) node.style.width = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Make the children of `parent` equal to `wanted`, and keep every node that can stay: with it stay the focus, what a
 * person selected or folded open, and what a screen reader has read. Nodes that may move carry a `data-key`. */
export function show(parent, ...wanted) {
  const nodes = wanted.flat(Infinity).filter(Boolean).map((node) => (node instanceof Node ? node : document.createTextNode(node)));
  const keys = new Set(nodes.map(keyOf).filter(Boolean));
  const kept = new Map();
  for (const child of [...parent.childNodes]) {
    const key = keyOf(child);
    if (key && !keys.has(key)) child.remove();
    else if (key) kept.set(key, child);
  }
  let at = parent.firstChild;
  for (const node of nodes) {
    const same = keyOf(node) ? kept.get(keyOf(node)) : at && !keyOf(at) && at.nodeName === node.nodeName ? at : null;
    if (!same) {
      parent.insertBefore(node, at);
      continue;
    }
    if (same === at) at = at.nextSibling;
    else parent.insertBefore(same, at);
    if (same.nodeName === node.nodeName) update(same, node);
    else same.replaceWith(node);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function update(node, wanted) {
  if (node.nodeType === Node.TEXT_NODE) {
    if (node.data !== wanted.data) node.data = wanted.data;
    return;
  }
  for (const { name } of [...node.attributes]) {
    const folded = name === "open" && node.nodeName === "DETAILS"; // that is the reader's
    if (!folded && name !== "style" && !wanted.hasAttribute(name)) node.removeAttribute(name);
  }
  for (const { name, value } of wanted.attributes) {
    if (name !== "style" && node.getAttribute(name) !== value) node.setAttribute(name, value);
  }
  if (node.style && node.style.width !== wanted.style.width) node.style.width = wanted.style.width;
  show(node, ...wanted.childNodes);
}

/** The same for the one element below `parent` that carries the key of `wanted`, if there is one. */
export function renew(parent, wanted) {
  const node = parent.querySelector(`[data-key="${CSS.escape(keyOf(wanted))}"]`);
  if (node) update(node, wanted);
}

/** Change the document, and leave the focus where it was. Where that is gone, such as a button that was pressed, it goes to what
 * it was in: a browser would begin at the top of the page again, and say nothing. */
export function keepingFocus(change) {
  const places = [document.activeElement];
  for (let at = places[0]; (at = at?.parentElement?.closest("[tabindex]")); ) places.push(at);
  change();
  if (document.activeElement !== places[0]) places.find((each) => each.isConnected)?.focus({ preventScroll: true });
}

const keyOf = (node) => node.dataset?.key;
