// The heat map of expert activations: a row per layer, a column per expert, colored by the load over the layer's mean.

import { make } from "./dom.js";
import { count, percent, seconds } from "./format.js";

const LEFT_PX = 36; // for the layer numbers
const TOP_PX = 18; // for the expert numbers
const NUM_COLORS = 64;

export class HeatMap {
  constructor() {
    this.canvas = make("canvas", { tabindex: 0, role: "img", "aria-describedby": "expert-read" });
    this.output = make("output", { id: "expert-read" });
    this.summary = make("p", { class: "below" });
    this.nodes = make("p", { class: "below", hidden: true });
    this.maximum = make("span");
    this.scale = ["low", "mid", "high"].map((name) => make("span", { class: `heat-${name}` }));
    const legend = make("p", { class: "legend", "aria-hidden": "true" }, "unused", make("span", { class: "ramp" }, ...this.scale), this.maximum);
    const choice = (value, name, checked) => make("label", {}, make("input", { type: "radio", name: "since", value, checked, change: () => this.draw() }), ` ${name}`);
    this.choices = make("fieldset", {}, make("legend", { class: "sr-only" }, "Activations"), choice("minute", "last minute", true), choice("start", "since the start", false));
    this.body = make("div", {}, this.canvas, make("div", { class: "under-map" }, this.output, legend), this.summary, this.nodes);
    this.element = make("section", { class: "experts", "aria-labelledby": "experts-title" }, make("div", { class: "heading" }, make("h3", { id: "experts-title" }, "Experts"), this.choices), this.body);
    this.cursor = null; // [row, expert]
    this.canvas.addEventListener("pointermove", (event) => this.onPointer(event));
    this.canvas.addEventListener("pointerleave", () => this.move(null));
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  show(stats, history) {
    this.experts = stats.experts ?? null;
    this.history = history;
    this.draw();
  }

  draw() {
    const { experts } = this;
    const known = Boolean(experts?.layers?.length);
    for (const element of [this.canvas, this.choices, this.canvas.nextSibling]) element.hidden = !known;
    if (!known) {
      this.summary.textContent = "No routed experts: this model has none, or this backend does not count them.";
      return;
    }
    this.table = this.selectCounts();
    this.totals = this.table.map((row) => row.reduce((sum, n) => sum + n, 0));
    this.paint();
    this.describe();
  }

  /** The counts of the selected period. Sets `this.seconds` to its length, null for all since the start. */
  selectCounts() {
    const { activations } = this.experts;
    if (this.choices.querySelector("[value=start]").checked) {
      this.seconds = null;
      return activations;
    }
    const [recent, length] = this.history.recent(activations, this.history.samples.at(-1).at);
    this.seconds = length;
    return recent;
  }

  /** Activations of an expert over the mean of its layer. */
  load(row, expert) {
    return this.totals[row] ? (this.table[row][expert] * this.experts.count) / this.totals[row] : 0;
  }

  paint() {
    const { canvas, table } = this;
    const width = canvas.parentElement.clientWidth;
    if (!width) return;
    const height = Math.max(6, Math.min(24, Math.floor(460 / table.length)));
    const [total, ratio] = [TOP_PX + height * table.length, devicePixelRatio || 1];
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(total * ratio);
    canvas.style.height = `${total}px`;
    this.cell = [(width - LEFT_PX) / this.experts.count, height];
    const ctx = canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    const colors = this.colors();
    const max = Math.max(2, ...table.flatMap((row, i) => row.map((_, expert) => this.load(i, expert))));
    const [cell, gap] = [this.cell[0], this.cell[0] > 5 && height > 5 ? 1 : 0];
    table.forEach((row, i) =>
      row.forEach((_, expert) => {
        ctx.fillStyle = colors[Math.round(intensity(this.load(i, expert), max) * (NUM_COLORS - 1))];
        ctx.fillRect(LEFT_PX + expert * cell, TOP_PX + i * height, cell - gap, height - gap);
      }),
    );
    this.drawLabels(ctx);
    this.maximum.textContent = `${max.toFixed(1)} × mean`;
    if (this.cursor) this.drawCursor(ctx, getComputedStyle(canvas).color);
  }

  drawLabels(ctx) {
    const [width, height] = this.cell;
    const style = getComputedStyle(this.summary);
    ctx.fillStyle = style.color;
    ctx.font = `11px ${style.fontFamily}`;
    ctx.textBaseline = "middle";
    ctx.textAlign = "right";
    const step = Math.ceil(12 / height);
    this.experts.layers.forEach((layer, i) => i % step === 0 && ctx.fillText(String(layer), LEFT_PX - 8, TOP_PX + (i + 0.5) * height));
    ctx.textAlign = "center";
    const every = [1, 2, 4, 8, 16, 32, 64].find((n) => n * width > 24) ?? 128;
    for (let expert = 0; expert < this.experts.count; expert += every) ctx.fillText(String(expert), LEFT_PX + (expert + 0.5) * width, TOP_PX / 2);
  }

  drawCursor(ctx, color) {
    const [[row, expert], [width, height]] = [this.cursor, this.cell];
    ctx.strokeStyle = color;
    ctx.lineWidth = 2;
    ctx.strokeRect(LEFT_PX + expert * width, TOP_PX + row * height, width, height);
  }

  /** Interpolates the legend's colors, which the theme sets. */
  colors() {
    const stops = this.scale.map((span) => getComputedStyle(span).backgroundColor.match(/[\d.]+/g).slice(0, 3).map(Number));
    return Array.from({ length: NUM_COLORS }, (_, i) => {
      const [half, t] = i < NUM_COLORS / 2 ? [0, i / (NUM_COLORS / 2)] : [1, i / (NUM_COLORS / 2) - 1];
      return `rgb(${stops[half].map((from, c) => Math.round(from + (stops[half + 1][c] - from) * t)).join(" ")})`;
    });
  }

  describe() {
    const used = this.table.flat().filter((n) => n > 0).length;
    const total = this.table.length * this.experts.count;
    const when = this.seconds === null ? "since the start" : `in the last ${seconds(this.seconds)}`;
    this.summary.textContent = used
      ? `${count(used)} of ${count(total)} experts (${percent(used / total)}) were used ${when}; a token activates ${this.experts.top} in each of ${this.table.length} layers. ${this.busiest()}`
      : `No expert was used ${when}.`;
    this.canvas.setAttribute("aria-label", `Expert activations by layer. ${this.summary.textContent} Use the arrow keys to select an expert.`);
    this.describeNodes(this.experts.seconds ?? []);
    this.describeCursor();
  }

  busiest() {
    const [row, expert, load] = this.table.reduce((best, counts, i) => counts.reduce((max, _, j) => (this.load(i, j) > max[2] ? [i, j, this.load(i, j)] : max), best), [0, 0, 0]);
    return `The busiest is expert ${expert} of layer ${this.experts.layers[row]} with ${load.toFixed(1)} times the mean.`;
  }

  describeNodes(times) {
    this.nodes.hidden = times.length < 2;
    this.nodes.textContent = `Time in experts per NUMA node: ${times.map((time, i) => `${i}: ${seconds(time)}`).join(", ")}.`;
  }

  onPointer(event) {
    const [width, height] = this.cell ?? [1, 1];
    const box = this.canvas.getBoundingClientRect();
    this.move([Math.floor((event.clientY - box.top - TOP_PX) / height), Math.floor((event.clientX - box.left - LEFT_PX) / width)]);
  }

  onKey(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || !this.table) return;
    event.preventDefault();
    const [row, expert] = this.cursor ?? [0, 0];
    const next = this.cursor ? [row + step[0], expert + step[1]] : [0, 0];
    if (this.contains(next)) this.move(next);
  }

  contains([row, expert]) {
    return row >= 0 && expert >= 0 && row < this.table.length && expert < this.experts.count;
  }

  move(cell) {
    if (!this.table) return;
    this.cursor = cell && this.contains(cell) ? cell : null;
    this.paint();
    this.describeCursor();
  }

  describeCursor() {
    if (!this.cursor || !this.contains(this.cursor)) {
      this.output.textContent = "Point at an expert or use the arrow keys.";
      return;
    }
    const [row, expert] = this.cursor;
    this.output.textContent = `Layer ${this.experts.layers[row]}, expert ${expert}: ${count(this.table[row][expert])} activations, ${this.load(row, expert).toFixed(2)} times the mean.`;
  }
}

/** Maps a load to 0..1: linear up to the mean at 0.5, logarithmic above it. */
const intensity = (load, max) => (load <= 1 ? load / 2 : 0.5 + (0.5 * Math.log(load)) / Math.log(max));
