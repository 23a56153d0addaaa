// Which experts are used: layers down, experts across. An expert's colour is its use over an even share of its layer.

import { make } from "./dom.js";
import { count, percent, seconds } from "./format.js";

const LEFT = 36; // pixels for the layers' numbers
const TOP = 18; // for the experts'
const SHADES = 64;

export class HeatMap {
  constructor() {
    this.canvas = make("canvas", { tabindex: 0, role: "img", "aria-describedby": "expert-read" });
    this.read = make("output", { id: "expert-read" });
    this.words = make("p", { class: "below" });
    this.nodes = make("p", { class: "below", hidden: true });
    this.most = make("span");
    this.scale = ["low", "mid", "high"].map((name) => make("span", { class: `heat-${name}` }));
    const legend = make("p", { class: "legend", "aria-hidden": "true" }, "never", make("span", { class: "ramp" }, ...this.scale), this.most);
    const choice = (value, name, chosen) => make("label", {}, make("input", { type: "radio", name: "since", value, checked: chosen, change: () => this.draw() }), ` ${name}`);
    this.choices = make("fieldset", {}, make("legend", { class: "unseen" }, "Activations"), choice("minute", "last minute", true), choice("start", "since the start", false));
    this.body = make("div", {}, this.canvas, make("div", { class: "under-map" }, this.read, legend), this.words, this.nodes);
    this.element = make("section", { class: "experts", "aria-labelledby": "experts-title" }, make("div", { class: "heading" }, make("h3", { id: "experts-title" }, "Experts"), this.choices), this.body);
    this.cursor = null; // [row, expert]
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.move(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  show(told, history) {
    this.experts = told.experts ?? null;
    this.history = history;
    this.draw();
  }

  draw() {
    const { experts } = this;
    const known = Boolean(experts?.layers?.length);
    for (const part of [this.canvas, this.choices, this.canvas.nextSibling]) part.hidden = !known;
    if (!known) {
      this.words.textContent = "No routed experts: this model has none, or this backend does not count them.";
      return;
    }
    this.table = this.chosen();
    this.totals = this.table.map((row) => row.reduce((sum, one) => sum + one, 0));
    this.paint();
    this.tell();
  }

  /** The counts that were asked for; `this.over` says of how many seconds, null being all. */
  chosen() {
    const { activations } = this.experts;
    if (this.choices.querySelector("[value=start]").checked) {
      this.over = null;
      return activations;
    }
    const [recent, over] = this.history.recent(activations, this.history.samples.at(-1).at);
    this.over = over;
    return recent;
  }

  /** Use over an even share of the layer's: 1 is even. */
  load(row, expert) {
    return this.totals[row] ? (this.table[row][expert] * this.experts.count) / this.totals[row] : 0;
  }

  paint() {
    const { canvas, table } = this;
    const across = this.experts.count;
    const width = canvas.parentElement.clientWidth;
    if (!width) return;
    const high = Math.max(6, Math.min(24, Math.floor(460 / table.length)));
    const [height, sharp] = [TOP + high * table.length, devicePixelRatio || 1];
    canvas.width = Math.round(width * sharp);
    canvas.height = Math.round(height * sharp);
    canvas.style.height = `${height}px`;
    this.cell = [(width - LEFT) / across, high];
    const pen = canvas.getContext("2d");
    pen.scale(sharp, sharp);
    const shades = this.shades();
    const most = Math.max(2, ...table.flatMap((row, i) => row.map((_, expert) => this.load(i, expert))));
    const [wide, gap] = [this.cell[0], this.cell[0] > 5 && high > 5 ? 1 : 0];
    table.forEach((row, i) =>
      row.forEach((_, expert) => {
        pen.fillStyle = shades[Math.round(shade(this.load(i, expert), most) * (SHADES - 1))];
        pen.fillRect(LEFT + expert * wide, TOP + i * high, wide - gap, high - gap);
      }),
    );
    this.label(pen, across, high);
    this.most.textContent = `${most.toFixed(1)} times an even share`;
    if (this.cursor) this.frame(pen, getComputedStyle(canvas).color);
  }

  label(pen, across, high) {
    const style = getComputedStyle(this.words);
    pen.fillStyle = style.color;
    pen.font = `11px ${style.fontFamily}`;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const step = Math.ceil(12 / high);
    this.experts.layers.forEach((layer, i) => i % step === 0 && pen.fillText(String(layer), LEFT - 8, TOP + (i + 0.5) * high));
    pen.textAlign = "center";
    const every = [1, 2, 4, 8, 16, 32, 64].find((one) => one * this.cell[0] > 24) ?? 128;
    for (let expert = 0; expert < across; expert += every) pen.fillText(String(expert), LEFT + (expert + 0.5) * this.cell[0], TOP / 2);
  }

  frame(pen, colour) {
    const [[row, expert], [wide, high]] = [this.cursor, this.cell];
    pen.strokeStyle = colour;
    pen.lineWidth = 2;
    pen.strokeRect(LEFT + expert * wide, TOP + row * high, wide, high);
  }

  /** From the legend's colours, which are those of the theme. */
  shades() {
    const stops = this.scale.map((one) => getComputedStyle(one).backgroundColor.match(/[\d.]+/g).slice(0, 3).map(Number));
    return Array.from({ length: SHADES }, (_, i) => {
      const [half, part] = i < SHADES / 2 ? [0, i / (SHADES / 2)] : [1, i / (SHADES / 2) - 1];
      return `rgb(${stops[half].map((from, c) => Math.round(from + (stops[half + 1][c] - from) * part)).join(" ")})`;
    });
  }

  tell() {
    const used = this.table.flat().filter((one) => one > 0).length;
    const all = this.table.length * this.experts.count;
    const when = this.over === null ? "since the start" : `over the last ${seconds(this.over)}`;
    this.words.textContent = used
      ? `${count(used)} of ${count(all)} experts (${percent(used / all)}) were used ${when}; a token uses ${this.experts.top} in each of ${this.table.length} layers. ${this.busiest()}`
      : `No expert was used ${when}.`;
    this.canvas.setAttribute("aria-label", `Use of experts by layer. ${this.words.textContent} Arrow keys read single experts.`);
    this.tellNodes(this.experts.seconds ?? []);
    this.readCursor();
  }

  busiest() {
    const [row, expert, load] = this.table.reduce((best, counts, i) => counts.reduce((found, _, j) => (this.load(i, j) > found[2] ? [i, j, this.load(i, j)] : found), best), [0, 0, 0]);
    return `The busiest is expert ${expert} of layer ${this.experts.layers[row]} with ${load.toFixed(1)} times an even share.`;
  }

  tellNodes(times) {
    this.nodes.hidden = times.length < 2;
    this.nodes.textContent = `Time in experts by memory node: ${times.map((time, i) => `${i}: ${seconds(time)}`).join(", ")}.`;
  }

  point(event) {
    const [wide, high] = this.cell ?? [1, 1];
    const box = this.canvas.getBoundingClientRect();
    this.move([Math.floor((event.clientY - box.top - TOP) / high), Math.floor((event.clientX - box.left - LEFT) / wide)]);
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || !this.table) return;
    event.preventDefault();
    const [row, expert] = this.cursor ?? [0, 0];
    const next = this.cursor ? [row + step[0], expert + step[1]] : [0, 0];
    if (this.inside(next)) this.move(next);
  }

  inside([row, expert]) {
    return row >= 0 && expert >= 0 && row < this.table.length && expert < this.experts.count;
  }

  move(place) {
    if (!this.table) return;
    this.cursor = place && this.inside(place) ? place : null;
    this.paint();
    this.readCursor();
  }

  readCursor() {
    if (!this.cursor || !this.inside(this.cursor)) {
      this.read.textContent = "Point at an expert, or move with the arrow keys.";
      return;
    }
    const [row, expert] = this.cursor;
    this.read.textContent = `Layer ${this.experts.layers[row]}, expert ${expert}: ${count(this.table[row][expert])} activations, ${this.load(row, expert).toFixed(2)} times an even share.`;
  }
}

/** 0 to 1: an even share is the middle, more than it grows by its logarithm. */
const shade = (load, most) => (load <= 1 ? load / 2 : 0.5 + (0.5 * Math.log(load)) / Math.log(most));
