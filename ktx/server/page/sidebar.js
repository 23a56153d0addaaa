// The sidebar: the list of stored conversations.

import { byId, make } from "./dom.js";
import * as store from "./store.js";
import { toast } from "./toast.js";

export class Sidebar {
  constructor() {
    this.chat = null; // the Chat that shows the selected conversation; the caller sets it
    this.current = null; // id of the visible conversation
    this.renaming = null; // id of the conversation whose title is being edited
    byId("new").addEventListener("click", () => this.select(null));
    byId("open-list").addEventListener("click", () => this.open(!document.body.classList.contains("sidebar-open")));
    addEventListener("storage", () => this.draw(this.current)); // another tab has changed the list
  }

  /** Opens or closes the sidebar, which covers the conversation on a phone. */
  open(on) {
    document.body.classList.toggle("sidebar-open", on);
    byId("open-list").setAttribute("aria-expanded", String(on));
  }

  select(id) {
    this.open(false);
    this.chat.show(id);
    byId("question").focus();
  }

  draw(current) {
    this.current = current;
    if (this.renaming) return;
    byId("list").replaceChildren(...store.list().map((entry) => this.item(entry)));
  }

  item({ id, title }) {
    const name = title || "Untitled";
    const select = make("button", { type: "button", class: "choose", click: () => this.select(id), "aria-current": id === this.current ? "true" : null }, name);
    const rename = make("button", { type: "button", class: "quiet", "aria-label": `Rename ${name}`, title: "Rename", click: (event) => this.rename(id, name, event.target.closest("li")) }, "✎");
    const remove = make("button", { type: "button", class: "quiet", "aria-label": `Delete ${name}`, title: "Delete", click: () => this.remove(id, name) }, "×");
    return make("li", {}, select, rename, remove);
  }

  rename(id, name, item) {
    const field = make("input", { "aria-label": "New title", maxlength: 120 });
    const finish = (accepted) => {
      if (this.renaming !== id) return;
      this.renaming = null;
      const title = field.value.trim();
      if (accepted && title) this.setTitle(id, title);
      this.draw(this.current);
      byId("list").querySelector("[aria-current]")?.focus();
    };
    this.renaming = id;
    field.value = name;
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === "Escape") {
        event.stopPropagation();
        finish(event.key === "Enter");
      }
    });
    field.addEventListener("blur", () => finish(true));
    item.replaceChildren(field);
    field.select();
  }

  setTitle(id, title) {
    if (id === this.chat.conversation.id) this.chat.conversation.title = title;
    const stream = this.chat.streams.get(id);
    if (stream) stream.conversation.title = title;
    store.rename(id, title);
    this.chat.draw(false);
  }

  remove(id, name) {
    this.chat.streams.get(id)?.stop();
    const conversation = store.read(id);
    store.remove(id);
    if (id === this.current) this.chat.show(null);
    else this.draw(this.current);
    byId("new").focus();
    toast(`Deleted: ${name}.`, "Undo", () => {
      if (conversation) store.write(conversation);
      this.select(id);
    });
  }
}
