// The machine tab: polls /machine while visible and updates its views.

import { call } from "./api.js";
import { make } from "./dom.js";
import { Bandwidth, Tiles } from "./gauges.js";
import { HeatMap } from "./heatmap.js";
import { Modules } from "./modules.js";
import { seconds } from "./format.js";

const POLL_INTERVAL_MS = 1000;
const MAX_SAMPLES = 120;
const MAX_GAP_S = 10; // a longer gap between samples resets the history
const COUNTS_INTERVAL_S = 5; // between stored tables of activations
const COUNTS_WINDOW_S = 60; // "the last minute"

/** Counters over time. `samples` holds {at, ...counters}, `counts` holds {at, activations}; `at` is in seconds. */
export class History {
  constructor() {
    this.samples = [];
    this.counts = [];
    this.uptime = 0;
  }

  add(stats, at) {
    const last = this.samples.at(-1);
    if ((last && at - last.at > MAX_GAP_S) || (stats.uptime_seconds ?? 0) < this.uptime) [this.samples, this.counts] = [[], []];
    this.uptime = stats.uptime_seconds ?? 0;
    const { bytes = null, seconds = null, expert_bytes = null, expert_seconds = null } = stats.bandwidth ?? {};
    const { prompt_tokens = null, answer_tokens = null } = stats.requests ?? {};
    this.samples.push({ at, bytes, seconds, expert_bytes, expert_seconds, prompt_tokens, answer_tokens });
    this.samples.splice(0, this.samples.length - MAX_SAMPLES);
    if (stats.experts && !(at - this.counts.at(-1)?.at < COUNTS_INTERVAL_S)) this.counts.push({ at, activations: stats.experts.activations });
    while (this.counts.length > 1 && at - this.counts[1].at >= COUNTS_WINDOW_S) this.counts.shift();
  }

  /** A counter's growth over the last seconds as {amount, seconds}, or null if unknown. */
  growth(name, window = 5) {
    const last = this.samples.at(-1);
    const first = this.samples.find((sample) => last.at - sample.at <= window + 0.5);
    if (!last || first === last || last[name] === null || first[name] === null) return null;
    return { amount: last[name] - first[name], seconds: last.at - first.at };
  }

  /** [at, ratio of two counters' growth] between adjacent samples; 0 if the denominator did not grow. */
  ratios(numerator, denominator) {
    return this.samples.slice(1).map((sample, i) => {
      const grown = sample[denominator] - this.samples[i][denominator];
      return [sample.at, grown > 0 ? (sample[numerator] - this.samples[i][numerator]) / grown : 0];
    });
  }

  /** [activations since the oldest stored table, its age in seconds]. */
  recent(activations, at) {
    const [oldest] = this.counts;
    if (!oldest || oldest.activations.length !== activations.length) return [activations, 0];
    return [activations.map((row, layer) => row.map((count, i) => count - oldest.activations[layer][i])), at - oldest.at];
  }
}

export class Machine {
  constructor(panel) {
    this.history = new History();
    this.stats = null;
    this.selected = false;
    this.timer = 0;
    this.facts = make("p", { class: "facts" });
    this.notice = make("p", { class: "notice", role: "status" }, "Loading…");
    this.views = [new Tiles(), new Bandwidth(), new HeatMap(), new Modules()];
    this.body = make("div", { class: "parts", hidden: true }, ...this.views.map((view) => view.element));
    panel.append(make("h2", { class: "sr-only" }, "Machine"), this.facts, this.notice, this.body);
    document.addEventListener("visibilitychange", () => this.setSelected(this.selected));
    new ResizeObserver(() => this.redraw()).observe(this.body);
  }

  /** Sets whether the tab is selected. Polls only while it is and the window is visible. */
  setSelected(selected) {
    this.selected = selected;
    clearTimeout(this.timer);
    if (this.isVisible()) this.poll();
  }

  isVisible() {
    return this.selected && document.visibilityState === "visible";
  }

  async poll() {
    const started = performance.now();
    let retry = true;
    try {
      this.stats = await (await call("machine")).json();
      this.history.add(this.stats, performance.now() / 1000);
      this.notice.hidden = true;
      this.body.hidden = false;
      this.redraw();
    } catch (error) {
      this.notice.hidden = false;
      this.notice.textContent = error.status === 404 ? "This server has no route /machine." : error.message;
      retry = error.status !== 401 && error.status !== 404;
    }
    clearTimeout(this.timer);
    if (retry && this.isVisible()) this.timer = setTimeout(() => this.poll(), Math.max(100, POLL_INTERVAL_MS - (performance.now() - started)));
  }

  redraw() {
    if (!this.stats || !this.selected) return;
    this.facts.textContent = facts(this.stats);
    for (const view of this.views) view.show(this.stats, this.history);
  }
}

function facts({ model, cpu, isa, threads, nodes, uptime_seconds: uptime }) {
  const parts = [model, cpu, isa && `${isa} kernels`, threads && `${threads} threads`, nodes > 1 && `${nodes} NUMA nodes`];
  if (Number.isFinite(uptime)) parts.push(`up ${seconds(uptime)}`);
  return parts.filter(Boolean).join(" · ");
}
