// The views of a question and of an answer.

import { tokensPerSecond } from "./chat-stream.js";
import { button, make } from "./dom.js";
import { count, rate, seconds } from "./format.js";
import { MarkdownView } from "./markdown.js";

/** A question, as plain text. */
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

/** An answer, streaming or complete. */
export class AnswerView {
  constructor(message) {
    this.message = message;
    this.summary = make("summary", {}, "Reasoning");
    const reasoning = make("div", { class: "text" });
    this.details = make("details", { hidden: true }, this.summary, reasoning);
    const text = make("div", { class: "text" });
    this.notice = make("p", { class: "notice", hidden: true });
    this.numbers = make("span", { class: "numbers" });
    this.buttons = make("span", { class: "buttons" });
    this.foot = make("div", { class: "foot" }, this.buttons, this.numbers);
    this.element = make("article", { class: "answer", "aria-label": "Answer" }, this.details, text, this.notice, this.foot);
    this.text = new MarkdownView(text);
    this.reasoning = new MarkdownView(reasoning);
  }

  update({ last, copy, regenerate, elapsed = 0 }) {
    const { message } = this;
    const running = message.state === "running";
    const drawn = `${message.state} ${last}`;
    if (!running && drawn === this.drawn) return;
    this.drawn = drawn;
    this.element.setAttribute("aria-busy", String(running));
    this.details.hidden = !message.thought;
    this.summary.textContent = reasoningTitle(message, running);
    this.reasoning.update(message.thought);
    this.text.update(message.text);
    const [notice, isError] = noticeOf(message);
    this.notice.hidden = !notice;
    this.notice.textContent = notice;
    this.notice.classList.toggle("bad", isError);
    this.numbers.textContent = running ? progress(message.numbers, elapsed) : statistics(message.numbers);
    const labels = running ? [] : [...(message.text ? ["Copy"] : []), ...(last ? [message.state === "failed" ? "Try again" : "Regenerate"] : [])];
    this.buttons.replaceChildren(...labels.map((label) => button(label, label === "Copy" ? copy : regenerate)));
  }
}

function reasoningTitle({ numbers, text, state }, running) {
  if (running && !text) return "Thinking";
  const { thinking: elapsed, reasoning } = numbers;
  const tokens = reasoning ? `, ${count(reasoning)} tokens` : "";
  if (elapsed !== undefined) return `Thought for ${seconds(elapsed)}${tokens}`;
  return state === "stopped" ? "Reasoning (interrupted)" : "Reasoning";
}

/** The notice below the text, as [text, whether it is an error]. */
function noticeOf({ state, error, numbers, text, thought }) {
  if (state === "failed") return [error, true];
  if (state === "stopped") return ["Stopped.", false];
  if (state === "running") return ["", false];
  if (numbers.finish === "length") return ["Truncated: the maximum number of tokens was reached.", false];
  if (!text) return [thought ? "The model returned reasoning but no answer." : "The model returned an empty answer.", false];
  return ["", false];
}

function progress(numbers, elapsed) {
  if (numbers.first === undefined) return `processing the prompt, ${seconds(elapsed)}`;
  const speed = tokensPerSecond(numbers);
  return speed === null ? "" : `about ${rate(speed)} tok/s`;
}

function statistics(numbers) {
  const parts = [];
  const { answer, prompt, cached, first, seconds: total } = numbers;
  const speed = tokensPerSecond(numbers);
  if (answer !== undefined) {
    if (speed !== null) parts.push(`${rate(speed)} tok/s`);
    parts.push(`${count(answer)} tokens`, `${count(prompt)} prompt tokens${cached ? `, ${count(cached)} cached` : ""}`);
  }
  if (first !== undefined) parts.push(`first token after ${seconds(first)}`);
  if (total !== undefined) parts.push(`${seconds(total)} total`);
  return parts.join(" · ");
}
