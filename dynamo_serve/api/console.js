// The page: asks /admin once a second with the operator's key, and shows what console_numbers.js makes of it.
"use strict";

const EVERY_MS = 1000;
const MOST_ROWS = 60;
const ANSWER_MS = 10000; // what a server may take before it counts as gone
const NAMES = ["state", "costs", "controller"];
const now = { key: "", looks: [], last: null, isPaused: false, isAsking: false };
const at = (id) => document.getElementById(id);

// ── parts of a page ──────────────────────────────────────────────────────────

// Texts are never taken for markup: names, ids and reasons may be anybody's.
function el(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function cell(value, isText) {
  const isLong = typeof value === "string" && value.length > 60;
  const made = el("td", value instanceof Node ? undefined : typeof value === "number" ? short(value) : value,
    isLong ? "text wide" : isText ? "text" : "");
  if (value instanceof Node) made.append(value);
  return made;
}

function headed(heads, numText) {
  const head = el("tr");
  heads.forEach((text, i) => head.append(el("th", text, i < numText ? "text" : "")));
  return head;
}

/** A table whose first `numText` columns are texts; `none` where it has no rows. */
function table(id, heads, rows, numText, none) {
  const lines = rows.map((row) => {
    const line = el("tr");
    row.forEach((value, i) => line.append(cell(value, i < numText)));
    return line;
  });
  if (!lines.length) lines.push(el("tr")), lines[0].append(el("td", none, "text faint"));
  at(id).replaceChildren(...(rows.length ? [headed(heads, numText)] : []), ...lines);
}

function line(values) {
  const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg");
  const top = Math.max(...values, 1e-9);
  svg.setAttribute("viewBox", `0 0 ${values.length - 1} 34`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const drawn = document.createElementNS(ns, "polyline");
  drawn.setAttribute("points", values.map((value, i) => `${i},${(33 - (31 * value) / top).toFixed(1)}`).join(" "));
  svg.append(drawn);
  return svg;
}

/** Not written anew where it is the same: it would be read out again. */
function say(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
  at(id).hidden = !text;
}

function health(isReady, why) {
  say("health", isReady ? "● ready" : `● not ready${why ? `: ${why}` : ""}`);
  at("health").className = isReady ? "good" : "bad";
}

// ── what is shown ────────────────────────────────────────────────────────────

function showTiles() {
  at("tiles").replaceChildren(...tiles(now.looks).map(([caption, value, values]) => {
    const tile = el("div", undefined, "tile");
    tile.append(el("span", caption), el("b", value));
    if (values.length > 1) tile.append(line(values));
    return tile;
  }));
}

function showRequests(state) {
  table("tenants", ["tenant", "class", "weight", "running", "waiting", "pages", "tokens/s", "of the device", "by weight",
    "not computed again", "first tokens in time", "further in time"], tenantRows(state, now.looks), 2, "Nobody has come yet.");
  at("reasons").textContent = reasons(state.waiting, state.num_waiting);
  const brief = (each, what) => [each.id, each.tenant, each.class, what, seconds(each.age_s), each.prompt_tokens, each.output_tokens, each.pages];
  const rows = [...state.running.map((each) => brief(each, each.phase)), ...state.waiting.map((each) => brief(each, `waits: ${each.waits_for}`))];
  table("requests", ["request", "tenant", "class", "phase", "age", "prompt", "output", "pages"], rows.slice(0, MOST_ROWS), 4, "There are none.");
}

function showDecisions(state) {
  const wanted = at("filter").value.toLowerCase();
  const told = state.journal.slice().reverse().map((entry) =>
    [`${seconds(-entry.at_s)} ago`, entry.decision, entry.reason, entry.tenant, entry.request, details(entry)]);
  table("journal", ["when", "decision", "why", "tenant", "request", "numbers"],
    told.filter((row) => row.slice(1).join(" ").toLowerCase().includes(wanted)).slice(0, MOST_ROWS), 6, "None.");
}

function standing(rung) {
  if (!rung.is_possible) return el("span", "not possible here", "faint");
  return rung.level ? el("span", `taken, level ${rung.level} of ${rung.levels}`, "bad") : el("span", "not taken");
}

function modeOf(name) {
  const select = el("select");
  select.setAttribute("aria-label", `mode of ${name}`);
  // In an order in which the keyboard passes nothing that acts on the way to another mode. Restarts
  // cannot be pinned: there would be no end of them.
  for (const mode of ["pin", "auto", "forbid"]) if (mode !== "pin" || name !== "restart_engine") select.append(new Option(mode, mode));
  select.addEventListener("change", async () => {
    try {
      const body = JSON.stringify({ rung: name, mode: select.value });
      await ask("controller", { method: "POST", body, headers: { "Content-Type": "application/json" } });
      say("order", "");
    } catch (error) {
      say("order", error.message);
      select.value = select.dataset.mode;
    }
  });
  return select;
}

/** Selects stay where they are, for somebody may have one open; what is beside them changes. */
function showLadder(controller) {
  say("troubles", !controller.is_on ? "It is switched off (scheduler.ladder)."
    : controller.troubles.length ? `It sees: ${controller.troubles.join(", ")}.` : "It sees no trouble.");
  const body = at("rungs");
  if (body.rows.length !== controller.rungs.length + 1)
    table("rungs", ["rung", "now", "mode", "what it does", "because of", "has helped", "taken", "undone"],
      controller.rungs.map((rung) => [rung.rung, "", modeOf(rung.rung), rung.effect, "", "", "", ""]), 6, "");
  controller.rungs.forEach((rung, i) => {
    const cells = body.rows[i + 1].cells, select = cells[2].firstChild;
    cells[1].replaceChildren(standing(rung));
    select.dataset.mode = rung.mode;
    if (document.activeElement !== select) select.value = rung.mode;
    const helped = rung.has_helped === null ? "–" : rung.has_helped ? "yes" : "no";
    [rung.trigger || "–", helped, short(rung.num_taken), short(rung.num_undone)].forEach((text, j) => { cells[4 + j].textContent = text; });
  });
}

function showIncidents({ incidents }) {
  table("incidents", ["when", "why", "down for", "failed"], incidents.slice().reverse().map((one) =>
    [new Date(1000 * one.at).toLocaleString(), one.reason, seconds(one.down_s), one.failed.length]), 2, "None.");
}

// ── asking ───────────────────────────────────────────────────────────────────

async function ask(name, options = {}) {
  const headers = { Authorization: `Bearer ${now.key}`, ...options.headers };
  const answer = await fetch(`admin/${name}`, { ...options, headers, cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
  const said = await answer.json().catch(() => ({}));
  if (answer.ok) return said;
  const error = new Error(said.error ? said.error.message : `${name}: ${answer.status}`);
  error.status = answer.status;
  throw error;
}

function shut(why) {
  Object.assign(now, { key: "", looks: [], last: null });
  sessionStorage.removeItem("key");
  at("all").hidden = at("forget").hidden = true;
  for (const id of ["tiles", "tenants", "requests", "rungs", "journal", "incidents"]) at(id).replaceChildren();
  at("door").hidden = false;
  say("fault", why);
  say("order", "");
}

async function lookOnce(key) {
  const ready = await fetch("ready", { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
  const said = await ready.json().catch(() => ({}));
  health(ready.ok, said.error && said.error.message);
  const incidents = await ask("incidents"); // which needs no engine
  if (key !== now.key) return;
  at("door").hidden = true;
  at("all").hidden = at("forget").hidden = false;
  showIncidents(incidents);
  const [state, costs, controller] = await Promise.all(NAMES.map((name) => ask(name)));
  if (key !== now.key) return;
  now.last = state;
  now.looks = remembered(now.looks, sample(state, costs, performance.now() / 1000));
  say("fault", "");
  showTiles();
  showRequests(state);
  showLadder(controller);
  showDecisions(state);
}

async function look() {
  const key = now.key;
  if (now.isAsking || now.isPaused || document.hidden || !key) return;
  now.isAsking = true;
  try {
    await lookOnce(key);
  } catch (error) {
    if (key !== now.key) return;
    if (error.status === 401 || error.status === 403) return shut(error.message);
    if (!error.status) health(false, "no answer");
    say("fault", `${error.message}; asked again every second`);
  } finally { now.isAsking = false; }
}

function enter(event) {
  event.preventDefault();
  const key = at("key").value.trim();
  at("key").value = "";
  if (!/^[\x21-\x7e]+$/.test(key)) return shut("A key has letters, digits and signs of ASCII, and no spaces.");
  now.key = key;
  pause(false);
  sessionStorage.setItem("key", key); // of this tab, until it is closed
  look();
}

function pause(isPaused) {
  now.isPaused = isPaused;
  at("pause").textContent = isPaused ? "Go on" : "Pause";
  at("pause").setAttribute("aria-pressed", String(isPaused));
  look();
}

function start() {
  now.key = sessionStorage.getItem("key") || "";
  at("door").addEventListener("submit", enter);
  at("forget").addEventListener("click", () => shut(""));
  at("filter").addEventListener("input", () => now.last && showDecisions(now.last));
  at("pause").addEventListener("click", () => pause(!now.isPaused));
  at("door").hidden = Boolean(now.key);
  setInterval(look, EVERY_MS);
  document.addEventListener("visibilitychange", look);
  look();
}

if (typeof document !== "undefined") start();
