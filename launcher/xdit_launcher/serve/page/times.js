// Where the time of a job went.

import { duration, element } from "/page/dom.js";

const PHASES = { wait: "waited", encode: "prompt", denoise: "steps", decode: "decoding", other: "other" };

/** Pairs of a phase and its seconds; empty for a job that was not drawn. */
export function phasesOf(job) {
  if (job.status !== "done") return [];
  const run = job.ended - job.started;
  const { encode = 0, denoise = 0, decode = 0 } = job.seconds;
  const other = Math.max(0, run - encode - denoise - decode);
  const all = { wait: job.started - job.created, encode, denoise, decode, other };
  return Object.entries(all).filter(([, seconds]) => seconds >= 0.0005);
}

/** A bar with a part for each phase of the drawing. */
export function bar(job) {
  const parts = phasesOf(job).filter(([phase]) => phase !== "wait");
  const text = parts.map(([phase, seconds]) => `${PHASES[phase]} ${duration(seconds)}`).join(", ");
  const drawn = element("div", { class: "times", role: "img", "aria-label": `Time: ${text}`, title: text });
  for (const [phase, seconds] of parts) {
    const part = element("span", { class: `phase ${phase}` });
    part.style.flexGrow = String(seconds);
    drawn.append(part);
  }
  return drawn;
}

/** The seconds of each phase in words. */
export function legend(job) {
  const items = phasesOf(job).map(([phase, seconds]) =>
    element("li", {}, element("span", { class: `phase ${phase}` }), `${PHASES[phase]} `, element("b", {}, duration(seconds))),
  );
  return element("ul", { class: "legend" }, ...items);
}
