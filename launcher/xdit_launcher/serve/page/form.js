// The form: made from what the server says that its model takes.

import { byId, element, say } from "/page/dom.js";

const DRAFT = "xdit-draft";
const SLIDER = [20, 1000]; // least and most values for which a slider is of use
const PREVIEWS = 8; // which a person likes to see; programs get none by default
const SHAPES = { Square: 1, Wide: 3 / 2, Tall: 2 / 3 };

/** The form of a model. */
export class Form {
  /** @param {Object} model answer of /v1/settings */
  constructor(model) {
    this.model = model;
    this.fields = new Map();
    this.prompt = byId("prompt");
    byId("prompt-label").textContent = model.subject === "prompt" ? "Prompt" : model.subject[0].toUpperCase() + model.subject.slice(1);
    this.prompt.placeholder = model.example;
    const main = [];
    const more = [];
    for (const setting of model.settings) {
      if (setting.name === "previews") setting.default = Math.min(PREVIEWS, setting.maximum);
      const field = new Field(setting);
      this.fields.set(setting.name, field);
      (setting.main ? main : more).push(field.row);
      if (setting.name === "height" && this.fields.has("width")) main.push(this.shapes());
    }
    byId("fields").replaceChildren(...main);
    byId("more-fields").replaceChildren(...more);
    byId("settings").hidden = false;
    byId("more").hidden = more.length === 0;
    byId("generate").disabled = false;
    this.fields.get("format")?.input.addEventListener("change", () => this.fit());
    this.restore();
    this.fit();
  }

  /** Buttons that choose a size of about as many pixels as the default has. */
  shapes() {
    const [width, height] = ["width", "height"].map((name) => this.fields.get(name));
    const area = width.setting.default * height.setting.default;
    const side = (pixels, { step }) => Math.max(1, Math.round(pixels / step)) * step;
    const choose = (ratio) => {
      width.value = ratio === 1 ? side(Math.sqrt(area), width.setting) : side(Math.sqrt(area * ratio), width.setting);
      height.value = side(Math.sqrt(area / ratio), height.setting);
      this.keep();
    };
    const buttons = Object.entries(SHAPES).map(([name, ratio]) =>
      element("button", { type: "button", class: "quiet", onclick: () => choose(ratio) }, name),
    );
    return element("div", { class: "shapes", role: "group", "aria-label": "Shape" }, ...buttons);
  }

  /** Show the quality only of formats that have one. */
  fit() {
    const format = this.fields.get("format");
    const quality = this.fields.get("compression");
    if (format && quality) quality.row.hidden = format.value === "png";
  }

  /** The body of a job. @throws {Mistake} a field holds no value of its kind */
  body() {
    const body = { prompt: this.prompt.value };
    for (const [name, field] of this.fields) {
      const value = field.row.hidden ? null : field.read();
      if (value === null) continue;
      const [group, item] = parts(name);
      if (item === undefined) body[name] = value;
      else (body[group] ??= {})[item] = value;
    }
    return body;
  }

  /** Fill in the settings of a job. */
  take(job) {
    this.prompt.value = job.prompt;
    for (const [name, field] of this.fields) {
      const [group, item] = parts(name);
      const value = item === undefined ? job.settings[name] : job.settings[group]?.[item];
      field.value = value ?? field.setting.default;
    }
    this.fit();
    this.clear();
    this.keep();
    this.prompt.focus();
    byId("ask").scrollIntoView({ block: "start" });
  }

  /** Go back to the defaults, but for the prompt. */
  reset() {
    for (const field of this.fields.values()) field.value = field.setting.default;
    this.fit();
    this.clear();
    this.keep();
  }

  /** Show an error at the field that it is about, or below the form. */
  fail(message, param) {
    this.clear();
    const name = param === "output_format" ? "format" : param === "output_compression" ? "compression" : param;
    const field = this.fields.get(name);
    const input = name === "prompt" ? this.prompt : field?.input;
    if (!input || field?.row.hidden) {
      say(byId("form-error"), message);
      return;
    }
    for (const name of ["settings", "more"]) byId(name).open ||= byId(name).contains(input);
    say(byId(`${input.id}-error`), message);
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }

  /** Take errors away. */
  clear() {
    say(byId("form-error"), null);
    for (const input of [this.prompt, ...[...this.fields.values()].map((field) => field.input)]) {
      input.removeAttribute("aria-invalid");
      say(byId(`${input.id}-error`), null);
    }
  }

  /** Keep what is written through a reload of the page. */
  keep() {
    const values = Object.fromEntries([...this.fields].map(([name, field]) => [name, field.input.value]));
    sessionStorage.setItem(DRAFT, JSON.stringify({ model: this.model.model, prompt: this.prompt.value, values }));
  }

