// The large view of an image. A rectangle that is dragged over it, or moved with the arrow keys, can be repainted.

import {$, facts} from "./common.js";

const viewer = $("viewer"), picture = $("viewer-image"), selection = $("selection"), form = $("repaint");
let image, actions, box; // box: [left, top, right, bottom] in patches

// `image` has a url and a label or the prompt of its settings; with codes and `actions.repaint` it can be repainted.
export function enlarge(shown, shownActions = {}) {
  [image, actions, box] = [shown, shownActions, undefined];
  const prompt = image.settings?.prompt ?? "";
  $("viewer-title").textContent = image.label ?? `seed ${image.seed}`;
  Object.assign($("viewer-pixels"), {src: image.url, alt: image.label ?? prompt});
  picture.classList.toggle("pixels", image.pixels ?? facts.image_size < 128);
  form.hidden = !actions.repaint;
  picture.tabIndex = actions.repaint ? 0 : -1;
  form.elements.repaint_prompt.value = prompt;
  select(undefined);
  viewer.showModal();
}

function select(patches) {
  box = patches;
  selection.hidden = !box;
  $("repaint-button").disabled = !box;
  $("selection-text").textContent = "";
  if (!box) return;
  const [left, top, right, bottom] = box.map((patch) => `${(100 * patch) / facts.rows}%`);
  Object.assign(selection.style, {left, top, right: `calc(100% - ${right})`, bottom: `calc(100% - ${bottom})`});
  $("selection-text").textContent = `Selected: columns ${box[0] + 1} to ${box[2]}, rows ${box[1] + 1} to ${box[3]} of ${facts.rows}.`;
}

const clamp = (patch, low = 0) => Math.min(Math.max(patch, low), facts.rows - 1);

function patchAt(event) {
  const {left, top, width, height} = picture.getBoundingClientRect();
  const [x, y] = [(event.clientX - left) / width, (event.clientY - top) / height];
  return [clamp(Math.floor(x * facts.rows)), clamp(Math.floor(y * facts.rows))];
}

picture.onpointerdown = (event) => {
  if (!actions.repaint || event.button) return;
  const [x, y] = patchAt(event);
  picture.setPointerCapture(event.pointerId);
  const extend = (event) => {
    const [otherX, otherY] = patchAt(event);
    select([Math.min(x, otherX), Math.min(y, otherY), Math.max(x, otherX) + 1, Math.max(y, otherY) + 1]);
  };
  extend(event);
  picture.onpointermove = extend;
  picture.onpointerup = picture.onpointercancel = () => { picture.onpointermove = null; };
};

// Arrow keys move the selection by a patch; with Shift they move its right and lower edges.
picture.onkeydown = (event) => {
  const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (!step || !actions.repaint) return;
  event.preventDefault();
  if (!box) { select([0, 0, 1, 1]); return; }
  const [left, top, right, bottom] = box, [width, height] = [right - left, bottom - top];
  const [newLeft, newTop] = event.shiftKey ? [left, top] : [clamp(left + step[0]), clamp(top + step[1])];
  const [newWidth, newHeight] = event.shiftKey ? [width + step[0], height + step[1]] : [width, height];
  const newBox = [newLeft, newTop, newLeft + newWidth, newTop + newHeight];
  if (newWidth > 0 && newHeight > 0 && Math.max(newBox[2], newBox[3]) <= facts.rows) select(newBox);
};

form.onsubmit = (event) => {
  event.preventDefault();
  viewer.close();
  actions.repaint(image, form.elements.repaint_prompt.value, box.map((patch) => patch / facts.rows));
};
$("viewer-close").onclick = () => viewer.close();
viewer.onclick = (event) => { if (event.target === viewer) viewer.close(); }; // beside the view
