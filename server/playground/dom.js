/** Builds elements. Strings become text, never markup. */

const WORD = 20; // characters of a cell; a longer one may be broken anywhere
const SVG = "http://www.w3.org/2000/svg";

/** Return the element of the page that has the id. */
export const find = (id) => document.getElementById(id);

/** Return a new element. `onclick` and the like are listeners; other names are properties, or
 * attributes where the element has no such property. Null children are left out. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

/** Return a button that sends no form. */
export const button = (text, onclick, properties = {}) =>
  el("button", { type: "button", onclick, ...properties }, text);

/** Rebuild a part of the page, and give the focus back to the control of the same name. */
export function keepingFocus(rebuild) {
  const name = document.activeElement?.ariaLabel;
  rebuild();
  if (name) document.querySelector(`[aria-label="${CSS.escape(name)}"]`)?.focus();
}

/** Return a new element of an SVG picture. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.flat());
  return element;
}

/** Return a table with a name for screen readers. Cells are texts or elements. */
export function table(ariaLabel, heads, rows) {
  const head = el("tr", {}, heads.map((text) => el("th", { scope: "col" }, text)));
  const textCell = (text) => el("td", { className: text.length > WORD ? "long" : "" }, text);
  const cell = (content) => (content instanceof Element ? content : textCell(String(content)));
  const body = rows.map((row) => el("tr", {}, row.map(cell)));
  return el("table", { ariaLabel }, el("thead", {}, head), el("tbody", {}, body));
}

/** Return an element that scrolls where its content is too large. */
export const scrolling = (content) => el("div", { className: "scroll", tabIndex: 0 }, content);

/** Return a list of terms and what is said of each. */
export function facts(pairs) {
  const one = ([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value));
  return el("dl", { className: "facts" }, pairs.map(one));
}

/** Return a number with at most so many decimals. */
export const rounded = (number, decimals = 3) => String(Number(number.toFixed(decimals)));
