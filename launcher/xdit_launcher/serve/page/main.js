// The page: asks what the server can do, takes jobs from the form, and shows all jobs of this key.

import { Away, ask, askKey, hasKey, read, send } from "/page/client.js";
import { showDetails } from "/page/details.js";
import { announce, byId, say } from "/page/dom.js";
import { Form, Mistake } from "/page/form.js";
import { showPlan } from "/page/plan.js";
import { forget } from "/page/results.js";
import { Streams } from "/page/streams.js";
import { Tile } from "/page/tile.js";

const PAGE = 24; // jobs that are listed at once
const STREAMS = 2; // a browser opens six connections to a server, for all tabs together
const BUSY = 2000; // milliseconds between two looks while a job is active
const IDLE = 10_000;
const LONGEST_PAUSE = 30_000;

const tiles = new Map();
const gallery = byId("gallery");
const streams = new Streams(onEvent, follow);
const acts = { cancel, again, remove, open: (tile) => showDetails(tile, titles()) };
let form = null;
let described = "";
let oldest = null; // id of the last job of the listing that goes on with `older`
let pause = 0;
let timer = null;
let looking = false;
let request = {}; // the one that was sent last and got no answer

const active = () => [...tiles.values()].filter((tile) => tile.active);
const titles = () => new Map(form.model.settings.map(({ name, title }) => [name, title]));

/** Look at the server: whether it is ready, and what has become of the jobs. */
async function look() {
  clearTimeout(timer);
  if (looking) return;
  looking = true;
  try {
    await describe();
    await list();
    const ready = await showState();
    pause = active().length > 0 || !ready ? BUSY : IDLE;
  } catch (error) {
    const away = error instanceof Away;
    if (away) described = ""; // it may come back with another model
    state(away ? "away" : "error", away ? "away" : "error");
    say(byId("banner"), away ? "The server does not answer. This page tries again by itself." : error.message);
    pause = Math.min(LONGEST_PAUSE, Math.max(1000, pause * 2));
  }
  looking = false;
  follow();
  if (!document.hidden) timer = setTimeout(look, pause);
}

/** Make form and drawing, once and whenever the server has changed. */
async function describe() {
  if (described) return;
  const [model, plan] = await Promise.all([read("/v1/settings"), read("/v1/plan")]);
  described = JSON.stringify([model, plan]);
  byId("other-key").hidden = !hasKey();
  if (described === byId("form").described) return;
  byId("form").described = described;
  byId("model").textContent = model.model;
  document.title = `${model.model} - xdit`;
  form = new Form(model);
  showPlan(plan);
}

async function showState() {
  const { ready } = await read("/health");
  state(ready ? "ready" : "loading", ready ? "ready" : "loading");
  say(byId("banner"), ready ? null : "The model is being loaded. Jobs wait until it is there.");
  return ready;
}

function state(name, text) {
  const shown = byId("state");
  if (shown.dataset.state === name) return;
  shown.dataset.state = name;
  shown.textContent = text;
}

/** Bring the gallery up to date with the newest jobs, and with those that have not ended. */
async function list() {
  const known = [...tiles.keys()];
  const { data, has_more: more } = await read(`/v1/jobs?limit=${PAGE}`);
  const listed = new Set(data.map((job) => job.id));
  if (oldest === null || !tiles.has(oldest)) {
    oldest = data.at(-1)?.id ?? null;
    byId("older").hidden = !more;
  }
  const unlisted = (id) => !listed.has(id);
  if (known.length === 0 ? more : active().some(({ job }) => unlisted(job.id))) {
    for (const status of ["running", "queued"]) {
      for (const job of (await read(`/v1/jobs?status=${status}&limit=100`)).data) {
        if (unlisted(job.id)) data.push(job);
        listed.add(job.id);
      }
    }
  }
  const last = data.length > 0 && more ? Math.min(...data.map((job) => job.created)) : -Infinity;
  for (const id of known.filter(unlisted)) {
    const tile = tiles.get(id);
    if (tile && (tile.active || tile.job.created >= last)) drop(tile);
  }
  data.forEach(put);
}

