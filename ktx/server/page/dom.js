// Creates and patches elements. Text becomes text nodes; nothing here parses markup.

/** Children may be arrays, because a call with a hundred thousand arguments fails. */
function fill(node, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}

/** Creates an HTML element. A function among the properties is an event listener, any other value an attribute. */
export function make(name, properties = {}, ...children) {
  return fill(document.createElement(name), properties, children);
}

/** Creates an SVG element; arguments as for `make`. */
export function draw(name, properties = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), properties, children);
}

/** A plain button; `more` are further properties. */
export function button(label, click, more = {}) {
  return make("button", { type: "button", class: "quiet", click, ...more }, label);
}

export const byId = (id) => document.getElementById(id);

/** Changes `old` to equal `fresh` with few edits: nodes that stay retain their selection, focus and scroll position. */
export function patch(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName || !sameAttributes(old, fresh)) {
    old.replaceWith(fresh);
    return fresh;
  }
  if (old.nodeType === Node.TEXT_NODE) {
    if (fresh.data !== old.data) {
      if (fresh.data.startsWith(old.data)) old.appendData(fresh.data.slice(old.data.length));
      else old.data = fresh.data;
    }
    return old;
  }
  const [before, after] = [[...old.childNodes], [...fresh.childNodes]];
  after.forEach((child, i) => (i < before.length ? patch(before[i], child) : old.append(child)));
  before.slice(after.length).forEach((child) => child.remove());
  return old;
}

function sameAttributes(a, b) {
  if (a.nodeType !== Node.ELEMENT_NODE) return true;
  return a.attributes.length === b.attributes.length && [...a.attributes].every(({ name, value }) => b.getAttribute(name) === value);
}

/** Copies text to the clipboard, also on pages without TLS, where browsers have no clipboard API. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = make("textarea", { class: "sr-only", "aria-label": "Text to copy" });
  const focused = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  focused?.focus();
  if (!done) throw new Error("the browser denied access to the clipboard");
}
