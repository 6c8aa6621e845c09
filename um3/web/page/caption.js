// The Caption tab: the caption, the codes and the reconstruction of an image file.

import {$, card, choose, download, facts, frame, make, post, smallButton, tooLarge} from "./common.js";
import {startChat} from "./chat.js";
import {fillPrompt} from "./form.js";
import {repaint} from "./generate.js";
import {enlarge} from "./viewer.js";

export async function caption(file) {
  choose("caption");
  const problem = $("caption-error");
  problem.textContent = tooLarge(file);
  if (problem.textContent) return;
  const run = card(file.name, $("captions"));
  try {
    for await (const result of post("api/caption", file, run.signal)) show(result, run, file.name);
  } catch (error) {
    if (run.signal.aborted) run.end("cancelled");
    else { run.end(""); run.article.remove(); problem.textContent = error.message; }
  }
}

function show(result, run, name) {
  run.title.textContent = result.caption || "(empty caption)";
  const figure = (url, label, image = {}, actions = {}) => {
    const box = frame(url, label, () => enlarge({url, label, ...image}, actions));
    return make("figure", {}, box, make("figcaption", {}, make("span", {textContent: label})));
  };
  const codes = figure(result.code_image, `${result.codes.length} codes of ${facts.num_bits} bits`, {pixels: true});
  codes.firstChild.classList.add("pixels", "lines");
  const image = {codes: result.codes, settings: {prompt: result.caption}};
  const reconstruction = figure(result.reconstruction, "Reconstruction", image, {repaint});
  reconstruction.lastChild.append(download(result.reconstruction, "um3-reconstruction.png"));
  run.body.append(make("div", {className: "images three"}, figure(result.original, "Input of the model"), codes, reconstruction));
  const again = smallButton("Generate from this caption", () => {
    choose("generate");
    fillPrompt(result.caption);
  });
  const list = make("details", {}, make("summary", {textContent: "Codes"}), make("pre", {textContent: result.codes.join(" ")}));
  run.body.append(make("div", {className: "row"}, list));
  run.end(`${name} · ${result.size.join(" x ")} pixels · log-probability of the caption ${result.logprob.toFixed(2)} nats`);
  run.state.after(again, smallButton("Ask about it", () => startChat(result)));
}