/** Show a job, at its place among the others: the newest are first. */
function put(job) {
  const known = tiles.get(job.id);
  if (known) {
    if (known.active) ended(known, job);
    known.update(job);
  } else {
    const tile = new Tile(job, acts);
    tiles.set(job.id, tile);
    const next = [...gallery.children].find((other) => tiles.get(other.dataset.id).job.created < job.created);
    gallery.insertBefore(tile.root, next ?? null);
  }
  count();
}

function ended(tile, job) {
  const words = { done: "is finished", failed: "has failed", cancelled: "was cancelled" }[job.status];
  if (words) announce(`${job.prompt} ${words}`);
}

function drop(tile) {
  if (oldest === tile.job.id) oldest = tile.root.previousElementSibling?.dataset.id ?? null;
  forget(tile.job);
  tile.close();
  tiles.delete(tile.job.id);
  count();
}

function count() {
  const many = active().length;
  byId("empty").hidden = tiles.size > 0;
  document.title = `${many > 0 ? `(${many}) ` : ""}${byId("model").textContent} - xdit`;
}

/** Follow the events of the job that is drawn and of the next one. */
function follow() {
  const place = ({ job }) => (job.status === "running" ? 0 : (job.position ?? Infinity));
  const next = active().sort((one, other) => place(one) - place(other));
  streams.follow(document.hidden ? [] : next.slice(0, STREAMS).map((tile) => tile.job.id));
}

function onEvent(id, name, data) {
  const tile = tiles.get(id);
  if (!tile) return;
  if (["done", "failed", "cancelled"].includes(name)) {
    if (data.prompt !== undefined) put(data);
    soon();
  } else if (name === "closing") {
    soon();
  } else {
    tile.take(name, data);
  }
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(look, 50);
}

async function cancel(tile) {
  try {
    const job = await (await ask(`/v1/jobs/${tile.job.id}`, { method: "DELETE" })).json();
    if (!["queued", "running"].includes(job.status)) put(job);
  } catch (error) {
    say(byId("banner"), error.message);
    throw error;
  }
  soon();
}

function again(tile) {
  form.take(tile.job);
}

async function remove(tile) {
  try {
    await ask(`/v1/jobs/${tile.job.id}?purge=true`, { method: "DELETE" });
    drop(tile);
  } catch (error) {
    say(byId("banner"), error.message);
  }
  soon();
}

/** Send what is in the form. A request that got no answer is sent again under the same name, so no job is made twice. */
async function generate() {
  form.clear();
  const button = byId("generate");
  button.setAttribute("aria-busy", "true");
  try {
    const body = form.body();
    const text = JSON.stringify(body);
    if (request.text !== text) request = { text, name: nameOfRequest() };
    const job = await send("/v1/jobs", body, { "Idempotency-Key": request.name });
    request = {};
    put(job);
    announce(`${job.prompt} is in the queue`);
    follow();
    soon();
  } catch (error) {
    const param = error instanceof Mistake ? error.param : error.param ?? null;
    form.fail(error instanceof Away ? `${error.message} Try again.` : error.message, param);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

function nameOfRequest() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (form && byId("generate").getAttribute("aria-busy") === null) generate();
});
byId("form").addEventListener("keydown", (event) => {
  const text = event.target.tagName === "TEXTAREA";
  if (event.key !== "Enter" || event.isComposing || !(text || event.ctrlKey || event.metaKey) || event.shiftKey) return;
  event.preventDefault();
  byId("form").requestSubmit();
});
byId("form").addEventListener("input", () => form?.keep());
byId("defaults").addEventListener("click", () => form?.reset());
byId("other-key").addEventListener("click", async () => {
  await askKey();
  location.reload();
});
byId("older").addEventListener("click", async () => {
  try {
    const { data, has_more: more } = await read(`/v1/jobs?limit=${PAGE}&after=${oldest}`);
    data.forEach(put);
    oldest = data.at(-1)?.id ?? oldest;
    byId("older").hidden = !more;
  } catch (error) {
    say(byId("banner"), error.message);
  }
});
document.addEventListener("visibilitychange", () => (document.hidden ? follow() : look()));
const wide = matchMedia("(min-width: 900px)");
const unfold = () => ["settings", "plan"].forEach((id) => (byId(id).open = wide.matches));
wide.addEventListener("change", unfold);
unfold();
look();
