// How a message looks.

import { speed } from "./chat-stream.js";
import { make } from "./dom.js";
import { Growing } from "./markdown.js";
import { count, rate, seconds } from "./format.js";

const button = (name, act, more = {}) => make("button", { type: "button", class: "quiet", click: act, ...more }, name);

/** A question as it was typed. `actions`: {edit} of the last one. */
export class QuestionView {
  constructor(message) {
    this.buttons = make("div", { class: "buttons" });
    this.element = make("article", { class: "question", "aria-label": "You" }, make("p", {}, message.text), this.buttons);
  }

  update({ last, edit }) {
    if (last === this.last) return;
    this.last = last;
    this.buttons.replaceChildren(...(last ? [button("Edit", edit)] : []));
  }
}

/** An answer while it grows and after. */
export class AnswerView {
  constructor(message) {
    this.message = message;
    this.summary = make("summary", {}, "Thoughts");
    const thoughts = make("div", { class: "text" });
    this.details = make("details", { hidden: true }, this.summary, thoughts);
    const text = make("div", { class: "text" });
    this.notice = make("p", { class: "notice", hidden: true });
    this.numbers = make("span", { class: "numbers" });
    this.buttons = make("span", { class: "buttons" });
    this.foot = make("div", { class: "foot" }, this.buttons, this.numbers);
    this.element = make("article", { class: "answer", "aria-label": "Answer" }, this.details, text, this.notice, this.foot);
    this.text = new Growing(text);
    this.thoughts = new Growing(thoughts);
  }

  update({ last, copy, again, elapsed = 0 }) {
    const { message } = this;
    const running = message.state === "running";
    const drawn = `${message.state} ${last}`;
    if (!running && drawn === this.drawn) return;
    this.drawn = drawn;
    this.element.setAttribute("aria-busy", String(running));
    this.details.hidden = !message.thought;
    this.summary.textContent = thinking(message, running);
    this.thoughts.update(message.thought);
    this.text.update(message.text);
    const [notice, bad] = noticed(message);
    this.notice.hidden = !notice;
    this.notice.textContent = notice;
    this.notice.classList.toggle("bad", bad);
    this.numbers.textContent = running ? progress(message.numbers, elapsed) : told(message.numbers);
    const wanted = running ? [] : [...(message.text ? ["Copy"] : []), ...(last ? [message.state === "failed" ? "Try again" : "Regenerate"] : [])];
    this.buttons.replaceChildren(...wanted.map((name) => button(name, name === "Copy" ? copy : again)));
  }
}

function thinking({ numbers, text, state }, running) {
  if (running && !text) return "Thinking";
  const { thinking: took, reasoning } = numbers;
  const tokens = reasoning ? `, ${count(reasoning)} tokens` : "";
  if (took !== undefined) return `Thought for ${seconds(took)}${tokens}`;
  return state === "stopped" ? "Thoughts, cut short" : "Thoughts";
}

/** [what is told besides the text, whether it is bad news]. */
function noticed({ state, error, numbers, text, thought }) {
  if (state === "failed") return [error, true];
  if (state === "stopped") return ["Stopped.", false];
  if (state === "running") return ["", false];
  if (numbers.finish === "length") return ["Cut: the largest number of tokens was reached.", false];
  if (!text) return [thought ? "The model thought and said nothing." : "The model said nothing.", false];
  return ["", false];
}

function progress(numbers, elapsed) {
  if (numbers.first === undefined) return `reading the prompt, ${seconds(elapsed)}`;
  const now = speed(numbers);
  return now === null ? "" : `about ${rate(now)} tok/s`;
}

function told(numbers) {
  const found = [];
  const { answer, prompt, cached, first, seconds: whole } = numbers;
  const now = speed(numbers);
  if (answer !== undefined) {
    if (now !== null) found.push(`${rate(now)} tok/s`);
    found.push(`${count(answer)} tokens`, `prompt of ${count(prompt)}${cached ? `, ${count(cached)} cached` : ""}`);
  }
  if (first !== undefined) found.push(`first after ${seconds(first)}`);
  if (whole !== undefined) found.push(`${seconds(whole)} in all`);
  return found.join(" · ");
}
