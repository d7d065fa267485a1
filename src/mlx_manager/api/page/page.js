// Shows /api/status and keeps it fresh. Whatever comes from the server becomes text, never markup.
"use strict";

const EVERY_MS = 5000;
const STATES = {
  cold: "not loaded",
  queued: "waits for memory",
  loading: "loading",
  ready: "ready",
  unloading: "being unloaded",
  failed: "failed",
};
const COLUMNS = ["Model", "State", "Running", "Waiting", "Parameters", "Size", "Context"];

const byId = (id) => document.getElementById(id);
const main = byId("main");
const rows = new Map(); // model id → its row, which stays the same element for as long as the model is there
let key = null; // in memory only
let timer = null;
let asking = null;

// A text that is set again is a flicker to a screen reader and a lost selection to everybody else.
function setText(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

function scaled(number, units, gap) {
  let unit = 0;
  for (; number >= (unit ? 999.5 : 1000) && unit < units.length - 1; unit++) number /= 1000;
  return number.toFixed(unit === 0 || number >= 99.5 ? 0 : 1) + gap + units[unit];
}

function newRow() {
  const row = document.createElement("tr");
  COLUMNS.forEach((name, column) => {
    const cell = document.createElement("td");
    cell.dataset.label = name;
    if (column > 1) cell.className = "number";
    row.append(cell);
  });
  const pill = document.createElement("span");
  const why = document.createElement("span");
  why.className = "why";
  row.cells[1].append(pill, why);
  return row;
}

function fill(row, model) {
  const [name, state, running, waiting, parameters, size, context] = row.cells;
  setText(name, model.id);
  const [pill, why] = state.children;
  pill.className = `pill ${Object.hasOwn(STATES, model.state) ? model.state : ""}`;
  setText(pill, STATES[model.state] ?? model.state);
  setText(why, model.error ?? "");
  setText(running, model.num_running);
  setText(waiting, model.num_waiting);
  setText(parameters, scaled(model.num_parameters, ["", "K", "M", "B", "T"], ""));
  setText(size, scaled(model.size_bytes, ["B", "kB", "MB", "GB", "TB"], " "));
  setText(context, model.context_length === null ? "–" : model.context_length.toLocaleString("en"));
}

function show(status) {
  const { models } = status;
  setText(byId("version"), status.version);
  setText(byId("num-in-flight"), status.num_in_flight);
  setText(byId("num-running"), models.reduce((sum, model) => sum + model.num_running, 0));
  setText(byId("num-waiting"), models.reduce((sum, model) => sum + model.num_waiting, 0));
  setText(byId("num-ready"), models.filter((model) => model.state === "ready").length);

  const gone = new Set(rows.keys());
  const body = byId("rows");
  models.forEach((model, position) => {
    gone.delete(model.id);
    if (!rows.has(model.id)) rows.set(model.id, newRow());
    const row = rows.get(model.id);
    fill(row, model);
    if (body.children[position] !== row) body.insertBefore(row, body.children[position] ?? null);
  });
  for (const id of gone) {
    rows.get(id).remove();
    rows.delete(id);
  }
  document.querySelector("table").hidden = models.length === 0;
  byId("no-models").hidden = models.length > 0;

  // The recipes keep their model while it is there: nobody wants a text to change that is being copied.
  const named = document.querySelectorAll(".model");
  const talker = models.find((model) => model.kind === "text");
  if (talker !== undefined && !rows.has(named[0].textContent)) named.forEach((span) => setText(span, talker.id));

  byId("running").hidden = byId("models").hidden = false;
  byId("unlock").hidden = true;
  connection(status.draining ? "shutting down" : "connected", status.draining ? "warning" : "ready");
}

function connection(text, look) {
  const pill = byId("connection");
  pill.className = `pill ${look}`;
  setText(pill, text);
}

function askForKey(message) {
  key = null;
  byId("running").hidden = byId("models").hidden = true;
  byId("unlock").hidden = false;
  setText(byId("key-error"), message);
  setText(byId("connection"), "");
  stop();
}

async function refresh() {
  asking?.abort();
  const mine = (asking = new AbortController());
  const deadline = setTimeout(() => mine.abort(), EVERY_MS);
  try {
    const headers = key === null ? {} : { authorization: `Bearer ${key}` };
    const reply = await fetch("/api/status", { headers, signal: mine.signal, cache: "no-store" });
    if (reply.status === 401) return askForKey(key === null ? "" : "That is not the key of this server.");
    if (!reply.ok) throw new Error(`status ${reply.status}`);
    show(await reply.json());
  } catch (error) {
    if (asking !== mine) return; // a newer one is under way, or nobody looks
    connection("no answer, trying again", "failed");
  } finally {
    clearTimeout(deadline);
  }
}

function stop() {
  clearInterval(timer);
  timer = null;
  const last = asking;
  asking = null;
  last?.abort();
}

function start() {
  if (timer !== null || document.hidden || (key === null && main.dataset.needsKey === "yes")) return;
  timer = setInterval(refresh, EVERY_MS);
  refresh();
}

async function copy(button) {
  const source = byId(button.dataset.copies);
  try {
    await navigator.clipboard.writeText(source.textContent);
  } catch {
    // Pages that came over plain HTTP from another machine have no clipboard of that kind.
    getSelection().selectAllChildren(source);
    if (!document.execCommand("copy")) return setText(byId("announcer"), "Selected: copy it with the keyboard.");
  }
  button.textContent = "Copied";
  byId("announcer").textContent = "Copied";
  setTimeout(() => {
    button.textContent = "Copy";
    byId("announcer").textContent = "";
  }, 1500);
}

document.querySelectorAll("button.copy").forEach((button) => button.addEventListener("click", () => copy(button)));
byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) return setText(byId("key-error"), "A key has no spaces or special characters.");
  key = given;
  byId("key").value = "";
  setText(byId("key-error"), "");
  stop();
  start();
});
document.addEventListener("visibilitychange", () => (document.hidden ? stop() : start()));

if (main.dataset.status !== undefined) show(JSON.parse(main.dataset.status));
start();
