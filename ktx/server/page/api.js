// Asking the server: the key, errors in words, and streams.

import { byId } from "./dom.js";

const KEY = "ktx.key";
let asking = null; // of one dialog, whoever needs the key
let unkept = ""; // where the browser keeps nothing

/** An answer that is an error. `status` is 0 when there was none. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function key() {
  try {
    return sessionStorage.getItem(KEY) ?? unkept;
  } catch {
    return unkept;
  }
}

function keep(value) {
  unkept = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch (error) {
    console.info("The key is kept until this page is left:", error.message);
  }
}

/** The response, once it is a good one. Asks for a key when the server wants one, and throws ApiError. */
export async function call(path, { body, signal, method = body ? "POST" : "GET" } = {}) {
  for (;;) {
    const used = key();
    const headers = { ...(used && { authorization: `Bearer ${used}` }), ...(body && { "content-type": "application/json" }) };
    const response = await reached(path, { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) });
    if (response.ok) return response;
    if (response.status !== 401) throw await problem(response);
    if (used === key() && !(await askForKey(used !== ""))) throw new ApiError("This server wants a key, and none was given.", 401);
  }
}

async function reached(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
}

async function problem(response) {
  const text = await response.text();
  let said = "";
  try {
    said = JSON.parse(text).error?.message ?? "";
  } catch {
    said = ""; // not ours: a proxy's page
  }
  said ||= `The server answered with status ${response.status} and no reason.`;
  const wait = response.headers.get("retry-after");
  if (wait && (response.status === 429 || response.status === 503)) said += ` It asks to be tried again in ${wait} s.`;
  return new ApiError(said, response.status);
}

function askForKey(refused) {
  asking ??= new Promise((resolve) => {
    const [dialog, form, field] = [byId("key"), byId("key-form"), byId("key-field")];
    const done = (given) => {
      asking = null;
      form.onsubmit = dialog.onclose = null;
      dialog.close();
      resolve(given);
    };
    byId("key-words").textContent = refused
      ? "That key was refused. Is it one of those the server was started with?"
      : "It was started with --api_key. The key stays in this tab and is forgotten with it.";
    field.value = "";
    form.onsubmit = (event) => {
      event.preventDefault();
      keep(field.value.trim());
      done(true);
    };
    byId("no-key").onclick = () => done(false);
    dialog.onclose = () => done(false);
    dialog.showModal();
    field.focus();
  });
  return asking;
}

/** The events of a stream, each a parsed value, until [DONE]. Throws ApiError for one that is an error. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection broke before the answer ended.");
    }
    if (piece.done) throw new ApiError("The connection ended before the answer did.");
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new ApiError(value.error.message ?? "The answer failed.");
      yield value;
    }
  }
}
