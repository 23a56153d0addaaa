// Where each module lives and how many bytes it has: a picture of areas, and a table of it by layer.

import { draw, make } from "./dom.js";
import { bytes, count, percent, ranges } from "./format.js";

const HEIGHT = 240; // pixels of the picture
const COLOURS = 8; // classes c0 to c7 of the style sheet

export class Modules {
  constructor() {
    this.picture = make("div", { class: "areas" });
    this.words = make("p", { class: "below" });
    this.table = make("tbody");
    const heads = ["Layers", "Operator", "Device", "Types", "Modules", "Bytes"].map((name, i) => make("th", { scope: "col", class: i > 3 ? "right" : null }, name));
    const table = make("table", {}, make("caption", { class: "unseen" }, "Modules by layer"), make("thead", {}, make("tr", {}, ...heads)), this.table);
    this.body = make("div", {}, this.picture, make("div", { class: "table" }, table));
    this.element = make("section", { class: "modules", "aria-labelledby": "modules-title" }, make("h3", { id: "modules-title" }, "Where the weights are"), this.words, this.body);
    this.drawn = ""; // what the picture and the table show
  }

  show({ modules }) {
    const known = Boolean(modules?.length);
    this.body.hidden = !known;
    if (!known) {
      this.words.textContent = "This backend has no modules to show.";
      return;
    }
    const width = Math.max(200, this.element.clientWidth);
    const shown = `${width} ${modules.length} ${modules.map((one) => one.bytes + one.device).join()}`;
    if (shown === this.drawn) return;
    this.drawn = shown;
    const devices = byDevice(modules);
    const total = devices.reduce((sum, device) => sum + device.bytes, 0);
    this.words.textContent = `${bytes(total)} in ${count(modules.length)} modules: ${devices.map((device) => `${bytes(device.bytes)} on ${device.name}`).join(", ")}.`;
    this.picture.replaceChildren(areas(devices, total, width, this.words.textContent));
    this.table.replaceChildren(...rows(groups(modules)));
  }
}

const sum = (items) => items.reduce((all, one) => all + (one.bytes ?? 0), 0);

function grouped(items, name) {
  const found = new Map();
  for (const one of items) found.set(name(one), [...(found.get(name(one)) ?? []), one]);
  return [...found];
}

const largestFirst = (items) => items.sort((a, b) => b.bytes - a.bytes);

/** [{name, bytes, parts: [{name, bytes, modules, colour}]}], each list with its largest first; colours go by the operator. */
function byDevice(modules) {
  const operators = largestFirst(grouped(modules, (one) => one.operator).map(([name, own]) => ({ name, bytes: sum(own) })));
  const colour = (name) => Math.min(COLOURS - 1, operators.findIndex((one) => one.name === name));
  const parts = (own) => largestFirst(grouped(own, (one) => one.operator).map(([name, some]) => ({ name, bytes: sum(some), modules: some.length, colour: colour(name) })));
  return largestFirst(grouped(modules, (one) => one.device ?? "an unknown device").map(([name, own]) => ({ name, bytes: sum(own), parts: parts(own) })));
}

function areas(devices, total, width, title) {
  const picture = draw("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: "img", "aria-label": title });
  let left = 0;
  for (const device of devices.filter((one) => one.bytes)) {
    const wide = (width * device.bytes) / total;
    const parts = device.parts.filter((one) => one.bytes);
    squarified(parts, left, 0, wide, HEIGHT).forEach((box, i) => picture.append(area(parts[i], box, device, total)));
    left += wide;
  }
  return picture;
}

function area({ name, bytes: size, modules, colour }, [x, y, wide, high], device, total) {
  const told = `${name} on ${device.name}: ${bytes(size)} (${percent(size / total)}) in ${count(modules)} modules`;
  const label = (text, line) => draw("text", { x: x + 9, y: y + 20 + 17 * line, class: line ? "small" : "name" }, text);
  const fits = wide > 8 * Math.max(name.length, 8) + 14 && high > 30;
  return draw(
    "g",
    { class: `c${colour}` },
    draw("rect", { x: x + 1, y: y + 1, width: Math.max(0, wide - 2), height: Math.max(0, high - 2), rx: 3 }, draw("title", {}, told)),
    fits ? label(name, 0) : null,
    fits && high > 46 ? label(`${bytes(size)}, ${device.name}`, 1) : null,
  );
}

/** Boxes [x, y, width, height] whose areas are as the bytes of `items`, none much longer than it is wide. */
export function squarified(items, x, y, wide, high) {
  const boxes = [];
  let left = sum(items);
  for (let at = 0; at < items.length; ) {
    const short = Math.min(wide, high);
    const scale = (wide * high) / left;
    let end = at + 1;
    while (end < items.length && worst(items.slice(at, end + 1), scale, short) <= worst(items.slice(at, end), scale, short)) end += 1;
    const row = items.slice(at, end);
    const thick = (sum(row) * scale) / short;
    let along = 0;
    for (const one of row) {
      const long = (one.bytes * scale) / thick;
      boxes.push(wide >= high ? [x, y + along, thick, long] : [x + along, y, long, thick]);
      along += long;
    }
    if (wide >= high) [x, wide] = [x + thick, wide - thick];
    else [y, high] = [y + thick, high - thick];
    left -= sum(row);
    at = end;
  }
  return boxes;
}

/** The longest side over the shortest in a row. */
function worst(row, scale, short) {
  const thick = (sum(row) * scale) / short;
  return Math.max(...row.map((one) => Math.max((one.bytes * scale) / thick ** 2, thick ** 2 / (one.bytes * scale))));
}

/** [{layers, parts: [{operator, device, types, modules, bytes}]}]: layers that are built alike stand together. */
function groups(modules) {
  const layers = grouped(modules, (one) => one.layer ?? -1).map(([layer, own]) => {
    const parts = grouped(own, (one) => `${one.operator}\n${one.device}\n${one.types}`).map(([, some]) => ({ ...some[0], modules: some.length, bytes: sum(some) }));
    return { layer, parts: largestFirst(parts) };
  });
  const alike = grouped(layers, ({ layer, parts }) => `${layer < 0} ${parts.map((one) => [one.operator, one.device, one.types, one.modules, one.bytes])}`);
  return alike.map(([, same]) => ({ layers: same.map((one) => one.layer), parts: same[0].parts }));
}

function rows(found) {
  return found.flatMap(({ layers, parts }) =>
    parts.map((part, i) => {
      const each = layers.length > 1 ? ` × ${layers.length}` : "";
      const head = make("th", { scope: "rowgroup", rowspan: parts.length }, layers[0] < 0 ? "outside" : ranges(layers), make("span", { class: "below" }, `${bytes(sum(parts))}${each}`));
      const numbers = [make("td", { class: "right" }, count(part.modules)), make("td", { class: "right" }, bytes(part.bytes))];
      return make("tr", { class: i ? null : "first" }, i ? null : head, ...[part.operator, part.device ?? "", part.types ?? ""].map((text) => make("td", {}, text)), ...numbers);
    }),
  );
}
