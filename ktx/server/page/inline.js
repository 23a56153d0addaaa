// Markdown within a paragraph: code, emphasis, links. Makes DOM nodes of text; a link leads to http or https or stays text.
// Everything is found in one pass with a stack, so that a hostile line costs no more than its length.

import { make } from "./dom.js";

const LONGEST = 2000; // letters of an address
const DEEPEST = 16; // of emphasis of one kind and of brackets: deeper ones are text
const TARGET = /\(\s{0,9}<?([^\s<>()]{0,2000}(?:\([^\s<>()]{0,200}\)[^\s<>()]{0,200}){0,9})>?(?:\s{1,9}"[^"]{0,300}")?\s{0,9}\)/y;
const BARE = /https?:\/\/[^\s<>"'`*|\\]{1,2000}/y;
const ANGLE = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const SPECIAL = /[\\`*_~[\]!<h\n]/g;
const WORD = /[\p{L}\p{N}]/u;

/** The address if it is one of the web, else null. */
export function webAddress(text) {
  if (text.length > LONGEST || !/^https?:\/\//i.test(text)) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

function link(address, children) {
  return make("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, children);
}

/** The nodes of a line or several. */
export function inline(text) {
  return new Inline(text).read();
}

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.nodes = []; // nodes and marks: {mark, count, opens, closes}
    this.brackets = []; // where in nodes an opening one stands, and whether it is a picture's
    this.lonely = new Set(); // lengths of runs of ` that nothing closes
  }

  read() {
    const steps = { "\\": "escape", "`": "code", "*": "mark", _: "mark", "~": "mark", "[": "open", "!": "open", "]": "close", "<": "angle", h: "bare", "\n": "line" };
    while (this.at < this.text.length) {
      SPECIAL.lastIndex = this.at;
      const next = SPECIAL.exec(this.text)?.index ?? this.text.length;
      if (next > this.at) this.put(this.text.slice(this.at, next));
      this.at = next;
      if (next < this.text.length && !this[steps[this.text[next]]]()) this.put(this.text[this.at++]);
    }
    return emphasised(this.nodes);
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
    const end = this.lonely.has(fence.length) ? -1 : this.closing(from, fence.length);
    if (end < 0) {
      this.lonely.add(fence.length);
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
    const picture = this.text[this.at] === "!";
    if ((picture && this.text[this.at + 1] !== "[") || this.brackets.length >= DEEPEST) return false;
    this.brackets.push({ place: this.nodes.length, picture });
    this.nodes.push(picture ? "![" : "[");
    this.nodes.push(""); // the text behind it is a node of its own
    this.at += picture ? 2 : 1;
    return true;
  }

  close() {
    const bracket = this.brackets.pop();
    if (!bracket) return false;
    TARGET.lastIndex = this.at + 1;
    const found = this.text[this.at + 1] === "(" ? TARGET.exec(this.text) : null;
    const address = found && webAddress(found[1]);
    if (!address) return false;
    const inner = emphasised(this.nodes.splice(bracket.place).slice(1));
    const named = inner.length ? inner : [address];
    if (bracket.picture && this.brackets.length) this.nodes = this.nodes.concat(named); // no link within a link
    else this.nodes.push(link(address, named));
    if (!bracket.picture) this.brackets.length = 0;
    this.at = TARGET.lastIndex;
    return true;
  }

  angle() {
    ANGLE.lastIndex = this.at;
    const found = ANGLE.exec(this.text);
    const address = found && webAddress(found[1]);
    if (!address) return false;
    this.nodes.push(link(address, found[1]));
    this.at = ANGLE.lastIndex;
    return true;
  }

  bare() {
    if (this.brackets.length || WORD.test(this.text[this.at - 1] ?? " ")) return false;
    BARE.lastIndex = this.at;
    let found = BARE.exec(this.text)?.[0];
    if (!found) return false;
    found = found.replace(/[.,:;!?\])]$/, (last) => (last === ")" && found.includes("(") ? last : ""));
    const address = webAddress(found);
    if (!address) return false;
    this.nodes.push(link(address, found));
    this.at += found.length;
    return true;
  }
}

const WRAPS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "del"] };

/** Text and elements, where marks that pair have become elements around what stood between them. */
function emphasised(nodes) {
  const done = []; // nodes, and marks that may still be closed
  const open = { "*": [], _: [], "~": [] }; // places in done
  for (const node of nodes) {
    if (!node.mark) {
      done.push(node);
      continue;
    }
    let left = node.count;
    while (node.closes && left && open[node.mark].length) {
      const place = open[node.mark].at(-1);
      const opener = done[place];
      const pair = Math.min(left, opener.count, 2);
      const name = WRAPS[node.mark][pair - 1];
      if (!name) break;
      const inner = joined(done.splice(place + 1));
      for (const places of Object.values(open)) while (places.length && places.at(-1) > place) places.pop();
      opener.count -= pair;
      left -= pair;
      if (!opener.count) {
        open[node.mark].pop();
        done.pop();
      }
      done.push(make(name, {}, inner));
    }
    if (left && node.opens && open[node.mark].length < DEEPEST) {
      open[node.mark].push(done.length);
      done.push({ mark: node.mark, count: left });
    } else if (left) done.push(node.mark.repeat(left));
  }
  return joined(done);
}

/** Marks that stayed single are text, and texts side by side are one. */
function joined(nodes) {
  const found = [];
  for (const node of nodes) {
    const one = node.mark ? node.mark.repeat(node.count) : node;
    if (typeof one === "string" && typeof found.at(-1) === "string") found[found.length - 1] += one;
    else if (one !== "") found.push(one);
  }
  return found;
}
