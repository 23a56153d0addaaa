// The current values on the machine tab.

import { draw, make } from "./dom.js";
import { bytes, count, percent, rate } from "./format.js";

const UNKNOWN = "unknown";
const SPARKLINE = { width: 300, height: 56, seconds: 120 };

/** A tile with a name, a large value and a line below it. */
class Tile {
  constructor(name) {
    this.value = make("p", { class: "value" });
    this.below = make("p", { class: "below" });
    this.bar = make("div", { class: "stack", hidden: true });
    this.element = make("div", { class: "tile" }, make("h3", {}, name), this.value, this.bar, this.below);
  }

  /** `parts` of the bar: [[class, fraction, title]]. */
  show(value, below, parts = []) {
    this.value.textContent = value;
    this.below.textContent = below;
    this.bar.hidden = parts.length === 0;
    this.bar.replaceChildren(
      ...parts.map(([name, fraction, title]) => {
        const part = make("span", { class: name, title });
        part.style.width = `${100 * fraction}%`;
        return part;
      }),
    );
  }
}

export class Tiles {
  constructor() {
    this.tokens = new Tile("Generation");
    this.requests = new Tile("Requests");
    this.cache = new Tile("KV cache");
    this.memory = new Tile("Memory");
    this.element = make("section", { class: "tiles", "aria-label": "Current values" }, ...[this.tokens, this.requests, this.cache, this.memory].map((tile) => tile.element));
  }

  show(stats, history) {
    this.showTokens(history);
    const { running, waiting } = stats.requests ?? {};
    this.requests.show(running === undefined ? UNKNOWN : `${count(running)} running`, waiting === undefined ? "" : `${count(waiting)} waiting`);
    this.showCache(stats.cache);
    this.showMemory(stats.memory);
  }

  showTokens(history) {
    const [answers, prompts] = ["answer_tokens", "prompt_tokens"].map((name) => history.growth(name));
    const last = history.samples.at(-1);
    this.tokens.show(
      answers ? `${rate(answers.amount / answers.seconds)} tok/s` : last.answer_tokens === null ? UNKNOWN : "…",
      `${prompts ? `${rate(prompts.amount / prompts.seconds)} tok/s prefill · ` : ""}${last.answer_tokens === null ? "" : `${count(last.answer_tokens)} tokens generated`}`,
    );
  }

  showCache(cache) {
    if (!cache?.pages) return this.cache.show(UNKNOWN, "This backend has no paged KV cache.");
    const { pages, used, idle, page_tokens: size, queries, hits } = cache;
    const hitRate = queries ? ` · ${percent(hits / queries)} of prompt tokens found in the prefix cache` : "";
    this.cache.show(`${percent(used / pages)} in use`, `${count(used)} of ${count(pages)} pages of ${size} tokens, ${count(idle)} cached${hitRate}`, [
      ["one", used / pages, `in use: ${count(used)} pages`],
      ["two", idle / pages, `cached: ${count(idle)} pages`],
    ]);
  }

  showMemory(memory) {
    const { weights_bytes: weights, cache_bytes: cache, rss_bytes: rss, total_bytes: total, free_bytes: free } = memory ?? {};
    const known = [[weights, "weights"], [cache, "KV cache"], [free, "free"]].filter(([value]) => Number.isFinite(value));
    const below = [...known.map(([value, name]) => `${bytes(value)} ${name}`), ...(total ? [`of ${bytes(total)}`] : [])].join(" · ");
    const other = Math.max(0, total - free - (weights ?? 0) - (cache ?? 0));
    const parts = total && Number.isFinite(free) ? [["one", (weights ?? 0) / total, "weights"], ["two", (cache ?? 0) / total, "KV cache"], ["three", other / total, "other"]] : [];
    this.memory.show(Number.isFinite(rss) ? bytes(rss) : UNKNOWN, below, parts);
  }
}

