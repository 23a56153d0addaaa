// Inline Markdown: code, emphasis, links to http and https. Parsed in one pass with a stack, so that hostile input takes
// linear time.

import { make } from "./dom.js";

const MAX_URL_CHARS = 2000;
const MAX_DEPTH = 16; // of open brackets, and of open emphasis of one kind; deeper ones are text
const TARGET = /\(\s{0,9}<?([^\s<>()]{0,2000}(?:\([^\s<>()]{0,200}\)[^\s<>()]{0,200}){0,9})>?(?:\s{1,9}"[^"]{0,300}")?\s{0,9}\)/y;
const BARE = /https?:\/\/[^\s<>"'`*|\\]{1,2000}/y;
const ANGLE = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const SPECIAL = /[\\`*_~[\]!<h\n]/g;
const WORD = /[\p{L}\p{N}]/u;

/** The normalized URL if it is http or https, else null. */
function httpUrl(text) {
  if (text.length > MAX_URL_CHARS || !/^https?:\/\//i.test(text)) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

function link(href, children) {
  return make("a", { href, rel: "noopener noreferrer", target: "_blank" }, children);
}

/** Parses inline Markdown and returns DOM nodes and strings. */
export function inline(text) {
  return new InlineParser(text).parse();
}

class InlineParser {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.nodes = []; // DOM nodes, strings and delimiter runs: {mark, count, opens, closes}
    this.brackets = []; // open brackets: {index in nodes, isImage}
    this.unclosed = new Set(); // lengths of backtick runs without a closing run
  }

  parse() {
    const handlers = { "\\": "escape", "`": "code", "*": "mark", _: "mark", "~": "mark", "[": "open", "!": "open", "]": "close", "<": "angle", h: "bare", "\n": "line" };
    while (this.at < this.text.length) {
      SPECIAL.lastIndex = this.at;
      const next = SPECIAL.exec(this.text)?.index ?? this.text.length;
      if (next > this.at) this.put(this.text.slice(this.at, next));
      this.at = next;
      if (next < this.text.length && !this[handlers[this.text[next]]]()) this.put(this.text[this.at++]);
    }
    return emphasize(this.nodes);
  }

  put(text) {
    if (typeof this.nodes.at(-1) === "string") this.nodes[this.nodes.length - 1] += text;
    else this.nodes.push(text);
  }

  escape() {
    const next = this.text[this.at + 1] ?? "";
    if (next === "\n") this.nodes.push(make("br"));
    else if (/[!-/:-@[-`{-~]/.test(next)) this.put(next);
    else return false;
    this.at += 2;
    return true;
  }

  line() {
    if (typeof this.nodes.at(-1) === "string") this.nodes.push(this.nodes.pop().trimEnd());
    this.nodes.push(make("br"));
    this.at += 1;
    return true;
  }

  code() {
    const run = /`+/y;
    run.lastIndex = this.at;
    const fence = run.exec(this.text)[0];
    const from = this.at + fence.length;
    const end = this.unclosed.has(fence.length) ? -1 : this.closing(from, fence.length);
    if (end < 0) {
      this.unclosed.add(fence.length);
      this.put(fence);
      this.at = from;
      return true;
    }
    const inner = this.text.slice(from, end).replaceAll("\n", " ");
    this.nodes.push(make("code", {}, /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner));
    this.at = end + fence.length;
    return true;
  }

  closing(from, length) {
    const runs = /`+/g;
    runs.lastIndex = from;
    for (let found = runs.exec(this.text); found; found = runs.exec(this.text)) {
      if (found[0].length === length) return found.index;
    }
    return -1;
  }

  /** A run of * _ ~: opens emphasis before text, closes it after text. */
  mark() {
    const mark = this.text[this.at];
    let end = this.at;
    while (this.text[end] === mark) end += 1;
    const [before, after] = [this.text[this.at - 1] ?? " ", this.text[end] ?? " "];
    const inWord = mark === "_" && WORD.test(before) && WORD.test(after);
    const closes = /\S/.test(before) && !(WORD.test(after) && !WORD.test(before)) && !inWord;
    const opens = /\S/.test(after) && !(WORD.test(before) && !WORD.test(after)) && !inWord;
    const count = end - this.at;
    this.nodes.push(count > 4 ? mark.repeat(count) : { mark, count, opens, closes });
    this.at = end;
    return true;
  }

  open() {
    const isImage = this.text[this.at] === "!";
    if ((isImage && this.text[this.at + 1] !== "[") || this.brackets.length >= MAX_DEPTH) return false;
    this.brackets.push({ index: this.nodes.length, isImage });
    this.nodes.push(isImage ? "![" : "[");
    this.nodes.push(""); // the text after it is a separate node
    this.at += isImage ? 2 : 1;
    return true;
  }

  close() {
    const bracket = this.brackets.pop();
    if (!bracket) return false;
    TARGET.lastIndex = this.at + 1;
    const match = this.text[this.at + 1] === "(" ? TARGET.exec(this.text) : null;
    const url = match && httpUrl(match[1]);
    if (!url) return false;
    const inner = emphasize(this.nodes.splice(bracket.index).slice(1));
    const label = inner.length ? inner : [url];
    if (bracket.isImage && this.brackets.length) this.nodes = this.nodes.concat(label); // links cannot be nested
    else this.nodes.push(link(url, label));
    if (!bracket.isImage) this.brackets.length = 0;
    this.at = TARGET.lastIndex;
    return true;
  }

  angle() {
    ANGLE.lastIndex = this.at;
    const match = ANGLE.exec(this.text);
    const url = match && httpUrl(match[1]);
    if (!url) return false;
    this.nodes.push(link(url, match[1]));
    this.at = ANGLE.lastIndex;
    return true;
  }

  bare() {
    if (this.brackets.length || WORD.test(this.text[this.at - 1] ?? " ")) return false;
    BARE.lastIndex = this.at;
    let text = BARE.exec(this.text)?.[0];
    if (!text) return false;
    text = text.replace(/[.,:;!?\])]$/, (last) => (last === ")" && text.includes("(") ? last : ""));
    const url = httpUrl(text);
    if (!url) return false;
    this.nodes.push(link(url, text));
    this.at += text.length;
    return true;
  }
}

const TAGS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"] };

/** Replaces paired delimiter runs and the nodes between them by elements. */
function emphasize(nodes) {
  const done = []; // nodes, and delimiter runs that can still be closed
  const open = { "*": [], _: [], "~": [] }; // indices into `done`
  for (const node of nodes) {
    if (!node.mark) {
      done.push(node);
      continue;
    }
    let left = node.count;
    while (node.closes && left && open[node.mark].length) {
      const index = open[node.mark].at(-1);
      const opener = done[index];
      const pair = Math.min(left, opener.count, 2);
      const tag = TAGS[node.mark][pair - 1];
      if (!tag) break;
      const inner = mergeText(done.splice(index + 1));
      for (const stack of Object.values(open)) while (stack.length && stack.at(-1) > index) stack.pop();
      opener.count -= pair;
      left -= pair;
      if (!opener.count) {
        open[node.mark].pop();
        done.pop();
      }
      done.push(make(tag, {}, inner));
    }
    if (left && node.opens && open[node.mark].length < MAX_DEPTH) {
      open[node.mark].push(done.length);
      done.push({ mark: node.mark, count: left });
    } else if (left) done.push(node.mark.repeat(left));
  }
  return mergeText(done);
}

/** Turns unpaired delimiter runs into text and merges adjacent strings. */
function mergeText(nodes) {
  const merged = [];
  for (const node of nodes) {
    const item = node.mark ? node.mark.repeat(node.count) : node;
    if (typeof item === "string" && typeof merged.at(-1) === "string") merged[merged.length - 1] += item;
    else if (item !== "") merged.push(item);
  }
  return merged;
}
