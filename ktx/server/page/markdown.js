// Markdown blocks: headings, paragraphs, lists, quotes, code, tables. Model output is untrusted: HTML in it stays text.

import { button, make, patch } from "./dom.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 8; // of nested lists and quotes; deeper ones are paragraphs
const HEADING = /^ {0,3}(#{1,6})(?=\s|$)/;
const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*)|)$/;
const QUOTE = /^ {0,3}> ?/;
const CELL = /^\s*(:?)-+(:?)\s*$/;

const isBlank = (line) => line.trim() === "";

function isRule(line) {
  const marks = line.replaceAll(" ", "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

function isItem(line) {
  const item = ITEM.exec(line);
  return item && item[1].length < 4 && !isRule(line) ? item : null;
}

/** Whether an item can interrupt a paragraph: "1986. was a good year" does not start a list. */
function interrupts(line) {
  const item = isItem(line);
  return item && item[4] && (item[2].length === 1 || parseInt(item[2], 10) === 1);
}

function isTable(lines, at) {
  if (!lines[at]?.includes("|") || !lines[at + 1]?.includes("-")) return false;
  const below = cells(lines[at + 1]);
  return below.every((cell) => CELL.test(cell)) && below.length === cells(lines[at]).length;
}

const startsBlock = (lines, at, depth) =>
  HEADING.test(lines[at]) || FENCE.test(lines[at]) || isRule(lines[at]) || isTable(lines, at) || (depth < MAX_DEPTH && (QUOTE.test(lines[at]) || interrupts(lines[at])));

/** Parses the block that starts at line `at`, which is not blank. Returns [element, index of the next line]. */
function parseBlock(lines, at, depth) {
  const line = lines[at];
  const hashes = HEADING.exec(line);
  if (hashes) return [heading(hashes[1].length, line.slice(hashes[0].length).trim()), at + 1];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  if (isRule(line)) return [make("hr"), at + 1];
  if (isTable(lines, at)) return table(lines, at);
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quote(lines, at, depth);
  const item = depth < MAX_DEPTH && isItem(line);
  if (item) return list(lines, at, depth, item);
  return paragraph(lines, at, depth);
}

/** Level 1 becomes h3, because the page itself has h1 and h2. */
function heading(level, text) {
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  return make(`h${Math.min(6, level + 2)}`, {}, inline(end === 0 || isBlank(text[end - 1]) ? text.slice(0, end).trim() : text));
}

function code(lines, at, [, indent, fence, info]) {
  const closes = new RegExp(`^ {0,3}${fence[0]}{${fence.length},}[ \\t]*$`);
  let end = at + 1;
  while (end < lines.length && !closes.test(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent.length, line.length - line.trimStart().length)));
  const name = info.trim().split(/\s/)[0].slice(0, 40);
  const bar = make("div", { class: "bar" }, make("span", {}, name || "text"), button("Copy", null, { class: "quiet copy", "aria-label": "Copy this code" }));
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

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [make("blockquote", {}, parseBlocks(inner, depth + 1)), end];
}

/** Loose: blank lines between blocks, so items have paragraphs. */
function list(lines, at, depth, first) {
  const kind = first[2].at(-1);
  const items = [];
  let loose = false;
  while (at < lines.length) {
    const item = isItem(lines[at]);
    if (!item || item[2].at(-1) !== kind) break;
    const width = item[1].length + item[2].length + Math.min(item[3]?.length ?? 1, 4);
    const [inner, end] = itemLines(lines, at, item[1].length + 2, width, item[4] ?? "");
    const gap = end < lines.length && isBlank(lines[end - 1]) && isItem(lines[end]);
    loose ||= Boolean(gap) || inner.some((line, i) => isBlank(line) && i < inner.length - 1 && !isBlank(inner[i + 1]) && !isItem(inner[i + 1].trimStart()));
    items.push(inner);
    at = end;
  }
  const number = parseInt(first[2], 10);
  const children = items.map((inner) => make("li", {}, loose ? parseBlocks(inner, depth + 1) : tight(inner, depth + 1)));
  const ordered = !Number.isNaN(number);
  return [make(ordered ? "ol" : "ul", { start: ordered && number !== 1 ? number : undefined }, children), at];
}

/** [an item's lines without indentation, index of the next line]. `minIndent` is two more than the marker's indent. */
function itemLines(lines, at, minIndent, width, first) {
  const inner = [first];
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const indent = line.length - line.trimStart().length;
    if (isBlank(line)) {
      let next = end + 1;
      while (next < lines.length && isBlank(lines[next])) next += 1;
      if (next === lines.length || lines[next].length - lines[next].trimStart().length < minIndent) return [inner, next];
      for (; end < next - 1; end += 1) inner.push("");
      inner.push("");
    } else if (indent >= minIndent) inner.push(line.slice(Math.min(indent, width)));
    else if (isItem(line) || startsBlock(lines, end, 0) || isBlank(lines[end - 1])) break;
    else inner.push(line.trimStart());
  }
  return [inner, end];
}

/** Blocks with paragraphs unwrapped, for list items without blank lines. */
function tight(lines, depth) {
  return parseBlocks(lines, depth).flatMap((node) => (node.nodeName === "P" ? [...node.childNodes] : [node]));
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines, end, depth)) end += 1;
  return [make("p", {}, inline(lines.slice(at, end).map((line) => line.trimStart()).join("\n").trimEnd())), end];
}

function parseBlocks(lines, depth) {
  const elements = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) at += 1;
    else {
      const [element, end] = parseBlock(lines, at, depth);
      elements.push(element);
      at = end;
    }
  }
  return elements;
}

const splitLines = (text) => text.replaceAll("\r", "").replace(/^[ \t]*\t/gm, (tabs) => tabs.replaceAll("\t", "    ")).split("\n");

/** Renders streaming Markdown. Final blocks are rendered once; the last ones are rendered again and patched. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.clear();
  }

  clear() {
    this.element.replaceChildren();
    this.finalChars = 0; // of text whose blocks are final
    this.text = ""; // the rendered text
    this.tail = []; // elements that can still change
  }

  update(text) {
    if (text === this.text) return;
    if (!text.startsWith(this.text)) this.clear();
    this.text = text;
    const raw = text.slice(this.finalChars).split("\n");
    const lines = splitLines(raw.join("\n"));
    const blocks = [];
    for (let at = 0; at < lines.length; ) {
      if (isBlank(lines[at])) at += 1;
      else {
        const [element, end] = parseBlock(lines, at, 0);
        blocks.push({ element, at });
        at = end;
      }
    }
    this.show(blocks.map((block) => block.element));
    // A block is final once two lines of the next one are complete, because its second line can turn it into a table.
    const last = blocks.findLastIndex((block, i) => i > 0 && block.at + 2 < lines.length);
    if (last > 0) {
      this.finalChars += raw.slice(0, blocks[last].at).reduce((sum, line) => sum + line.length + 1, 0);
      this.tail = this.tail.slice(last);
    }
  }

  show(elements) {
    const before = this.tail;
    this.tail = elements.map((element, i) => {
      if (i < before.length) return patch(before[i], element);
      this.element.append(element);
      return element;
    });
    before.slice(elements.length).forEach((element) => element.remove());
  }
}
