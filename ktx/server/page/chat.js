// The conversation that is shown: asking, stopping, asking again.

import { Answering, emptyAnswer } from "./chat-stream.js";
import { byId, copy } from "./dom.js";
import { AnswerView, QuestionView } from "./message.js";
import * as store from "./store.js";
import { toast } from "./toast.js";
import { count } from "./format.js";

const SAVED_EACH = 2000; // milliseconds while an answer grows
const NEAR = 80; // pixels from the end within which the view follows it
const TITLE = 60; // letters

const newTalk = () => ({ id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", messages: [] });

export class Chat {
  /** `listChanged(id)` is called when the list of conversations has to be drawn anew. */
  constructor(listChanged) {
    this.listChanged = listChanged;
    this.model = null; // {id, context} once the server has told
    this.running = new Map(); // conversation's id -> Answering; they go on while another one is shown
    this.place = byId("messages");
    this.question = byId("question");
    this.drawing = 0;
    this.talk = newTalk();
    this.views = [];
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("keep").addEventListener("click", () => this.edit(false));
    this.question.addEventListener("input", () => this.fit());
    this.question.addEventListener("keydown", (event) => this.key(event));
    addEventListener("pagehide", () => this.running.forEach((answering) => answering.stop()));
    this.place.addEventListener("click", (event) => copyCode(event.target));
  }

  /** Shows a conversation by its id, or a new one. */
  show(id) {
    this.talk = this.running.get(id)?.talk ?? (id && store.read(id)) ?? newTalk();
    this.views = [];
    this.place.replaceChildren();
    this.edit(false);
    this.draw(true);
    store.rememberShown(this.talk.id);
    this.listChanged(this.talk.id);
  }

  key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.send();
  }

  send() {
    const text = this.question.value.trim();
    if (!text || !this.model || this.running.has(this.talk.id)) return;
    if (this.editing) this.talk.messages.splice(this.lastQuestion());
    this.edit(false);
    this.talk.title ||= text.split("\n")[0].slice(0, TITLE);
    this.talk.messages.push({ role: "user", text });
    this.answer();
  }

  again() {
    if (this.running.has(this.talk.id)) return;
    this.talk.messages.splice(this.lastQuestion() + 1);
    this.question.focus();
    this.answer();
  }

  lastQuestion() {
    return this.talk.messages.findLastIndex((message) => message.role === "user");
  }

  /** Puts the last question back into the field, or takes it out again. */
  edit(on) {
    this.question.value = on ? this.talk.messages[this.lastQuestion()].text : "";
    this.editing = on;
    byId("editing").hidden = !on;
    this.fit();
    if (on) this.question.focus();
  }

  stop() {
    const answering = this.running.get(this.talk.id);
    if (!answering) return;
    answering.stop();
    this.question.focus();
  }

  async answer() {
    const { talk } = this;
    const message = emptyAnswer();
    talk.messages.push(message);
    let saved = performance.now();
    const answering = new Answering(talk, message, () => {
      if (performance.now() - saved > SAVED_EACH) {
        saved = performance.now();
        store.write(talk);
      }
      this.drawSoon();
    });
    this.running.set(talk.id, answering);
    this.keep(talk);
    this.draw(true);
    const ticking = setInterval(() => this.drawSoon(), 500); // the seconds before the first token
    await answering.run(this.model.id);
    clearInterval(ticking);
    this.running.delete(talk.id);
    this.keep(talk);
    this.draw(false);
    if (talk === this.talk) this.say(message);
  }

  keep(talk) {
    if (!store.write(talk)) toast("This browser could not keep the conversation.");
    this.listChanged(this.talk.id);
  }

  /** For screen readers, once and whole. */
  say(message) {
    const last = this.views.at(-1)?.element.querySelector(".answer > .text")?.textContent ?? message.text;
    const end = { done: "", stopped: " The answer was stopped.", failed: ` The answer failed: ${message.error}` }[message.state];
    byId("said").textContent = last + end;
  }

  drawSoon() {
    this.drawing ||= requestAnimationFrame(() => this.draw(false));
  }

  draw(toEnd) {
    cancelAnimationFrame(this.drawing);
    this.drawing = 0;
    const { talk, place, views } = this;
    const follow = toEnd || place.scrollHeight - place.scrollTop - place.clientHeight < NEAR;
    const same = views.findIndex((view, i) => view.message !== talk.messages[i]);
    if (same >= 0) views.splice(same).forEach((view) => view.element.remove());
    for (const message of talk.messages.slice(views.length)) {
      const view = message.role === "user" ? new QuestionView(message) : new AnswerView(message);
      view.message = message;
      views.push(view);
      place.append(view.element);
    }
    const answering = this.running.get(talk.id);
    const question = answering ? -1 : this.lastQuestion();
    views.forEach((view, i) =>
      view.update({
        last: !answering && (i === question || i === views.length - 1),
        elapsed: answering?.elapsed(),
        edit: () => this.edit(true),
        again: () => this.again(),
        copy: () => copied(view.message.text),
      }),
    );
    place.classList.toggle("empty", views.length === 0);
    byId("title").textContent = talk.title || "New chat";
    byId("send").hidden = Boolean(answering);
    byId("stop").hidden = !answering;
    this.tellRoom();
    if (follow) place.scrollTop = place.scrollHeight;
  }

  /** How much of the context the conversation takes. */
  tellRoom() {
    const { prompt, answer } = this.talk.messages.findLast((message) => message.numbers?.answer !== undefined)?.numbers ?? {};
    const context = this.model?.context;
    byId("room").textContent = !context ? "" : prompt === undefined ? `${count(context)} tokens of context.` : `${count(prompt + answer)} of ${count(context)} tokens of context used.`;
  }

  fit() {
    this.question.style.height = "auto";
    this.question.style.height = `${this.question.scrollHeight + 2}px`;
  }

  /** The server has told which model it has. */
  meet(model) {
    this.model = model;
    byId("send").disabled = !model;
    this.tellRoom();
  }
}

async function copied(text) {
  try {
    await copy(text);
    toast("Copied.");
  } catch (error) {
    toast(`Not copied: ${error.message}`);
  }
}

function copyCode(target) {
  if (target.classList.contains("copy")) copied(target.closest(".code").querySelector("pre").textContent);
}
