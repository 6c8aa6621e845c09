// Start of the page: what the model is, files that are dropped or pasted, Esc.

import {caption} from "./caption.js";
import {chatAbout, startChatTab} from "./chat.js";
import {$, facts, running, startTabs} from "./common.js";
import {startForm} from "./form.js";
import {generate} from "./generate.js";

async function begin() {
  const response = await fetch("api/model");
  Object.assign(facts, await response.json());
  const size = facts.parameters >= 1e9 ? `${(facts.parameters / 1e9).toFixed(1)} B` : `${(facts.parameters / 1e6).toFixed(1)} M`;
  startTabs();
  startForm(generate);
  startChatTab();
  $("limits").textContent = ` (PNG, JPEG, WEBP, GIF, BMP or TIFF, at most ${facts.max_upload / 2 ** 20} MiB)`;
  $("facts").title = facts.name;
  $("facts").textContent = `${size} parameters · ${facts.image_size} x ${facts.image_size} pixels from ${facts.rows ** 2} codes of ${facts.num_bits} bits`;
}

// A dropped or pasted file goes to the chat if that is open.
const take = (files) => { for (const file of files) $("chat").hidden ? caption(file) : chatAbout(file); };
const hasFiles = (event) => event.dataTransfer.types.includes("Files");
document.ondragover = (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("over");
};
document.ondragleave = (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); };
document.ondrop = (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.remove("over");
  take(event.dataTransfer.files);
};
document.onpaste = (event) => take(event.clipboardData.files);
document.onkeydown = (event) => {
  if (event.key === "Escape" && !$("viewer").open) [...running].at(-1)?.abort();
};
$("file").onchange = (event) => { for (const file of event.target.files) caption(file); event.target.value = ""; };
begin().catch(() => { $("facts").textContent = "The server does not answer. Check that um3 serve is running."; });
