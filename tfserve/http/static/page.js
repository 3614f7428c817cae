"use strict";
const $ = (id) => document.getElementById(id);
const FULL_S = 10, PICTURE_S = 0.5, TICK_MS = 50, REPORT_MS = 1000, RETRY_MS = 2000, HISTORY = 120, SMOOTH = 4;
const SIGNS = { running: "▶", paused: "‖", loading: "↑", waiting: "○" };
const GONE = "The server does not answer. Is it still running?";
const LOCKED = "This server wants an API key: enter it at the top of the page.";

// ---- talking to the server
const headers = (more = {}) => ($("key").value ? { Authorization: `Bearer ${$("key").value.trim()}`, ...more } : more);

// A response that is good, or an Error that says in words why there is none.
async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(GONE);
  }
  if (response.ok) return response;
  if (response.status === 401) {
    $("unlock").hidden = false;
    throw Object.assign(new Error(LOCKED), { locked: true });
  }
  const said = await response.json().catch(() => null), wait = response.headers.get("Retry-After");
  throw new Error((said?.error?.message ?? `The server answered ${response.status}.`) + (wait ? ` Try again in ${wait} s.` : ""));
}

// The data of each server-sent event of a response, as it comes.
async function* eventsOf(response, lost) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : new Error(lost); });
    if (done) throw new Error(lost);
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
  }
}

// ---- the live picture
const rows = new Map(), history = [];
let before = null, outputs = new Map(), unlocked = () => {};

const scale = (box, share) => { box.firstElementChild.style.transform = `scaleX(${Math.min(Math.max(share, 0), 1)})`; };
const put = (box, text) => { if (box.textContent !== text) box.textContent = text; };
// What counts as late or as too early is known only where the request or a report has said how fast the answer is read.
const isRead = (stream) => stream.rate !== null && !stream.is_rate_assumed;
// Thoughts are not read: the answer's tokens are.
const answered = (stream) => stream.num_output_tokens - stream.num_thought_tokens;
const hasText = (stream) => stream.ttft_s !== null && (!isRead(stream) || stream.time_to_empty_s >= 0.05);

function rowOf(id) {
  let row = rows.get(id);
  if (!row) {
    const box = document.createElement("li"), bar = document.createElement("div");
    const sign = document.createElement("span"), value = document.createElement("span");
    bar.className = "bar"; bar.append(document.createElement("i"));
    sign.className = "sign"; sign.setAttribute("role", "img"); value.className = "value";
    box.append(sign, bar, value);
    $("streams").append(box);
    row = { box, sign, bar, value };
    box.addEventListener("pointerenter", () => { box.title = row.about; });
    rows.set(id, row);
  }
  return row;
}

function drawStream(stream) {
  const row = rowOf(stream.id), { phase, rate, ttft_s: first } = stream, left = stream.time_to_empty_s ?? 0;
  const own = current !== null && !current.over && stream.id.startsWith(`${current.id}-`);
  const look = `stream ${phase}${first !== null && !hasText(stream) ? " dry" : ""}${own ? " own" : ""}`;
  if (row.box.className !== look) {
    row.box.className = look;
    row.sign.textContent = SIGNS[phase];
    row.sign.setAttribute("aria-label", own ? `your stream, ${phase}` : phase);
  }
  scale(row.bar, first === null ? 0 : rate === null ? 1 : left / FULL_S);
  const value = first === null ? `${stream.num_thought_tokens ? "thinks" : "waits"} ${stream.age_s.toFixed(0)} s` : rate === null ? `${stream.num_output_tokens} tok` : `${left.toFixed(1)} s`;
  put(row.value, own ? `you ${value}` : value);
  row.about = `${stream.id}\n${phase}${stream.reason === null ? "" : `: ${stream.reason}`}; ${stream.num_output_tokens} of at most ${stream.max_tokens} tokens, ${stream.num_thought_tokens ? `${stream.num_thought_tokens} of thoughts, ` : ""}${stream.num_unread.toFixed(0)} unread; ` +
    `read at ${rate === null ? "no rate" : `${rate.toFixed(1)} tokens/s${stream.is_rate_assumed ? ", assumed" : ""}`}\n` +
    `${stream.stall_s === null ? "" : `stalled ${stream.stall_s.toFixed(1)} s, `}${stream.num_preemptions} preemptions`;
}

// A token counts fully while less than a tenth of the answer is unread, and not at all beyond a fifth.
function effectiveOf(stream) {
  const fresh = Math.max(answered(stream) - (outputs.get(stream.id) ?? 0), 0);
  return fresh * (!isRead(stream) ? 1 : Math.min(Math.max(2 - stream.num_unread / (0.1 * stream.max_tokens), 0), 1));
}

