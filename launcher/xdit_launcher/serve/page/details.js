// A finished job in large: all of its results, its settings, and where its time went.

import { byId, element } from "/page/dom.js";
import { save } from "/page/results.js";
import { bar, legend } from "/page/times.js";
import { removeButton, shownResult } from "/page/tile.js";

const HIDDEN = ["video", "fps", "call", "lora"]; // settings that say nothing here, or are shown item by item

/**
 * Show the details of a job.
 * @param {Tile} tile
 * @param {Map} titles of settings by name
 */
export function showDetails(tile, titles) {
  const { job, acts } = tile;
  const dialog = byId("details");
  const close = () => dialog.close();
  const results = job.results.map((result, number) => {
    const place = element("div", { class: "place" });
    shownResult(job, number, true).then((made) => place.replaceChildren(made), (error) => (place.textContent = error.message));
    const load = element("button", { type: "button", class: "save", onclick: () => save(job, number) }, "Save");
    return element("figure", {}, place, element("figcaption", {}, `seed ${result.seed}`, load));
  });
  const done = job.status === "done";
  byId("details-body").replaceChildren(
    element(
      "div",
      { class: "title" },
      element("h2", { id: "details-title" }, job.prompt),
      element("button", { type: "button", class: "quiet", onclick: close, "aria-label": "Close" }, "✕"),
    ),
    done ? element("div", { class: "large" }, ...results) : element("p", { class: "error" }, job.error?.message ?? job.status),
    done ? element("div", { class: "phases" }, bar(job), legend(job)) : "",
    element("dl", {}, ...settingsOf(job, titles)),
    element(
      "div",
      { class: "buttons" },
      element("button", { type: "button", class: "primary again", onclick: () => (close(), acts.again(tile)) }, "Again"),
      removeButton(() => (close(), acts.remove(tile))),
    ),
  );
  dialog.onclick = (event) => event.target === dialog && close();
  dialog.showModal();
}

function settingsOf(job, titles) {
  const all = Object.entries(job.settings).filter(([name, value]) => !HIDDEN.includes(name) && value !== null && value !== "");
  const items = ["call", "lora"].flatMap((group) =>
    Object.entries(job.settings[group] ?? {}).map(([name, value]) => [`${group}.${name}`, value]),
  );
  const made = new Date(job.created * 1000).toLocaleString();
  return [...all, ...items, ["Made", made]].flatMap(([name, value]) => [
    element("dt", {}, titles.get(name) ?? name.replaceAll("_", " ")),
    element("dd", {}, [value].flat().join(", ")),
  ]);
}