  restore() {
    const draft = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
    if (draft === null || draft.model !== this.model.model) return;
    this.prompt.value ||= draft.prompt;
    for (const [name, field] of this.fields) field.value = draft.values[name] ?? field.setting.default;
  }
}

/** The name of a field, and of its item where the field holds several: ["call", "mu"], ["steps"]. */
function parts(name) {
  const dot = name.indexOf(".");
  return dot < 0 ? [name] : [name.slice(0, dot), name.slice(dot + 1)];
}

/** A field that holds no value of its kind. */
export class Mistake extends Error {
  constructor(message, param) {
    super(message);
    this.param = param;
  }
}

/** One setting with its label, limits, and place for an error. */
class Field {
  constructor(setting) {
    this.setting = setting;
    const id = `set-${setting.name.replace(".", "-")}`;
    const about = { id, name: setting.name, "aria-describedby": `${id}-hint ${id}-error`, autocomplete: "off" };
    this.input = this.make(about);
    this.slider = null;
    const inputs = [this.input];
    const { kind, minimum, maximum, step } = setting;
    const values = maximum === null ? Infinity : (maximum - minimum) / step;
    if (kind === "integer" && setting.main && values >= SLIDER[0] && values <= SLIDER[1]) {
      this.slider = element("input", { type: "range", min: minimum, max: maximum, step, tabindex: -1, "aria-hidden": "true" });
      this.slider.addEventListener("input", () => {
        this.input.value = this.slider.value;
        this.input.dispatchEvent(new Event("input", { bubbles: true }));
      });
      this.input.addEventListener("input", () => (this.slider.value = this.input.value || (setting.default ?? minimum)));
      inputs.unshift(this.slider);
    }
    this.value = setting.default;
    this.row = element(
      "div",
      { class: `field ${kind}${this.slider ? " wide" : ""}`, "data-setting": setting.name },
      element(
        "div",
        { class: "name" },
        element("label", { for: id, title: setting.help }, setting.title),
        element("span", { class: "hint", id: `${id}-hint` }, this.hint()),
      ),
      element("div", { class: "inputs" }, ...inputs),
      element("p", { class: "error", id: `${id}-error`, hidden: true }),
    );
  }

  make(about) {
    const { kind, choices, minimum, maximum, step } = this.setting;
    if (kind === "text") return element("textarea", { ...about, rows: 1 });
    if (kind === "choice") {
      return element("select", about, ...choices.map((choice) => element("option", { value: choice }, choice)));
    }
    if (kind === "seeds") return element("input", { ...about, type: "text", inputmode: "numeric", placeholder: "random" });
    const most = maximum === null ? null : Math.min(maximum, Number.MAX_SAFE_INTEGER);
    const mode = kind === "integer" && minimum >= 0 ? "numeric" : null;
    const limits = { min: minimum, max: most, step: step ?? "any", inputmode: mode };
    return element("input", { ...about, type: "number", ...limits, placeholder: "auto" });
  }

  /** Which values it takes, in a few words. */
  hint() {
    const { kind, minimum, maximum, step } = this.setting;
    if (kind === "seeds") return "empty: random";
    if (kind !== "integer" || minimum === null) return "";
    if (step > 1) return maximum > SLIDER[1] ? `multiple of ${step}` : `${minimum} to ${maximum}, every ${step}`;
    return maximum === null ? "" : `${minimum} to ${maximum}`;
  }

  set value(value) {
    this.input.value = Array.isArray(value) ? value.join(", ") : (value ?? "");
    if (this.slider) this.slider.value = this.input.value;
  }

  get value() {
    return this.input.value;
  }

  /** Its value as JSON has it, null if it is empty. @throws {Mistake} */
  read() {
    const { name, title, kind } = this.setting;
    const text = this.input.value.trim();
    if (this.input.validity.badInput) throw new Mistake(`${title} must be a number.`, name);
    if (text === "") return null;
    if (kind === "text" || kind === "choice") return kind === "text" ? this.input.value : text;
    if (kind === "seeds") {
      const seeds = text.split(/[\s,]+/).filter((word) => word !== "").map(Number);
      if (!seeds.every(Number.isSafeInteger)) {
        throw new Mistake(`${title} must be a whole number, or several with commas between.`, name);
      }
      return seeds.length === 1 ? seeds[0] : seeds;
    }
    const number = Number(text);
    if (kind === "integer" && !Number.isSafeInteger(number)) throw new Mistake(`${title} must be a whole number.`, name);
    return number;
  }
}
