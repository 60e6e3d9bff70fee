// Requests to the server that sent this page, with the key where one is needed.

import { byId, say } from "/page/dom.js";

const STORED = "xdit-key";

/** An error that the server has told. */
export class Refusal extends Error {
  constructor(status, error) {
    super(error.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.param = error.param ?? null;
  }
}

/** The server cannot be reached. */
export class Away extends Error {}

let key = sessionStorage.getItem(STORED) ?? "";
let asking = null;

/** Whether a key is used. */
export const hasKey = () => key !== "";

/**
 * An answer of the server that is no error. Where a key is missing or wrong it is asked for, as often as needed.
 * @throws {Refusal|Away}
 */
export async function ask(path, options = {}) {
  for (;;) {
    const used = key;
    const answer = await reach(path, options, used);
    if (answer.ok) return answer;
    const error = await errorOf(answer);
    if (answer.status !== 401) throw new Refusal(answer.status, error);
    if (used === key) await askKey(used ? error.message : "");
  }
}

/** An answer as data. */
export const read = async (path, options) => (await ask(path, options)).json();

/** Send data as JSON; the answer as data. */
export const send = (path, body, headers = {}) =>
  read(path, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers } });

async function reach(path, options, used) {
  const headers = { ...options.headers, ...(used ? { Authorization: `Bearer ${used}` } : {}) };
  try {
    return await fetch(path, { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Away("The server does not answer.");
  }
}

async function errorOf(answer) {
  try {
    return (await answer.json()).error ?? {};
  } catch {
    return {};
  }
}

/** Ask the person for a key; all requests that wait share one question. */
export function askKey(message = "") {
  const dialog = byId("key-dialog");
  const form = byId("key-form");
  say(byId("key-error"), message);
  byId("key").setAttribute("aria-invalid", String(message !== ""));
  asking ??= new Promise((resolve) => {
    const stay = () => dialog.open || dialog.showModal(); // without a key there is nothing to go back to
    form.onsubmit = (event) => {
      event.preventDefault();
      key = byId("key").value.trim();
      if (!key) return;
      sessionStorage.setItem(STORED, key);
      dialog.removeEventListener("close", stay);
      dialog.close();
      byId("key").value = "";
      byId("other-key").hidden = false;
      asking = null;
      resolve();
    };
    dialog.addEventListener("close", stay);
    stay();
  });
  return asking;
}

/**
 * The events of a job, as pairs of name and data, until the connection ends.
 * @param {AbortSignal} signal
 */
export async function* events(id, signal) {
  const answer = await ask(`/v1/jobs/${id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const name = lines.find((line) => line.startsWith("event: "))?.slice(7);
      const data = lines.find((line) => line.startsWith("data: "))?.slice(6);
      if (name) yield [name, JSON.parse(data)];
    }
  }
}
