// What all tabs share: elements, calls of the server, frames for images, cards for running requests.

export const $ = (id) => document.getElementById(id);
export const facts = {}; // what the server says about the model
export const running = new Set();
const TABS = ["generate", "caption", "chat"];

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// The lines of an answer, each a JSON object. An error of the server becomes an Error with its parameter.
export async function* post(path, body, signal) {
  let response;
  try {
    response = await fetch(path, {method: "POST", body, signal});
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Error("The server does not answer. Check that um3 serve is running.");
  }
  if (!response.ok) throw failure(await response.json().catch(() => ({error: "the server is busy; try again in a moment"})));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.error) throw failure(event);
      yield event;
    }
  }
}

// The server's names of parameters become the labels of the fields.
function failure({error, parameter}) {
  const label = (name) => document.querySelector(`label:has([name="${name}"])`)?.firstChild.textContent.trim() ?? name;
  const text = error.replace(/^prompt 1\b/, "the prompt").replace(/\b[a-z]+_[a-z]+\b/g, label);
  return Object.assign(new Error(text.charAt(0).toUpperCase() + text.slice(1) + "."), {parameter});
}

export const smallButton = (textContent, onclick) => make("button", {type: "button", className: "small", textContent, onclick});

export function download(url, name) {
  return make("a", {className: "button small", href: url, download: name, textContent: "Download"});
}

// A square with the grid of patches until it gets an image; with `onclick` it is a button that enlarges the image.
export function frame(url, alt, onclick) {
  const image = make("img", {alt});
  const box = make(onclick ? "button" : "div", {className: facts.image_size < 128 ? "frame pixels" : "frame"});
  if (onclick) Object.assign(box, {type: "button", title: "Enlarge", onclick});
  box.style.setProperty("--rows", facts.rows);
  box.show = (url) => { image.src = url; if (!image.isConnected) box.append(image); };
  if (url) box.show(url);
  return box;
}

// A card for a running request: its title, a progress bar and a button that cancels it.
export function card(text, into) {
  const stop = new AbortController();
  const cancel = smallButton("Cancel", () => stop.abort());
  const state = make("span", {className: "soft", textContent: "in the queue"});
  const bar = make("progress");
  const problem = make("p", {className: "bad"});
  const body = make("div");
  const title = make("p", {className: "title", dir: "auto", textContent: text});
  const article = make("article", {className: "card"}, title, make("div", {className: "row"}, state, cancel), bar, body, problem);
  bar.setAttribute("aria-label", "progress");
  article.setAttribute("aria-busy", "true");
  into.prepend(article);
  running.add(stop);
  const end = (result, error = "") => {
    running.delete(stop);
    bar.remove();
    cancel.remove();
    state.textContent = result;
    problem.textContent = error;
    article.setAttribute("aria-busy", "false");
    $("status").textContent = error || `${title.textContent}: ${result}`;
  };
  return {article, title, body, state, bar, stop, end, signal: stop.signal};
}

export function tooLarge(file) {
  if (file.size <= facts.max_upload) return "";
  return `${file.name} has ${(file.size / 2 ** 20).toFixed(0)} MiB; the limit is ${facts.max_upload / 2 ** 20} MiB.`;
}

export function choose(name, focus = false) {
  for (const tab of TABS) {
    const chosen = tab === name;
    $(tab).hidden = !chosen;
    $(`tab-${tab}`).setAttribute("aria-selected", chosen);
    $(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
    if (chosen && focus) $(`tab-${tab}`).focus();
  }
}

export function startTabs() {
  for (const [index, name] of TABS.entries()) {
    $(`tab-${name}`).onclick = () => choose(name);
    $(`tab-${name}`).onkeydown = (event) => {
      const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (step) choose(TABS.at((index + step) % TABS.length), true);
    };
  }
}
