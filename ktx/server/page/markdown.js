// Markdown in blocks: headings, paragraphs, lists, quotes, code, tables. Models write it, so nothing of it is trusted:
// all text becomes text nodes, and HTML in it is text like any other.

import { make, patch } from "./dom.js";
import { inline } from "./inline.js";

const DEEPEST = 8; // of lists and quotes within each other; below it they are paragraphs
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*)|)$/;
const QUOTE = /^ {0,3}> ?/;
const CELL = /^\s*(:?)-+(:?)\s*$/;

const blank = (line) => line.trim() === "";

function isRule(line) {
  const marks = line.replaceAll(" ", "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

function isItem(line) {
  const item = ITEM.exec(line);
  return item && item[1].length < 4 && !isRule(line) ? item : null;
}

/** Whether an item may follow a paragraph without a blank line: "1986. was a good year" begins no list. */
function interrupts(line) {
  const item = isItem(line);
  return item && item[4] && (item[2].length === 1 || parseInt(item[2], 10) === 1);
}

function isTable(lines, at) {
  if (!lines[at]?.includes("|") || !lines[at + 1]?.includes("-")) return false;
  const below = cells(lines[at + 1]);
  return below.every((cell) => CELL.test(cell)) && below.length === cells(lines[at]).length;
}

const begins = (lines, at, deep) =>
  HEADING.test(lines[at]) || FENCE.test(lines[at]) || isRule(lines[at]) || isTable(lines, at) || (deep < DEEPEST && (QUOTE.test(lines[at]) || interrupts(lines[at])));

/** [element, the line behind it] of the block that begins at a line that is not blank. */
function block(lines, at, deep) {
  const line = lines[at];
  const hashes = HEADING.exec(line);
  if (hashes) return [heading(hashes[1].length, line.slice(hashes[0].length).trim()), at + 1];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  if (isRule(line)) return [make("hr"), at + 1];
  if (isTable(lines, at)) return table(lines, at);
  if (deep < DEEPEST && QUOTE.test(line)) return quote(lines, at, deep);
  const item = deep < DEEPEST && isItem(line);
  if (item) return list(lines, at, deep, item);
  return paragraph(lines, at, deep);
}

/** The page has a first and a second level of its own. */
function heading(level, text) {
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  return make(`h${Math.min(6, level + 2)}`, {}, inline(end === 0 || blank(text[end - 1]) ? text.slice(0, end).trim() : text));
}

function code(lines, at, [, indent, fence, info]) {
  const closes = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closes.test(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent.length, line.length - line.trimStart().length)));
  const name = info.trim().split(/\s/)[0].slice(0, 40);
  const bar = make("div", { class: "bar" }, make("span", {}, name || "text"), make("button", { type: "button", class: "quiet copy", "aria-label": "Copy this code" }, "Copy"));
  return [make("div", { class: "code" }, bar, make("pre", {}, make("code", {}, text.join("\n")))), end + 1];
}

function cells(line) {
  const trimmed = line.trim().replace(/^\|/, "").replace(/([^\\]|^)\|$/, "$1");
  return trimmed.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines, at) {
  const sides = cells(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "middle" : "right") : undefined));
  const row = (line, name) => {
    const found = cells(line);
    return make("tr", {}, sides.map((side, i) => make(name, { class: side, ...(name === "th" && { scope: "col" }) }, inline(found[i] ?? ""))));
  };
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const body = lines.slice(at + 2, end).map((line) => row(line, "td"));
  return [make("div", { class: "table" }, make("table", {}, make("thead", {}, row(lines[at], "th")), make("tbody", {}, body))), end];
}

function quote(lines, at, deep) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [make("blockquote", {}, blocks(inner, deep + 1)), end];
}