/** A gauge of used over measured bandwidth, and a sparkline of the last two minutes. */
export class Bandwidth {
  constructor() {
    this.gauge = make("div", { class: "gauge" });
    this.spark = make("div", { class: "spark" });
    this.summary = make("p", { class: "below" });
    this.element = make("section", { class: "bandwidth", "aria-labelledby": "bandwidth-title" }, make("h3", { id: "bandwidth-title" }, "Memory bandwidth"), this.gauge, make("div", {}, this.spark, this.summary));
  }

  show(stats, history) {
    const { measured_gbps: measured = null, bytes: read = null } = stats.bandwidth ?? {};
    if (read === null) {
      this.gauge.replaceChildren();
      this.spark.replaceChildren();
      this.summary.textContent = "This backend reads no weights, so it uses no bandwidth.";
      return;
    }
    const used = bandwidth(history, "bytes", "seconds");
    const experts = bandwidth(history, "expert_bytes", "expert_seconds");
    const points = history.ratios("bytes", "seconds").map(([at, value]) => [at, value / 1e9]);
    const top = measured ?? Math.max(1, ...points.map(([, value]) => value));
    this.gauge.replaceChildren(gaugeArc(used, measured));
    this.spark.replaceChildren(sparkline(points, top, measured));
    const parts = [measured === null ? "This machine's bandwidth was not measured." : `${rate(measured)} GB/s were measured on this machine.`];
    if (experts !== null) parts.push(`Experts only: ${bytes(experts * 1e9)}/s.`);
    parts.push(`${bytes(read)} of weights read since the start. The graph shows the last two minutes; it is 0 while no forward runs.`);
    this.summary.textContent = parts.join(" ");
  }
}

/** Bytes read per second of forward time, in GB/s, over the last seconds; null if no forward ran. */
function bandwidth(history, name, time) {
  const [read, took] = [history.growth(name), history.growth(time)];
  return read && took && took.amount > 0 ? read.amount / took.amount / 1e9 : null;
}

function arc(fraction, name) {
  const angle = Math.PI * (1 - Math.min(1, Math.max(0, fraction)));
  const [x, y] = [100 + 80 * Math.cos(angle), 100 - 80 * Math.sin(angle)];
  return draw("path", { class: name, d: `M20 100 A80 80 0 0 1 ${x.toFixed(2)} ${y.toFixed(2)}` });
}

function gaugeArc(used, measured) {
  const ratio = used !== null && measured ? used / measured : null;
  const big = used === null ? "idle" : `${bytes(used * 1e9)}/s`;
  const small = ratio === null ? (measured ? `of ${rate(measured)} GB/s` : "") : `${percent(ratio)} of ${rate(measured)}`;
  const title = `Bandwidth: ${big} ${small}`.trim();
  return draw(
    "svg",
    { viewBox: "0 0 200 118", role: "img", "aria-label": title },
    arc(1, "track"),
    ratio > 0 ? arc(ratio, "level") : null,
    draw("text", { x: 100, y: 88, class: "big" }, big),
    draw("text", { x: 100, y: 110, class: "small" }, small),
  );
}

function sparkline(points, top, measured) {
  const { width, height, seconds } = SPARKLINE;
  const now = points.at(-1)?.[0] ?? 0;
  const x = (at) => (width * (1 - (now - at) / seconds)).toFixed(1);
  const y = (value) => (height - (height - 3) * Math.min(1, value / (1.05 * top))).toFixed(1);
  const line = points.map(([at, value]) => `${x(at)},${y(value)}`).join(" ");
  const max = Math.max(0, ...points.map(([, value]) => value));
  return draw(
    "svg",
    { viewBox: `0 0 ${width} ${height + 2}`, role: "img", "aria-label": `Bandwidth over the last two minutes, at most ${bytes(max * 1e9)}/s`, preserveAspectRatio: "none" },
    measured ? draw("line", { class: "limit", x1: 0, x2: width, y1: y(measured), y2: y(measured) }) : null,
    points.length > 1 ? draw("polygon", { class: "under", points: `${x(points[0][0])},${height} ${line} ${x(now)},${height}` }) : null,
    draw("polyline", { class: "line", points: line }),
  );
}
