// The Chat tab: questions about an image, or without one.

import {$, choose, facts, frame, make, post, running, tooLarge} from "./common.js";

// The conversation: the codes of its image, and the texts of the user and the model in turn.
let talk = {texts: []};

export function startChat(image) {
  talk.stop?.abort();
  talk = {codes: image?.codes, texts: []};
  $("thread").replaceChildren();
  $("chat-image").replaceChildren(...(image ? [frame(image.original, "The image of the conversation")] : []));
  $("image-error").textContent = $("ask-error").textContent = "";
  choose("chat");
  $("ask").elements.question.focus();
}

export async function chatAbout(file) {
  choose("chat");
  const problem = $("image-error");
  problem.textContent = tooLarge(file);
  if (problem.textContent) return;
  try {
    for await (const image of post("api/caption", file, new AbortController().signal)) startChat(image);
  } catch (error) {
    problem.textContent = error.message;
  }
}

async function ask() {
  const field = $("ask").elements.question, question = field.value, current = talk;
  if (current.stop) return;
  const say = (text, className = "") => $("thread").appendChild(make("li", {className, textContent: text, dir: "auto"}));
  $("ask-error").textContent = "";
  current.stop = new AbortController();
  running.add(current.stop);
  const bubbles = [say(question, "user"), say("…")];
  try {
    const messages = [...current.texts, question];
    for await (const {answer} of post("api/chat", JSON.stringify({messages, codes: current.codes}), current.stop.signal)) {
      current.texts = [...messages, answer];
      bubbles[1].textContent = answer || "(no answer)";
      if (current === talk) field.value = "";
    }
  } catch (error) {
    bubbles.forEach((bubble) => bubble.remove());
    if (current === talk && !current.stop.signal.aborted) $("ask-error").textContent = error.message;
  } finally {
    running.delete(current.stop);
    current.stop = undefined;
  }
}

export function startChatTab() {
  if (!facts.conversations.length) $("chat-note").textContent = "This model was not trained on conversations; make um3-instruct does that.";
  $("ask").onsubmit = (event) => { event.preventDefault(); ask(); };
  $("new-chat").onclick = () => startChat();
  $("chat-file").onchange = (event) => { for (const file of event.target.files) chatAbout(file); event.target.value = ""; };
}
