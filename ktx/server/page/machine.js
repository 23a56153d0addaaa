// The machine tab: asks /machine once a second while it is seen, keeps what it takes to tell rates, and hands both to the parts that draw.

import { call } from "./api.js";
import { make } from "./dom.js";
import { Bandwidth, Numbers } from "./gauges.js";
import { HeatMap } from "./heatmap.js";
import { Modules } from "./modules.js";
import { seconds } from "./format.js";

const EACH = 1000; // milliseconds between two questions
const KEPT = 120; // samples of counters
const GAP = 10; // seconds without a sample after which rates begin anew
const COUNTS_EACH = 5; // seconds between two kept tables of activations
const WINDOW = 60; // seconds of activations told as "the last minute"

/** Counters over time. `samples`: {at, ...counters}; `counts`: {at, activations}. */
export class History {
  constructor() {
    this.samples = [];
    this.counts = [];
    this.uptime = 0;
  }

  add(told, at) {
    const before = this.samples.at(-1);
    if ((before && at - before.at > GAP) || (told.uptime_seconds ?? 0) < this.uptime) [this.samples, this.counts] = [[], []];
    this.uptime = told.uptime_seconds ?? 0;
    const [bandwidth, requests] = [told.bandwidth ?? {}, told.requests ?? {}];
    this.samples.push({
      at,
      bytes: bandwidth.bytes ?? null,
      seconds: bandwidth.seconds ?? null,
      expert_bytes: bandwidth.expert_bytes ?? null,
      expert_seconds: bandwidth.expert_seconds ?? null,
      prompt_tokens: requests.prompt_tokens ?? null,
      answer_tokens: requests.answer_tokens ?? null,
    });
    this.samples.splice(0, this.samples.length - KEPT);
    if (told.experts && !(at - this.counts.at(-1)?.at < COUNTS_EACH)) this.counts.push({ at, activations: told.experts.activations });
    while (this.counts.length > 1 && at - this.counts[1].at >= WINDOW) this.counts.shift();
  }

  /** How much a counter has grown over the last seconds, or null: not known. */
  grown(name, over = 5) {
    const last = this.samples.at(-1);
    const first = this.samples.find((sample) => last.at - sample.at <= over + 0.5);
    if (!last || first === last || last[name] === null || first[name] === null) return null;
    return { by: last[name] - first[name], seconds: last.at - first.at };
  }

  /** [at, ratio of two counters' growth] between neighbouring samples; 0 where nothing was computed. */
  ratios(over, under) {
    return this.samples.slice(1).map((sample, i) => {
      const time = sample[under] - this.samples[i][under];
      return [sample.at, time > 0 ? (sample[over] - this.samples[i][over]) / time : 0];
    });
  }

  /** Activations since the oldest kept table, and how many seconds that is. */
  recent(activations, at) {
    const [oldest] = this.counts;
    if (!oldest || oldest.activations.length !== activations.length) return [activations, 0];
    return [activations.map((row, layer) => row.map((count, i) => count - oldest.activations[layer][i])), at - oldest.at];
  }
}

export class Machine {
  constructor(place) {
    this.history = new History();
    this.told = null;
    this.wanted = false;
    this.timer = 0;
    this.facts = make("p", { class: "facts" });
    this.words = make("p", { class: "notice", role: "status" }, "Asking the server…");
    this.parts = [new Numbers(), new Bandwidth(), new HeatMap(), new Modules()];
    this.body = make("div", { class: "parts", hidden: true }, ...this.parts.map((part) => part.element));
    place.append(make("h2", { class: "unseen" }, "Machine"), this.facts, this.words, this.body);
    document.addEventListener("visibilitychange", () => this.visible(this.wanted));
    new ResizeObserver(() => this.redraw()).observe(this.body);
  }

  /** Whether the tab is chosen; nothing is asked while it is not, or while the window is not seen. */
  visible(wanted) {
    this.wanted = wanted;
    clearTimeout(this.timer);
    if (this.seen()) this.ask();
  }

  seen() {
    return this.wanted && document.visibilityState === "visible";
  }

  async ask() {
    const started = performance.now();
    let again = true;
    try {
      this.told = await (await call("machine")).json();
      this.history.add(this.told, performance.now() / 1000);
      this.words.hidden = true;
      this.body.hidden = false;
      this.redraw();
    } catch (error) {
      this.words.hidden = false;
      this.words.textContent = error.status === 404 ? "This server tells nothing of its machine." : error.message;
      again = error.status !== 401 && error.status !== 404;
    }
    clearTimeout(this.timer);
    if (again && this.seen()) this.timer = setTimeout(() => this.ask(), Math.max(100, EACH - (performance.now() - started)));
  }

  redraw() {
    if (!this.told || !this.wanted) return;
    this.facts.textContent = facts(this.told);
    for (const part of this.parts) part.show(this.told, this.history);
  }
}

function facts({ model, cpu, isa, threads, nodes, uptime_seconds: uptime }) {
  const found = [model, cpu, isa && `${isa} kernels`, threads && `${threads} threads`, nodes > 1 && `${nodes} memory nodes`];
  if (Number.isFinite(uptime)) found.push(`up ${seconds(uptime)}`);
  return found.filter(Boolean).join(" · ");
}
