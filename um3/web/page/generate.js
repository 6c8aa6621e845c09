// Runs of the Generate tab: images row by row, side by side for several guidance scales; variations and repainted regions.

import {$, card, choose, download, facts, frame, make, post, smallButton} from "./common.js";
import {addToHistory, clearErrors, describeSettings, randomSeed, readForm, showError} from "./form.js";
import {chatAbout} from "./chat.js";
import {enlarge} from "./viewer.js";

const VARIATIONS = 4, STRENGTH = 0.5;
const OUTSIDE = "This prompt is outside what the model was trained on: its words are likelier in a plain text than as the caption of this image.";

export async function generate() {
  const {settings, compare} = readForm();
  clearErrors();
  const run = new Run(settings, compare);
  try {
    await run.finish();
    await addToHistory(settings, compare, run.first.url);
  } catch (error) {
    if (!run.fail(error)) showError(error);
  }
}

// Half of the patches are generated anew, with new seeds and the same prompt.
function vary(image) {
  change({...image.settings, num_images: VARIATIONS, seed: randomSeed(), codes: image.codes, strength: STRENGTH}, `variations of seed ${image.seed}`);
}

// Generate a region of an image anew; `box` holds shares of the image.
export function repaint(image, prompt, box) {
  change({...image.settings, prompt, num_images: VARIATIONS, seed: randomSeed(), codes: image.codes, redraw: box}, "repainted");
}

async function change(settings, what) {
  choose("generate");
  const run = new Run({...settings, best_of: undefined}, [], what);
  run.article.scrollIntoView({behavior: "smooth", block: "nearest"});
  await run.finish().catch((error) => run.fail(error) || showError({message: error.message}));
}

class Run {
  constructor(settings, compare, what = "") {
    this.settings = settings;
    this.scales = compare.length ? compare : [settings.guidance_scale];
    this.what = [what, describeSettings(settings)].filter(Boolean).join(" · ");
    this.rows = 0;
    Object.assign(this, card(settings.prompt.slice(0, 1000), $("runs")));
    const count = Math.min(Math.max(1, Math.floor(settings.num_images) || 1), facts.max_images);
    if (compare.length) this.body.className = "scales";
    this.body.style.setProperty("--count", Math.min(count, 6));
    this.bar.max = this.scales.length * facts.rows;
    this.grids = this.scales.map((scale) => {
      const label = make("p", {className: "scale"}, "guidance", make("b", {textContent: scale}));
      const figures = Array.from({length: count}, () => this.figure());
      const grid = make("div", {className: "images"}, ...figures.map(({element}) => element));
      this.body.append(...(compare.length ? [label, grid] : [grid]));
      return {label, grid, figures};
    });
  }

  figure() {
    const figure = {caption: make("figcaption")};
    figure.box = frame("", this.settings.prompt.slice(0, 200), () => enlarge(figure.image, {repaint}));
    figure.box.disabled = true; // until its image is finished
    figure.element = make("figure", {}, figure.box, figure.caption);
    return figure;
  }

  async finish() {
    const began = performance.now();
    await Promise.all(this.scales.map((scale, index) => this.receive(scale, this.grids[index].figures)));
    this.end(`${this.what} · ${((performance.now() - began) / 1000).toFixed(1)} s`);
  }

  async receive(scale, figures) {
    const settings = {...this.settings, guidance_scale: scale};
    for await (const event of post("api/generate", JSON.stringify(settings), this.signal)) {
      this.bar.value = this.rows += 1;
      if (event.row) this.state.textContent = `row ${event.row} of ${facts.rows}`;
      event.images.forEach((image, index) => {
        figures[index].box.show(image.url);
        if (!event.row) this.show(figures[index], {...image, settings});
      });
      if (event.outside && !this.note) this.body.before(this.note = make("p", {className: "note", textContent: OUTSIDE}));
    }
  }

  show(figure, image) {
    const {url, seed, logprob, similarity, settings} = image;
    const match = similarity === null ? "" : ` · similarity ${similarity.toFixed(2)}`;
    const label = make("span", {textContent: `seed ${seed}${match}`, title: `log-probability ${logprob.toFixed(2)} nats`});
    const name = `um3-seed-${seed}${settings.guidance_scale === undefined ? "" : `-guidance-${settings.guidance_scale}`}.png`;
    const data = () => Uint8Array.from(atob(url.split(",")[1]), (letter) => letter.charCodeAt(0));
    figure.image = image;
    figure.box.disabled = false;
    figure.caption.append(label, download(url, name), smallButton("Vary", () => vary(image)),
      smallButton("Ask", () => chatAbout(new File([data()], name))));
    this.first ??= image;
  }

  // End after an error, without frames that have no image. False if nothing was shown: the card is removed.
  fail(error) {
    const cancelled = this.signal.aborted;
    this.stop.abort();
    for (const {label, grid, figures} of this.grids) {
      for (const {box, element} of figures) if (!box.firstChild) element.remove();
      if (!grid.firstChild) { grid.remove(); label.remove(); }
    }
    if (cancelled) this.end(`cancelled · ${this.what}`);
    else if (this.rows) this.end("not finished", error.message);
    else { this.end(""); this.article.remove(); }
    return cancelled || this.rows > 0;
  }
}
