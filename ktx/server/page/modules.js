// Weight placement: a treemap by device and operator, and a table by layer.

import { draw, make } from "./dom.js";
import { bytes, count, percent, ranges } from "./format.js";

const HEIGHT_PX = 240; // of the treemap
const NUM_COLORS = 8; // CSS classes c0 to c7

export class Modules {
  constructor() {
    this.treemap = make("div", { class: "areas" });
    this.summary = make("p", { class: "below" });
    this.table = make("tbody");
    const heads = ["Layers", "Operator", "Device", "Types", "Modules", "Bytes"].map((name, i) => make("th", { scope: "col", class: i > 3 ? "right" : null }, name));
    const table = make("table", {}, make("caption", { class: "sr-only" }, "Modules by layer"), make("thead", {}, make("tr", {}, ...heads)), this.table);
    this.body = make("div", {}, this.treemap, make("div", { class: "table" }, table));
    this.element = make("section", { class: "modules", "aria-labelledby": "modules-title" }, make("h3", { id: "modules-title" }, "Weight placement"), this.summary, this.body);
    this.drawn = "";
  }

  show({ modules }) {
    const known = Boolean(modules?.length);
    this.body.hidden = !known;
    if (!known) {
      this.summary.textContent = "This backend has no modules to show.";
      return;
    }
    const width = Math.max(200, this.element.clientWidth);
    const drawn = `${width} ${modules.length} ${modules.map((item) => item.bytes + item.device).join()}`;
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const devices = byDevice(modules);
    const total = devices.reduce((sum, device) => sum + device.bytes, 0);
    this.summary.textContent = `${bytes(total)} in ${count(modules.length)} modules: ${devices.map((device) => `${bytes(device.bytes)} on ${device.name}`).join(", ")}.`;
    this.treemap.replaceChildren(treemap(devices, total, width, this.summary.textContent));
    this.table.replaceChildren(...rows(groupLayers(modules)));
  }
}

const sum = (items) => items.reduce((total, item) => total + (item.bytes ?? 0), 0);

function groupBy(items, key) {
  const groups = new Map();
  for (const item of items) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return [...groups];
}

const largestFirst = (items) => items.sort((a, b) => b.bytes - a.bytes);

/** [{name, bytes, parts: [{name, bytes, modules, color}]}], sorted by size; the color depends on the operator. */
function byDevice(modules) {
  const operators = largestFirst(groupBy(modules, (item) => item.operator).map(([name, own]) => ({ name, bytes: sum(own) })));
  const color = (name) => Math.min(NUM_COLORS - 1, operators.findIndex((item) => item.name === name));
  const parts = (own) => largestFirst(groupBy(own, (item) => item.operator).map(([name, some]) => ({ name, bytes: sum(some), modules: some.length, color: color(name) })));
  return largestFirst(groupBy(modules, (item) => item.device ?? "an unknown device").map(([name, own]) => ({ name, bytes: sum(own), parts: parts(own) })));
}

function treemap(devices, total, width, title) {
  const svg = draw("svg", { viewBox: `0 0 ${width} ${HEIGHT_PX}`, height: HEIGHT_PX, role: "img", "aria-label": title });
  let left = 0;
  for (const device of devices.filter((item) => item.bytes)) {
    const deviceWidth = (width * device.bytes) / total;
    const parts = device.parts.filter((item) => item.bytes);
    squarify(parts, left, 0, deviceWidth, HEIGHT_PX).forEach((box, i) => svg.append(area(parts[i], box, device, total)));
    left += deviceWidth;
  }
  return svg;
}

function area({ name, bytes: size, modules, color }, [x, y, width, height], device, total) {
  const title = `${name} on ${device.name}: ${bytes(size)} (${percent(size / total)}) in ${count(modules)} modules`;
  const label = (text, line) => draw("text", { x: x + 9, y: y + 20 + 17 * line, class: line ? "small" : "name" }, text);
  const fits = width > 8 * Math.max(name.length, 8) + 14 && height > 30;
  return draw(
    "g",
    { class: `c${color}` },
    draw("rect", { x: x + 1, y: y + 1, width: Math.max(0, width - 2), height: Math.max(0, height - 2), rx: 3 }, draw("title", {}, title)),
    fits ? label(name, 0) : null,
    fits && height > 46 ? label(`${bytes(size)}, ${device.name}`, 1) : null,
  );
}

/** Squarified treemap: a box [x, y, width, height] per item, its area proportional to the bytes. */
function squarify(items, x, y, width, height) {
  const boxes = [];
  let left = sum(items); // bytes not placed yet
  for (let at = 0; at < items.length; ) {
    const side = Math.min(width, height);
    const scale = (width * height) / left;
    let end = at + 1;
    while (end < items.length && worstRatio(items.slice(at, end + 1), scale, side) <= worstRatio(items.slice(at, end), scale, side)) end += 1;
    const row = items.slice(at, end);
    const thickness = (sum(row) * scale) / side;
    let offset = 0;
    for (const item of row) {
      const length = (item.bytes * scale) / thickness;
      boxes.push(width >= height ? [x, y + offset, thickness, length] : [x + offset, y, length, thickness]);
      offset += length;
    }
    if (width >= height) [x, width] = [x + thickness, width - thickness];
    else [y, height] = [y + thickness, height - thickness];
    left -= sum(row);
    at = end;
  }
  return boxes;
}

/** The largest aspect ratio in a row of boxes. */
function worstRatio(row, scale, side) {
  const square = ((sum(row) * scale) / side) ** 2;
  return Math.max(...row.map((item) => Math.max((item.bytes * scale) / square, square / (item.bytes * scale))));
}

/** [{layers, parts: [{operator, device, types, modules, bytes}]}]: identical layers share an entry. */
function groupLayers(modules) {
  const layers = groupBy(modules, (item) => item.layer ?? -1).map(([layer, own]) => {
    const parts = groupBy(own, (item) => `${item.operator}\n${item.device}\n${item.types}`).map(([, some]) => ({ ...some[0], modules: some.length, bytes: sum(some) }));
    return { layer, parts: largestFirst(parts) };
  });
  const identical = groupBy(layers, ({ layer, parts }) => `${layer < 0} ${parts.map((item) => [item.operator, item.device, item.types, item.modules, item.bytes])}`);
  return identical.map(([, same]) => ({ layers: same.map((item) => item.layer), parts: same[0].parts }));
}

function rows(groups) {
  return groups.flatMap(({ layers, parts }) =>
    parts.map((part, i) => {
      const times = layers.length > 1 ? ` × ${layers.length}` : "";
      const head = make("th", { scope: "rowgroup", rowspan: parts.length }, layers[0] < 0 ? "outside layers" : ranges(layers), make("span", { class: "below" }, `${bytes(sum(parts))}${times}`));
      const sizes = [make("td", { class: "right" }, count(part.modules)), make("td", { class: "right" }, bytes(part.bytes))];
      return make("tr", { class: i ? null : "first" }, i ? null : head, ...[part.operator, part.device ?? "", part.types ?? ""].map((text) => make("td", {}, text)), ...sizes);
    }),
  );
}
