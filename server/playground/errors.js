/** Shows errors beside the field that they name. */

import { el, find } from "./dom.js";

let countdown = null;

/** Take away all errors that are shown. */
export function clearErrors() {
  clearInterval(countdown);
  find("alert").replaceChildren();
  for (const shown of document.querySelectorAll("[data-error]")) shown.remove();
}

/** Show an error beside its field, or at the top if there is no such field on the page. */
export function showError(error) {
  clearErrors();
  const text = el("span", { className: "error", "data-error": "", role: "alert" }, error.message);
  (fieldOf(error.param) ?? find("alert")).append(text);
  if (error.retryAfter) count(text, error.retryAfter);
}

/** Return the visible field that a param such as `steering[0].eta` is about, or its surroundings. */
function fieldOf(param) {
  const outer = (name) => name.slice(0, Math.max(name.lastIndexOf("."), name.lastIndexOf("["), 0));
  for (let name = param ?? ""; name; name = outer(name)) {
    const field = document.querySelector(`[data-param="${CSS.escape(name)}"]`);
    if (field?.checkVisibility()) return field;
  }
  return null;
}

function count(text, seconds) {
  const left = el("span", { ariaHidden: "true" }); // screen readers would say each second
  text.append(" ", left);
  const tell = () => {
    left.textContent = seconds > 0 ? `Try again in ${seconds} s.` : "Try again now.";
    if (seconds-- <= 0) clearInterval(countdown);
  };
  countdown = setInterval(tell, 1000);
  tell();
}
