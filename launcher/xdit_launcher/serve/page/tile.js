// One job in the gallery: waiting, being drawn with previews, or finished.

import { duration, element, roughly, say } from "/page/dom.js";
import { resultUrl, save } from "/page/results.js";
import { bar } from "/page/times.js";

const CELLS = 4; // pictures of a job that are shown at once
const ACTIVE = ["queued", "running"];

const seen = new IntersectionObserver(
  (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => entry.target.show()),
  { rootMargin: "400px" },
);

/** A tile. `acts` has the functions `cancel`, `again`, `remove` and `open`, each called with the tile. */
export class Tile {
  constructor(job, acts) {
    this.acts = acts;
    this.media = element("button", { type: "button", class: "media", onclick: () => acts.open(this) });
    this.prompt = element("p", { class: "prompt" });
    this.status = element("p", { class: "status" });
    this.progress = element("progress", { max: 1, "aria-label": "Progress" });
    this.times = element("div", {});
    this.actions = element("div", { class: "actions" });
    this.root = element(
      "li",
      { class: "tile", "data-id": job.id },
      this.media,
      element("div", { class: "about" }, this.prompt, this.progress, this.status, this.times, this.actions),
    );
    this.root.show = () => this.showResults();
    this.pictures = [];
    this.phase = "";
    this.update(job);
    seen.observe(this.root);
  }

  /** Whether the job has not ended. */
  get active() {
    return ACTIVE.includes(this.job.status);
  }

  /** Take what the server says of the job. */
  update(job) {
    const before = this.job;
    this.job = job;
    if (job.progress?.steps) this.step = job.progress;
    if (before?.status !== job.status) this.rebuild();
    this.describe();
  }

  /** Take an event of the job; the last one is for `update`. */
  take(name, data) {
    if (name === "queued") Object.assign(this.job, { status: "queued", position: data.position });
    else if (name === "running") this.job.status = "running";
    else if (name === "encoding") this.phase = "reading the prompt";
    else if (name === "step") this.step = data;
    else if (name === "preview") this.showPreview(data);
    if (this.root.dataset.status !== this.job.status) this.rebuild();
    this.describe();
  }

  rebuild() {
    const { job, active } = this;
    this.root.dataset.status = job.status;
    this.prompt.textContent = job.prompt;
    const count = Math.min(CELLS, job.settings.images ?? 1);
    if (this.pictures.length !== count) {
      this.pictures = Array.from({ length: count }, () => element("span", { class: "cell" }));
      this.media.replaceChildren(...this.pictures);
      this.media.dataset.count = count;
    }
    this.media.disabled = active;
    this.media.setAttribute("aria-label", active ? `${job.prompt}, not finished` : `Details of ${job.prompt}`);
    this.progress.hidden = !active;
    this.times.replaceChildren(...(job.status === "done" ? [bar(job)] : []));
    this.actions.replaceChildren(...(active ? [this.cancelButton()] : this.endedButtons()));
    if (!active && job.status !== "done") this.shown = true;
    if (job.status === "done" && before(this.root)) this.showResults();
  }

  cancelButton() {
    const cancel = element("button", { type: "button", class: "cancel" }, "Cancel");
    cancel.addEventListener("click", () => {
      cancel.disabled = true;
      cancel.textContent = "Cancelling";
      this.acts.cancel(this).catch(() => this.actions.replaceChildren(this.cancelButton()));
    });
    return cancel;
  }

  endedButtons() {
    const { job } = this;
    const again = element("button", { type: "button", class: "again", onclick: () => this.acts.again(this) }, "Again");
    const load = element("button", { type: "button", class: "save", onclick: () => save(job, 0) }, "Save");
    return [again, job.results.length > 0 ? load : null, removeButton(() => this.acts.remove(this))].filter(Boolean);
  }

  describe() {
    const { job, step } = this;
    this.root.classList.toggle("refused", job.status === "failed");
    say(this.status, this.words());
    if (job.status === "running" && step) this.progress.value = step.step / Math.max(1, step.steps);
    else if (job.status === "running") this.progress.removeAttribute("value");
    else this.progress.value = 0;
  }

  /** The state of the job in a few words. */
  words() {
    const { job, step } = this;
    const rest = job.estimate ? `about ${roughly(job.estimate)}` : null;
    if (job.status === "queued") {
      const place = job.position === 1 ? "next in the queue" : job.position ? `number ${job.position} in the queue` : "waits";
      return [place, rest].filter(Boolean).join(" · ");
    }
    if (job.status === "running") {
      const now = !step ? this.phase || "starts" : step.step < step.steps ? `step ${step.step} of ${step.steps}` : "decoding";
      return [now, rest && step?.step < step?.steps ? `${rest} left` : null].filter(Boolean).join(" · ");
    }
    if (job.status === "done") return `${summary(job)} · ${duration(job.ended - job.started)}`;
    return job.error?.message ?? job.status;
  }

  showPreview({ number, b64_png: data }) {
    if (number >= this.pictures.length || !data) return;
    this.put(number, element("img", { src: `data:image/png;base64,${data}`, alt: "preview", class: "preview" }));
  }

  async showResults() {
    const { job } = this;
    if (job.status !== "done" || this.shown) return;
    this.shown = true;
    seen.unobserve(this.root);
    try {
      await Promise.all(this.pictures.map((cell, number) => number < job.results.length && this.showResult(number)));
    } catch {
      this.shown = false;
      seen.observe(this.root);
    }
  }

  async showResult(number) {
    const { job } = this;
    const made = await shownResult(job, number);
    if (made.tagName === "VIDEO") {
      this.media.addEventListener("pointerenter", () => made.play().catch(() => {}));
      this.media.addEventListener("pointerleave", () => made.pause());
    }
    this.put(number, made);
  }

  put(number, made) {
    this.pictures[number].replaceChildren(made);
  }

  /** It is no longer shown. */
  close() {
    seen.unobserve(this.root);
    this.root.remove();
  }
}

const before = (root) => root?.isConnected;

/** A button that asks once more before it removes something. */
export function removeButton(remove) {
  const button = element("button", { type: "button", class: "remove" }, "Delete");
  let timer = null;
  button.addEventListener("click", () => {
    if (timer !== null) {
      clearTimeout(timer);
      button.disabled = true;
      remove();
      return;
    }
    button.textContent = "Really delete?";
    timer = setTimeout(() => {
      timer = null;
      button.textContent = "Delete";
    }, 4000);
  });
  return button;
}

/** A result as an element that shows it. */
export async function shownResult(job, number, controls = false) {
  const { media_type: media } = job.results[number];
  const url = await resultUrl(job, number);
  if (media.startsWith("video/")) {
    const video = element("video", { src: url, loop: true, playsinline: true, controls, preload: "auto" });
    video.muted = true; // or it may not play by itself
    return video;
  }
  if (!media.startsWith("image/")) return element("span", { class: "latents" }, "latents");
  const image = element("img", { src: url, alt: job.prompt, class: "result" });
  await image.decode().catch(() => {});
  return image;
}

/** Size, length, steps and seed of a job. */
export function summary(job) {
  const { width, height, frames, steps, seed } = job.settings;
  const video = frames > 1 ? `${frames} frames` : null;
  const seeds = [seed].flat();
  const numbers = seeds.length > 1 ? `seeds ${seeds[0]}, …` : `seed ${seeds[0]}`;
  return [width ? `${width} × ${height}` : null, video, steps ? `${steps} steps` : null, numbers].filter(Boolean).join(" · ");
}
