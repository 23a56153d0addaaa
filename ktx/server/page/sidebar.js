// The list of stored conversations.

import { button, byId, make } from "./dom.js";
import * as store from "./store.js";
import { toast } from "./toast.js";

export class Sidebar {
  constructor() {
    this.chat = null; // the caller sets it
    this.current = null; // the visible conversation's id
    this.renaming = null; // id while a title is edited
    byId("new").addEventListener("click", () => this.select(null));
    byId("open-list").addEventListener("click", () => this.open(!document.body.classList.contains("sidebar-open")));
    addEventListener("storage", () => this.draw(this.current)); // another tab has changed the list
  }

  /** On a phone the sidebar covers the conversation. */
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
    const select = button(name, () => this.select(id), { class: "choose", "aria-current": id === this.current ? "true" : null });
    const rename = button("✎", (event) => this.rename(id, name, event.target.closest("li")), { "aria-label": `Rename ${name}`, title: "Rename" });
    const remove = button("×", () => this.remove(id, name), { "aria-label": `Delete ${name}`, title: "Delete" });
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
