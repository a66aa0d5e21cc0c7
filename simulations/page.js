"use strict";
const about = JSON.parse(document.getElementById("about").textContent);
const at = (id) => document.getElementById(id);
const turns = [];
let cut = null;

function put(parent, tag, text, kind) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.textContent = text;  // never markup: what a model writes is text
  parent.append(made);
  return made;
}

function busy(yes) {
  at("send").disabled = yes;
  if (at("stop")) at("stop").disabled = !yes;
  if (at("anew")) at("anew").disabled = yes;
}

function fail(message) {
  at("error").replaceChildren();
  put(at("error"), "p", message);
}

async function post(route, body, signal) {
  const headers = { "content-type": "application/json" };
  if (about.token) headers.authorization = "Bearer " + at("token").value;
  const reply = await fetch(route, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (reply.ok) return reply;
  let message = "HTTP " + reply.status;
  try { message = (await reply.json()).error.message; } catch { /* no object of ours */ }
  throw new Error(message);
}

// Server-sent events, one JSON object each, until [DONE].
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the service stopped in the middle of an answer");
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function turn(role, text) {
  const box = put(at("log"), "div", "", "turn " + role);
  put(box, "b", role === "user" ? "You" : about.model);
  return { box, words: put(box, "span", text) };
}

async function chat() {
  const question = at("text").value;
  const asked = { role: "user", content: question };
  turn("user", question);
  const { box, words } = turn("assistant", "…");
  let said = "", note = "";
  cut = new AbortController();
  try {
    const reply = await post("v1/chat/completions", {
      messages: about.conversation ? [...turns, asked] : [asked],
      temperature: Number(at("temperature").value),
      max_tokens: Number(at("longest").value),
      stream: true,
      stream_options: { include_usage: true },
    }, cut.signal);
    at("text").value = "";
    for await (const event of events(reply)) {
      const [choice] = event.choices;
      if (choice && choice.delta.content) said += choice.delta.content;
      if (choice && choice.finish_reason === "length") note = "cut off: as many tokens as were allowed";
      words.textContent = said || "…";
      box.scrollIntoView({ block: "nearest" });
    }
    words.textContent = said || "(nothing)";
  } catch (error) {
    words.textContent = said;
    note = error.name === "AbortError" ? "stopped" : "";
    if (!note) fail(error.message);
    if (!said && !note) box.remove();
  }
  if (note) put(box, "small", note);
  if (said) turns.push(asked, { role: "assistant", content: said });
  cut = null;
}

function share(parent, name, value) {
  put(parent, "div", name + " " + (100 * value).toFixed(1) + " %");
  const bar = put(parent, "div", "", "bar");
  put(bar, "i", "").style.width = 100 * value + "%";
}

function show(answer) {
  const box = at("answer");
  if ("probability" in answer) share(box, answer.label, answer.probability);
  else if (answer.labels) {
    for (const [name, value] of Object.entries(answer.labels)) share(box, name, value);
    if (!Object.keys(answer.labels).length) put(box, "p", "no label");
  } else if (answer.entities) {
    for (const entity of answer.entities) put(box, "p", entity.type + ": " + entity.text);
    if (!answer.entities.length) put(box, "p", "no name");
  } else if ("value" in answer) put(box, "p", String(Number(answer.value.toPrecision(5))));
  else put(box, "p", answer.text ?? answer.answer ?? "");
}

function base64(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(new Error("the file cannot be read"));
    reader.readAsDataURL(file);
  });
}

async function predict() {
  const record = {};
  if (at("image")) record.image = await base64(at("image").files[0]);
  if (at("prompt")) record.prompt = at("prompt").value;
  if (at("text")) record.text = at("text").value;
  at("answer").replaceChildren();
  show(await (await post("predict", record)).json());
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("error").replaceChildren();
  busy(true);
  try { await (about.chat ? chat() : predict()); } catch (error) { fail(error.message); }
  busy(false);
  if (at("text")) at("text").focus();
});

if (about.chat) {
  at("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !at("send").disabled) {
      event.preventDefault();
      at("form").requestSubmit();
    }
  });
  at("stop").addEventListener("click", () => cut && cut.abort());
  if (at("anew")) at("anew").addEventListener("click", () => {
    turns.length = 0;
    at("log").replaceChildren();
    at("text").focus();
  });
}
