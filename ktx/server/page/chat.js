// The visible conversation: sends, stops and regenerates messages.

import { ChatStream, newAnswer } from "./chat-stream.js";
import { byId, copy } from "./dom.js";
import { count } from "./format.js";
import { AnswerView, QuestionView } from "./message.js";
import * as store from "./store.js";
import { toast } from "./toast.js";

const SAVE_INTERVAL_MS = 2000; // while an answer streams
const REDRAW_INTERVAL_MS = 500; // of the elapsed time
const FOLLOW_PX = 80; // scrolls with the end if at most this far from it
const MAX_TITLE_CHARS = 60;

const newConversation = () => ({ id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", messages: [] });

export class Chat {
  /** `onListChange(visibleId)` must redraw the sidebar. */
  constructor(onListChange) {
    this.onListChange = onListChange;
    this.model = null; // {id, context}, once /v1/models has returned it
    this.streams = new Map(); // conversation id -> ChatStream; also of conversations that are not visible
    this.log = byId("messages");
    this.input = byId("question");
    this.frame = 0; // the pending animation frame
    this.conversation = newConversation();
    this.views = [];
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("cancel-edit").addEventListener("click", () => this.edit(false));
    this.input.addEventListener("input", () => this.resizeInput());
    this.input.addEventListener("keydown", (event) => this.onKey(event));
    addEventListener("pagehide", () => this.streams.forEach((stream) => stream.stop()));
    this.log.addEventListener("click", (event) => copyCode(event.target));
  }

  /** Shows the conversation with this id, else a new one. */
  show(id) {
    this.conversation = this.streams.get(id)?.conversation ?? (id && store.read(id)) ?? newConversation();
    this.views = [];
    this.log.replaceChildren();
    this.edit(false);
    this.draw(true);
    store.writeCurrent(this.conversation.id);
    this.onListChange(this.conversation.id);
  }

  onKey(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.send();
  }

  send() {
    const { conversation } = this;
    const text = this.input.value.trim();
    if (!text || !this.model || this.streams.has(conversation.id)) return;
    if (this.editing) conversation.messages.splice(this.lastQuestion());
    this.edit(false);
    conversation.title ||= text.split("\n")[0].slice(0, MAX_TITLE_CHARS);
    conversation.messages.push({ role: "user", text });
    this.generate();
  }

  regenerate() {
    const { conversation } = this;
    if (this.streams.has(conversation.id)) return;
    conversation.messages.splice(this.lastQuestion() + 1);
    this.input.focus();
    this.generate();
  }

  lastQuestion() {
    return this.conversation.messages.findLastIndex((message) => message.role === "user");
  }

  /** Starts or cancels editing the last question. */
  edit(on) {
    this.input.value = on ? this.conversation.messages[this.lastQuestion()].text : "";
    this.editing = on;
    byId("editing").hidden = !on;
    this.resizeInput();
    if (on) this.input.focus();
  }

  stop() {
    const stream = this.streams.get(this.conversation.id);
    if (!stream) return;
    stream.stop();
    this.input.focus();
  }

  /** Streams an answer into a new message. */
  async generate() {
    const { conversation } = this;
    const message = newAnswer();
    conversation.messages.push(message);
    let saved = performance.now();
    const stream = new ChatStream(conversation, message, () => {
      if (performance.now() - saved > SAVE_INTERVAL_MS) {
        saved = performance.now();
        store.write(conversation);
      }
      this.requestDraw();
    });
    this.streams.set(conversation.id, stream);
    this.save(conversation);
    this.draw(true);
    const timer = setInterval(() => this.requestDraw(), REDRAW_INTERVAL_MS);
    await stream.run(this.model.id);
    clearInterval(timer);
    this.streams.delete(conversation.id);
    this.save(conversation);
    this.draw(false);
    if (conversation === this.conversation) this.announce(message);
  }

  save(conversation) {
    if (!store.write(conversation)) toast("The browser could not store the conversation.");
    this.onListChange(this.conversation.id);
  }

  /** Announces the complete answer to screen readers, once. */
  announce(message) {
    const last = this.views.at(-1)?.element.querySelector(".answer > .text")?.textContent ?? message.text;
    const end = { done: "", stopped: " The answer was stopped.", failed: ` The answer failed: ${message.error}` }[message.state];
    byId("announcer").textContent = last + end;
  }

  requestDraw() {
    this.frame ||= requestAnimationFrame(() => this.draw(false));
  }

  draw(toEnd) {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const { conversation, log, views } = this;
    const follow = toEnd || log.scrollHeight - log.scrollTop - log.clientHeight < FOLLOW_PX;
    const stale = views.findIndex((view, i) => view.message !== conversation.messages[i]);
    if (stale >= 0) views.splice(stale).forEach((view) => view.element.remove());
    for (const message of conversation.messages.slice(views.length)) {
      const view = message.role === "user" ? new QuestionView(message) : new AnswerView(message);
      view.message = message;
      views.push(view);
      log.append(view.element);
    }
    const stream = this.streams.get(conversation.id);
    const question = stream ? -1 : this.lastQuestion();
    views.forEach((view, i) =>
      view.update({
        last: !stream && (i === question || i === views.length - 1),
        elapsed: stream?.elapsed(),
        edit: () => this.edit(true),
        regenerate: () => this.regenerate(),
        copy: () => copyText(view.message.text),
      }),
    );
    log.classList.toggle("empty", views.length === 0);
    byId("title").textContent = conversation.title || "New chat";
    byId("send").hidden = Boolean(stream);
    byId("stop").hidden = !stream;
    this.showContextUsage();
    if (follow) log.scrollTop = log.scrollHeight;
  }

  showContextUsage() {
    const { prompt, answer } = this.conversation.messages.findLast((message) => message.numbers?.answer !== undefined)?.numbers ?? {};
    const context = this.model?.context;
    byId("context-usage").textContent = !context ? "" : prompt === undefined ? `${count(context)} tokens of context.` : `${count(prompt + answer)} of ${count(context)} tokens of context used.`;
  }

  resizeInput() {
    this.input.style.height = "auto";
    this.input.style.height = `${this.input.scrollHeight + 2}px`;
  }

  /** Sets the served model; null disables sending. */
  setModel(model) {
    this.model = model;
    byId("send").disabled = !model;
    this.showContextUsage();
  }
}

async function copyText(text) {
  try {
    await copy(text);
    toast("Copied.");
  } catch (error) {
    toast(`Not copied: ${error.message}`);
  }
}

function copyCode(target) {
  if (target.classList.contains("copy")) copyText(target.closest(".code").querySelector("pre").textContent);
}
