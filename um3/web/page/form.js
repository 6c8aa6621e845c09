// The form of the Generate tab: its settings, errors at their fields, examples, and the history that restores it.

import {$, facts, make, smallButton} from "./common.js";

export const form = $("form");
const OPTIONS = ["guidance_scale", "temperature", "top_p", "top_k", "min_p", "best_of"];
const FIELDS = ["prompt", "num_images", "seed", "compare", ...OPTIONS];
const STORE = "um3-history", MAX_HISTORY = 50;

export const randomSeed = () => Math.floor(Math.random() * 100_000);

// An empty field is not sent: the server has defaults. Text that is not a number is sent as it is: the server refuses it.
const asNumber = (text) => (text === "" ? undefined : Number.isNaN(Number(text)) ? text : Number(text));
const read = (name) => asNumber(form.elements[name].value.trim());

export function readForm() {
  const settings = {prompt: form.elements.prompt.value, num_images: read("num_images"), seed: read("seed") ?? randomSeed()};
  for (const name of OPTIONS) settings[name] = read(name);
  const compare = form.elements.compare.value.split(/[\s,;]+/).filter(Boolean).map(asNumber);
  return {settings, compare};
}

export function describeSettings(settings) {
  const names = {temperature: "temperature", top_p: "top-p", top_k: "top-k", min_p: "min-p", best_of: "best of"};
  const parts = Object.entries(names).filter(([name]) => settings[name] !== undefined).map(([name, label]) => `${label} ${settings[name]}`);
  return [`seed ${settings.seed}`, ...parts].join(" · ");
}

// Below each field is a line for its error, which describes the field to a screen reader.
function addErrorLines() {
  for (const name of FIELDS) {
    const field = form.elements[name], label = field.closest("label"), box = make("div", {hidden: label.hidden});
    label.replaceWith(box);
    box.append(label, make("p", {className: "bad", id: `${name}-error`}));
    field.setAttribute("aria-describedby", `${name}-error`);
  }
}

export function clearErrors() {
  $("generate-error").textContent = "";
  for (const name of FIELDS) {
    $(`${name}-error`).textContent = "";
    form.elements[name].removeAttribute("aria-invalid");
  }
}

export function showError({message, parameter}) {
  const name = parameter === "guidance_scale" && form.elements.compare.value.trim() ? "compare" : parameter;
  if (!FIELDS.includes(name)) { $("generate-error").textContent = message; return; }
  const field = form.elements[name];
  $(`${name}-error`).textContent = message;
  field.setAttribute("aria-invalid", "true");
  if (field.closest("details")) field.closest("details").open = true;
  field.focus();
}

function fill(values) {
  for (const name of FIELDS) if (name in values) form.elements[name].value = values[name] ?? "";
  clearErrors();
  form.elements.prompt.focus();
  scrollTo({top: 0, behavior: "smooth"});
}

export const fillPrompt = (prompt) => fill({prompt});

// The browser stores the history: settings and a thumbnail. The same settings and seed generate the same images.
function readHistory() {
  try { return JSON.parse(localStorage.getItem(STORE)) ?? []; } catch { return []; }
}

function writeHistory(entries) {
  try { localStorage.setItem(STORE, JSON.stringify(entries.slice(0, MAX_HISTORY))); } catch { /* the storage is full or disabled */ }
  showHistory();
}

export async function addToHistory(settings, compare, url) {
  const image = make("img", {src: url});
  await image.decode();
  const canvas = make("canvas", {width: 40, height: 40});
  canvas.getContext("2d").drawImage(image, 0, 0, 40, 40);
  const entry = {...settings, compare: compare.join(", "), thumbnail: canvas.toDataURL("image/png"), time: Date.now()};
  writeHistory([entry, ...readHistory()]);
}

function restore(entry) {
  fill({...Object.fromEntries(FIELDS.map((name) => [name, undefined])), ...entry});
  form.querySelector("details").open ||= OPTIONS.slice(1).some((name) => entry[name] !== undefined);
}

function remove(index) {
  writeHistory(readHistory().filter((_, other) => other !== index));
  ($("history").children[index] ?? $("history").lastElementChild)?.querySelector(".remove").focus();
}

function showHistory() {
  const entries = readHistory();
  $("no-history").hidden = entries.length > 0;
  $("clear-history").hidden = entries.length === 0;
  $("history").replaceChildren(...entries.map((entry, index) => {
    const guidance = entry.compare ? ` · guidance ${entry.compare}` : "";
    const text = make("span", {className: "grow"},
      make("span", {className: "title", dir: "auto", textContent: entry.prompt.slice(0, 200)}),
      make("span", {className: "soft", textContent: `seed ${entry.seed}${guidance}`}));
    const item = make("button", {type: "button", className: "entry", title: new Date(entry.time).toLocaleString(), onclick: () => restore(entry)},
      make("img", {src: entry.thumbnail, alt: ""}), text);
    const cross = make("button", {type: "button", className: "small remove", title: "Remove", textContent: "×", onclick: () => remove(index)});
    cross.setAttribute("aria-label", `Remove ${entry.prompt.slice(0, 80)}, seed ${entry.seed}`);
    return make("li", {}, item, cross);
  }));
}

export function startForm(generate) {
  $("best").hidden = !facts.can_rank;
  addErrorLines();
  for (const [name, value] of Object.entries(facts.sampling)) form.elements[name].placeholder = value;
  $("examples").append(...facts.examples.map((prompt) => smallButton(prompt, () => fillPrompt(prompt))));
  form.onsubmit = (event) => { event.preventDefault(); generate(); };
  form.elements.prompt.onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); generate(); }
  };
  $("clear-history").onclick = () => writeHistory([]);
  showHistory();
}
