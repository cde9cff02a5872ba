/** Shows the answers side by side, while they come. */

import { el, facts, find, rounded } from "./dom.js";

/** Shows one answer: its text as it comes, then what is known of it. */
export class Pane {
  constructor(title, state) {
    const prompt = state.kind === "chat" ? "" : state.prompt;
    this.text = el("p", { className: "answer" }, el("span", { className: "prompt" }, prompt));
    this.text.setAttribute("aria-busy", "true");
    this.about = el("div", { role: "status" });
    this.section = el("section", { ariaLabel: title }, el("h2", {}, title), this.text, this.about);
  }

  /** Append a piece of the text. */
  append(text) {
    this.text.append(text);
  }

  /** Show what is known of a whole answer. */
  finish(answer) {
    this.text.removeAttribute("aria-busy");
    const { usage, toxicity, firstToken, reason, steering } = answer;
    const pairs = {
      Toxicity: toxicity === undefined ? "not scored" : rounded(toxicity),
      Tokens: usage.completion_tokens,
      "First token": firstToken === null ? "none" : `${rounded(firstToken, 2)} s`,
      "Ended by": reason,
      Applied: applied(steering),
    };
    this.about.replaceChildren(facts(Object.entries(pairs)));
  }

  /** Show the text by its tokens, which are elements. */
  divide(tokens) {
    this.text.replaceChildren(this.text.firstChild, tokens);
  }

  /** Say why the answer has ended before its end. */
  fail(sentence) {
    this.text.removeAttribute("aria-busy");
    this.about.replaceChildren(el("span", { className: "error" }, sentence));
  }
}

/** Show panes with the titles instead of the present ones, and return them. */
export function showPanes(titles, state) {
  const panes = titles.map((title) => new Pane(title, state));
  find("answers").replaceChildren(...panes.map((pane) => pane.section));
  return panes;
}

/** Return an element that says what was applied, from an answer's field `steering`. */
export function applied(steering) {
  if (steering.length === 0) return "nothing: the base model";
  const one = ({ intervention, kind, settings, digest, source }) => {
    const values = Object.entries(settings).map(([name, value]) => `${name} ${value}`);
    const text = `${intervention} (${kind}): ${values.join(", ")}; chosen by the ${source} `;
    return el("li", {}, text, el("small", {}, el("code", {}, `sha256:${digest}`)));
  };
  return el("ol", {}, steering.map(one));
}
