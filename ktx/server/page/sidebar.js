// The conversations at the side.

import { byId, make } from "./dom.js";
import * as store from "./store.js";
import { toast } from "./toast.js";

/** Draws the list; `chat` shows what is chosen in it. */
export class List {
  constructor() {
    this.chat = null;
    this.shown = null; // id
    this.naming = null; // id of the one that gets another name
    byId("new").addEventListener("click", () => this.choose(null));
    byId("open-list").addEventListener("click", () => this.open(!document.body.classList.contains("listed")));
    addEventListener("storage", () => this.draw(this.shown)); // another tab has written
  }

  /** On a phone the list lies over the conversation. */
  open(on) {
    document.body.classList.toggle("listed", on);
    byId("open-list").setAttribute("aria-expanded", String(on));
  }

  choose(id) {
    this.open(false);
    this.chat.show(id);
    byId("question").focus();
  }

  draw(shown) {
    this.shown = shown;
    if (this.naming) return;
    byId("list").replaceChildren(...store.list().map((entry) => this.item(entry)));
  }

  item({ id, title }) {
    const name = title || "Without a title";
    const choose = make("button", { type: "button", class: "choose", click: () => this.choose(id), "aria-current": id === this.shown ? "true" : null }, name);
    const rename = make("button", { type: "button", class: "quiet", "aria-label": `Rename ${name}`, title: "Rename", click: (event) => this.rename(id, name, event.target.closest("li")) }, "✎");
    const forget = make("button", { type: "button", class: "quiet", "aria-label": `Delete ${name}`, title: "Delete", click: () => this.forget(id, name) }, "×");
    return make("li", {}, choose, rename, forget);
  }

  rename(id, name, item) {
    const field = make("input", { "aria-label": "New title", maxlength: 120 });
    const end = (kept) => {
      if (this.naming !== id) return;
      this.naming = null;
      const title = field.value.trim();
      if (kept && title) this.name(id, title);
      this.draw(this.shown);
      byId("list").querySelector("[aria-current]")?.focus();
    };
    this.naming = id;
    field.value = name;
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === "Escape") {
        event.stopPropagation();
        end(event.key === "Enter");
      }
    });
    field.addEventListener("blur", () => end(true));
    item.replaceChildren(field);
    field.select();
  }

  name(id, title) {
    if (id === this.chat.talk.id) this.chat.talk.title = title;
    const running = this.chat.running.get(id);
    if (running) running.talk.title = title;
    store.rename(id, title);
    this.chat.draw(false);
  }

  forget(id, name) {
    this.chat.running.get(id)?.stop();
    const talk = store.read(id);
    store.forget(id);
    if (id === this.shown) this.chat.show(null);
    else this.draw(this.shown);
    byId("new").focus();
    toast(`Deleted: ${name}.`, "Undo", () => {
      if (talk) store.write(talk);
      this.choose(id);
    });
  }
}
