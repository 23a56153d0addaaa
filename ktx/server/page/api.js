// HTTP client: the API key, errors with the server's message, and server-sent events.

import { byId } from "./dom.js";

const KEY = "ktx.key";
let keyPrompt = null; // of the open dialog, shared by all calls
let fallbackKey = ""; // if there is no session storage

/** An error response or a failed connection. `status` is 0 if there was no response. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? fallbackKey;
  } catch {
    return fallbackKey;
  }
}

function storeKey(value) {
  fallbackKey = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch (error) {
    console.info("No session storage; reloading loses the key:", error.message);
  }
}

/** Returns a 2xx response. Prompts for a key on 401, else throws ApiError. */
export async function call(path, { body, signal, method = body ? "POST" : "GET" } = {}) {
  for (;;) {
    const key = readKey();
    const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
    const response = await send(path, { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) });
    if (response.ok) return response;
    if (response.status !== 401) throw await toApiError(response);
    if (key === readKey() && !(await promptForKey(key !== ""))) throw new ApiError("This server requires an API key.", 401);
  }
}

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
}

async function toApiError(response) {
  const text = await response.text();
  let message = "";
  try {
    message = JSON.parse(text).error?.message ?? "";
  } catch {
    // not JSON, for example a proxy's error page
  }
  message ||= `The server returned status ${response.status} without an error message.`;
  const retryAfter = response.headers.get("retry-after");
  if (retryAfter && (response.status === 429 || response.status === 503)) message += ` Retry after ${retryAfter} s.`;
  return new ApiError(message, response.status);
}

/** Resolves to whether a key was entered. */
function promptForKey(rejected) {
  keyPrompt ??= new Promise((resolve) => {
    const [dialog, form, field] = [byId("key"), byId("key-form"), byId("key-field")];
    const finish = (entered) => {
      keyPrompt = null;
      form.onsubmit = dialog.onclose = null;
      dialog.close();
      resolve(entered);
    };
    byId("key-text").textContent = rejected
      ? "The server rejected this key. Enter one of the keys that it was started with."
      : "It was started with --api_key. The key is stored in this tab only, until the tab is closed.";
    field.value = "";
    form.onsubmit = (event) => {
      event.preventDefault();
      storeKey(field.value.trim());
      finish(true);
    };
    byId("no-key").onclick = () => finish(false);
    dialog.onclose = () => finish(false);
    dialog.showModal();
    field.focus();
  });
  return keyPrompt;
}

/** Yields the parsed events up to [DONE]. Throws ApiError for an error event or a lost connection. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection was lost before the answer was complete.");
    }
    if (chunk.done) throw new ApiError("The connection closed before the answer was complete.");
    const lines = (buffer + chunk.value).split("\n");
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message ?? "The request failed.");
      yield event;
    }
  }
}