function drawSpeeds(picture, effective, isKnown) {
  const seconds = before ? picture.created - before.created : 0;
  if (seconds <= 0) return;
  const raw = picture.stats.num_output_tokens - before.stats.num_output_tokens;
  history.push([raw / seconds, Math.min(effective, raw) / seconds, isKnown]);
  if (history.length > HISTORY) history.shift();
  const last = history.slice(-SMOOTH), mean = (column) => (last.reduce((sum, row) => sum + row[column], 0) / last.length).toFixed(0);
  put($("throughput"), mean(0));
  put($("effective"), last.some((row) => row[2]) ? `${mean(1)} effective` : "– effective");
  const top = Math.max(1, ...history.map((row) => row[0]));
  for (const [column, path] of [[0, $("path-raw")], [1, $("path-effective")]]) {
    path.setAttribute("d", column && !history.some((row) => row[2]) ? "" : history.map((row, i) => `${i ? "L" : "M"}${HISTORY - history.length + i} ${(29 - 28 * row[column] / top).toFixed(1)}`).join(""));
  }
}

function drawTier(name, blocks, free, blockSize) {
  // One block of a tier is never handed out.
  const all = Math.max(blocks - 1, 0), share = all ? 1 - free / all : 0;
  put($(name), all ? `${Math.round(100 * share)} %` : "none");
  scale($(`${name}-meter`), share);
  const tokens = (count) => (count < 10000 ? `${count}` : `${Math.round(count / 1000)}k`);
  put($(`${name}-text`), all ? `${name} KV of ${tokens(all * blockSize)} tokens` : `${name} KV`);
}

function show(picture) {
  const { stats, data } = picture;
  let effective = 0, served = 0, unbegun = 0, longest = 0;
  const seen = new Set();
  for (const stream of data) {
    seen.add(stream.id);
    drawStream(stream);
    effective += effectiveOf(stream);
    served += hasText(stream);
    if (stream.ttft_s === null) { unbegun += 1; longest = Math.max(longest, stream.age_s); }
  }
  for (const [id, row] of rows) if (!seen.has(id)) { row.box.remove(); rows.delete(id); }
  outputs = new Map(data.map((stream) => [stream.id, answered(stream)]));
  drawSpeeds(picture, effective, data.some(isRead));
  put($("served"), data.length ? `${served} of ${data.length}` : "–");
  scale($("served-meter"), served / data.length || 0);
  put($("queue"), `${unbegun}`);
  put($("queue-text"), unbegun ? `no text yet, up to ${longest.toFixed(0)} s` : "wait for a first token");
  scale($("queue-meter"), unbegun / data.length || 0);
  drawTier("device", stats.num_blocks, stats.num_free_blocks, stats.block_size);
  drawTier("host", stats.num_host_blocks, stats.num_free_host_blocks, stats.block_size);
  put($("preemptions"), `${stats.num_preemptions}`);
  for (const part of $("phases").children) {
    const count = stats[`num_${part.className}`];
    put($(`num-${part.className}`), `${count}`);
    part.style.flexGrow = count;
  }
  $("none").hidden = data.length > 0;
  $("streams").hidden = !data.length;
  put($("policy"), picture.policy);
  put($("ignores"), picture.policy_ignores.length ? `ignores ${picture.policy_ignores.join(", ")}; ` : "");
  before = picture;
}

function tell(text, state) {
  put($("about"), text);
  $("about").className = `pill ${state}`;
  $("live").classList.toggle("stale", state !== "live");
}

async function watch() {
  for (;;) {
    let pause = new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    try {
      const response = await ask(`v1/streams?interval=${PICTURE_S}`, { headers: headers({ Accept: "text/event-stream" }) });
      put($("model"), (await (await ask("v1/models", { headers: headers() })).json()).data[0].id);
      for await (const data of eventsOf(response, "The server has ended the connection.")) {
        const picture = JSON.parse(data);
        if (picture.error) throw new Error(picture.error.message);
        show(picture);
        tell("live", "live");
      }
    } catch (error) {
      tell(error.message, "broken");
      before = null;
      if (error.locked) pause = new Promise((resolve) => { unlocked = resolve; });
    }
    await pause;
  }
}
$("unlock").addEventListener("submit", (event) => { event.preventDefault(); tell("connecting", ""); unlocked(); });

// ---- chat
let conversation = [], current = null;

function say(kind, text) {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = text;
  $("ideas").hidden = true;
  $("fresh").hidden = false;
  $("talk").append(line);
  $("talk").scrollTop = $("talk").scrollHeight;
  return line;
}