function list(lines, at, deep, first) {
  const kind = first[2].at(-1);
  const items = [];
  let loose = false;
  while (at < lines.length) {
    const item = isItem(lines[at]);
    if (!item || item[2].at(-1) !== kind) break;
    const width = item[1].length + item[2].length + Math.min(item[3]?.length ?? 1, 4);
    const [inner, end] = itemLines(lines, at, item[1].length + 2, width, item[4] ?? "");
    const gap = end < lines.length && blank(lines[end - 1]) && isItem(lines[end]);
    loose ||= Boolean(gap) || inner.some((line, i) => blank(line) && i < inner.length - 1 && !blank(inner[i + 1]) && !isItem(inner[i + 1].trimStart()));
    items.push(inner);
    at = end;
  }
  const number = parseInt(first[2], 10);
  const made = items.map((inner) => make("li", {}, loose ? blocks(inner, deep + 1) : tight(inner, deep + 1)));
  const ordered = !Number.isNaN(number);
  return [make(ordered ? "ol" : "ul", { start: ordered && number !== 1 ? number : undefined }, made), at];
}

/** The lines of an item without their indentation, and the line behind it. Two spaces more than the mark's are enough to belong. */
function itemLines(lines, at, least, width, first) {
  const inner = [first];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const indent = line.length - line.trimStart().length;
    if (blank(line)) {
      let next = end + 1;
      while (next < lines.length && blank(lines[next])) next += 1;
      if (next === lines.length || lines[next].length - lines[next].trimStart().length < least) return [inner, next];
      for (; end < next - 1; end += 1) inner.push("");
      inner.push("");
    } else if (indent >= least) inner.push(line.slice(Math.min(indent, width)));
    else if (isItem(line) || begins(lines, end, 0) || blank(lines[end - 1])) break;
    else inner.push(line.trimStart());
  }
  return [inner, end];
}

/** Blocks of which a paragraph is no element of its own. */
function tight(lines, deep) {
  return blocks(lines, deep).flatMap((one) => (one.nodeName === "P" ? [...one.childNodes] : [one]));
}

function paragraph(lines, at, deep) {
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !begins(lines, end, deep)) end += 1;
  return [make("p", {}, inline(lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd())), end];
}

function blocks(lines, deep) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (blank(lines[at])) at += 1;
    else {
      const [element, end] = block(lines, at, deep);
      found.push(element);
      at = end;
    }
  }
  return found;
}

const split = (text) => text.replaceAll("\r", "").replace(/^[ \t]*\t/gm, (tabs) => tabs.replaceAll("\t", "    ")).split("\n");

/** Draws a text that grows. Blocks that nothing can change any more are drawn once; the last ones are drawn again and patched in. */
export class Growing {
  constructor(place) {
    this.place = place;
    this.clear();
  }

  clear() {
    this.place.replaceChildren();
    this.settled = 0; // letters whose blocks are final
    this.drawn = ""; // the text that is shown
    this.tail = []; // elements of what may still change
  }

  update(text) {
    if (text === this.drawn) return;
    if (!text.startsWith(this.drawn)) this.clear();
    this.drawn = text;
    const raw = text.slice(this.settled).split("\n");
    const lines = split(raw.join("\n"));
    const found = [];
    for (let at = 0; at < lines.length; ) {
      if (blank(lines[at])) at += 1;
      else {
        const [element, end] = block(lines, at, 0);
        found.push({ element, at });
        at = end;
      }
    }
    this.show(found.map((one) => one.element));
    // A block is final once the next one has begun and two lines of it are whole: one may still make a table of it.
    const last = found.findLastIndex((one, i) => i > 0 && one.at + 2 < lines.length);
    if (last > 0) {
      this.settled += raw.slice(0, found[last].at).reduce((sum, line) => sum + line.length + 1, 0);
      this.tail = this.tail.slice(last);
    }
  }

  show(elements) {
    const before = this.tail;
    this.tail = elements.map((element, i) => {
      if (i < before.length) return patch(before[i], element);
      this.place.append(element);
      return element;
    });
    before.slice(elements.length).forEach((element) => element.remove());
  }
}
