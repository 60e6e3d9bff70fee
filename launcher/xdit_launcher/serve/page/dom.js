// Make and find elements. Text of users and of the server becomes text, never markup.

/** The element of an id. */
export const byId = (id) => document.getElementById(id);

/**
 * An element.
 * @param {string} tag
 * @param {Object} properties `class`, `on...` listeners, `hidden` and other booleans, and attributes; null is left out
 * @param {...(Node|string|null)} children strings become text
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  set(made, properties);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** An element of SVG; see `element`. */
export function drawing(tag, properties = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  set(made, properties);
  made.append(...children);
  return made;
}

function set(made, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else made.setAttribute(name, String(value));
  }
}

/** Show a text in an element, or hide the element if there is none. */
export function say(target, text) {
  target.textContent = text ?? "";
  target.hidden = !text;
}

/** Tell whoever listens to the page rather than looking at it. */
export function announce(text) {
  byId("news").textContent = text;
}

const SPACE = "\u00a0"; // a number and its unit stay on one line

/** Seconds for a person. */
export function duration(seconds) {
  if (seconds < 0.995) return `${Math.round(seconds * 1000)}${SPACE}ms`;
  if (seconds < 99.5) return `${seconds.toFixed(1)}${SPACE}s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 100 ? `${minutes}${SPACE}min` : `${(seconds / 3600).toFixed(1)}${SPACE}h`;
}

/** Seconds that are only guessed. */
export const roughly = (seconds) => (seconds < 99.5 ? `${Math.max(1, Math.round(seconds))}${SPACE}s` : duration(seconds));