// An answer: what has come of it, and how much is read. One token is about four characters, until we know better.
class Answer {
  constructor() {
    Object.assign(this, { text: "", tokens: 0, thoughts: 0, read: 0, id: null, over: false, usage: null, stop: new AbortController() });
    this.line = say("assistant playing", "");
    this.ticked = performance.now();
    this.timer = setInterval(() => this.tick(), TICK_MS);
    this.reporter = setInterval(() => this.report(), REPORT_MS);
    this.draw();
  }
  get charsPerToken() { return this.tokens ? this.text.length / this.tokens : 4; }
  get isDone() { return this.over && this.read >= this.text.length; }
  take(chunk) {
    this.id = chunk.id;
    for (const choice of chunk.choices) this.text += choice.delta.content ?? "";
    if (chunk.usage) { this.usage = chunk.usage; this.thoughts = chunk.usage.completion_tokens_details?.reasoning_tokens ?? 0; this.tokens = chunk.usage.completion_tokens - this.thoughts; }
    this.draw();
  }
  tick() {
    const now = performance.now(), chars = (now - this.ticked) / 1000 * $("speed").value * this.charsPerToken;
    this.ticked = now;
    this.read = Math.min(this.read + chars, this.text.length);
    this.draw();
    if (this.isDone) this.close();
  }
  draw() {
    let read = Math.floor(this.read);
    if (/[\ud800-\udbff]/.test(this.text[read - 1] ?? "")) read -= 1;  // half a character
    const talk = $("talk"), isAtEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
    put(this.line, this.text.slice(0, read));
    if (isAtEnd) talk.scrollTop = talk.scrollHeight;
    const seconds = (this.text.length - this.read) / (this.charsPerToken * $("speed").value);
    scale($("mine"), seconds / FULL_S);
    put($("mine-text"), this.isDone ? "all read" : this.text ? `${seconds.toFixed(1)} s ahead of you` : this.thoughts ? "thinking" : "waiting for text");
    $("stop").hidden = this.isDone;
    $("send").hidden = !this.over;
    put($("stop"), this.over ? "Show all" : "Stop");
  }
  report() {
    if (!this.id || this.over) return;
    const body = JSON.stringify({ played_chars: Math.floor(this.read) });
    fetch(`v1/streams/${this.id}/buffer`, { method: "POST", body, headers: headers({ "Content-Type": "application/json" }) }).catch(() => {});
  }
  // What is not read yet is left out, or shown at once.
  cut() { this.text = this.text.slice(0, Math.floor(this.read)); this.stop.abort(); }
  skip() { this.read = this.text.length; this.tick(); }
  close() {
    clearInterval(this.timer);
    clearInterval(this.reporter);
    this.line.classList.remove("playing");
    put($("spoken"), this.text);
    const { completion_tokens: tokens, ttft_s: first, stall_s: stall, num_preemptions: pauses } = this.usage ?? {};
    if (first === undefined) { if (!this.text) this.line.remove(); return; }
    const facts = `${tokens} tokens · first after ${first.toFixed(2)} s${stall === undefined ? "" : stall < 0.05 ? " · never waited" : ` · waited ${stall.toFixed(1)} s on the way`}`;
    this.line.after(Object.assign(document.createElement("p"), { className: "facts note", textContent: facts + (pauses ? ` · paused ${pauses}×` : "") }));
    $("talk").scrollTop = $("talk").scrollHeight;
  }
}

async function send(question) {
  if (current && !current.over) return;
  if (current && !current.isDone) current.skip();
  conversation.push({ role: "user", content: question });
  say("user", question);
  const answer = current = new Answer(), mine = conversation;
  // The speed may change on the way; the reports tell.
  const body = {
    messages: mine, stream: true, consumption_rate: "auto", max_tokens: 512, temperature: 0.6, top_p: 0.9,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  try {
    const response = await ask("v1/chat/completions", {
      method: "POST", body: JSON.stringify(body), headers: headers({ "Content-Type": "application/json" }), signal: answer.stop.signal,
    });
    for await (const data of eventsOf(response, "The connection was lost before the answer was complete.")) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      answer.take(chunk);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      say("problem", error.message).setAttribute("role", "alert");
      if (!answer.text && !$("question").value) $("question").value = question;
    }
  }
  answer.over = true;
  if (answer.text) mine.push({ role: "assistant", content: answer.text });
  else mine.pop();
  answer.tick();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || (current && !current.over)) return;
  $("question").value = "";
  send(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("ideas").addEventListener("click", (event) => { if (event.target.tagName === "BUTTON") { $("question").focus(); send(event.target.textContent); } });
$("stop").addEventListener("click", () => { if (current.over) current.skip(); else current.cut(); $("question").focus(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !$("stop").hidden) $("stop").click(); });
$("fresh").addEventListener("click", () => {
  if (current && !current.over) current.cut();
  if (current && !current.isDone) current.skip();
  conversation = [];
  for (const line of [...$("talk").querySelectorAll("p")]) line.remove();
  $("ideas").hidden = false;
  $("fresh").hidden = true;
  $("question").focus();
});
// An English word is about four thirds of a token.
const tellSpeed = () => put($("speed-text"), `${$("speed").value} tokens/s, ${$("speed").value * 45} words/min`);
$("speed").addEventListener("input", tellSpeed);
tellSpeed();
watch();
