// The drawing of the plan: which part of the picture and which blocks each rank has.

import { byId, drawing, element } from "/page/dom.js";

const SIDE = 40; // of a picture in the drawing
const BAR = 72; // length of all blocks

/** Draw the plan that the server follows. */
export function showPlan(plan) {
  const rows = plan.ranks.map((rank) => rowOf(plan, rank));
  const head = ["rank", "picture", plan.blocks ? "blocks" : null, "its work"].filter(Boolean);
  const table = element(
    "table",
    {},
    element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows),
  );
  const names = plan.strategies.length > 0 ? plan.strategies.join(", ") : "none";
  byId("plan-body").replaceChildren(
    element("p", {}, `${plan.mesh}, in ${plan.dtype} on ${plan.device}. Strategies: ${names}.`),
    element("div", { class: "scrolled", tabindex: 0, role: "group", "aria-label": "Share of each rank" }, table),
    element("p", { class: "hint" }, plan.exactness),
  );
  byId("plan").hidden = false;
}

function rowOf(plan, rank) {
  const words = [...rank.work, ...(rank.writes && plan.ranks.length > 1 ? ["sends the results"] : [])];
  return element(
    "tr",
    {},
    element("th", { scope: "row" }, String(rank.rank)),
    element("td", {}, pictureOf(plan, rank)),
    plan.blocks ? element("td", {}, blocksOf(plan, rank)) : null,
    element("td", {}, ...words.map((text) => element("span", { class: "share" }, text))),
  );
}

/** The picture, with the tokens that the rank holds filled in; dashed lines between patches. */
function pictureOf(plan, { patch, shard }) {
  const scale = SIDE / Math.max(plan.width, plan.height);
  const [width, height] = [plan.width * scale, plan.height * scale];
  const made = drawing("svg", { width: width + 2, height: height + 2, viewBox: `-1 -1 ${width + 2} ${height + 2}`, "aria-hidden": "true" });
  const each = height / plan.patches;
  for (let i = 0; i < plan.patches; i++) {
    const top = i * each + (shard * each) / plan.shards;
    if (patch === null || patch === i) made.append(drawing("rect", { class: "mine", x: 0, y: top, width, height: each / plan.shards }));
    if (i > 0) made.append(drawing("line", { class: "cut", x1: 0, y1: i * each, x2: width, y2: i * each }));
  }
  made.append(drawing("rect", { class: "frame", x: 0, y: 0, width, height, rx: 2 }));
  return made;
}

/** All blocks as a row, with those of the rank filled in. */
function blocksOf(plan, { blocks: [first, end] }) {
  const each = BAR / plan.blocks;
  const made = drawing("svg", { width: BAR + 2, height: 14, viewBox: `-1 -1 ${BAR + 2} 14`, "aria-hidden": "true" });
  made.append(drawing("rect", { class: "mine", x: first * each, y: 0, width: (end - first) * each, height: 12 }));
  if (plan.blocks <= BAR / 4) {
    for (let i = 1; i < plan.blocks; i++) made.append(drawing("line", { class: "cut", x1: i * each, y1: 0, x2: i * each, y2: 12 }));
  }
  made.append(drawing("rect", { class: "frame", x: 0, y: 0, width: BAR, height: 12, rx: 2 }));
  return made;
}
