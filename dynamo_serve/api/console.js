// What the scheduler does and why, from what /admin tells an operator. No library, nothing from elsewhere.
"use strict";

const EVERY_MS = 1000;
const KEPT = 120; // looks that a line shows
const MINUTE = 60; // looks back, for rates and promises
const MOST_ROWS = 60;
const WHY = {
  step: "the running step has to end",
  merge_window: "others may join within the delay",
  slots: "no place in the batch",
  pages: "too few KV pages are free",
  fair_share: "another tenant is further below its share",
  order: "others of the same tenant come first",
  quota_live: "the tenant's live_sequences",
  quota_pages: "the tenant's pages_burst",
  prefix: "another request is computing its prefix",
  reader: "nobody reads the stream",
  restore: "its pages come back from a tier",
};

// ── numbers ──────────────────────────────────────────────────────────────────

const sum = (items) => items.reduce((total, each) => total + each, 0);

/** Digits that tell something. */
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number" || Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}

const percent = (part, whole) => (whole > 0 ? `${short((100 * part) / whole)} %` : "–");

function seconds(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) < 1 ? `${short(1000 * value)} ms` : `${short(value)} s`;
}

/** What one look at the server says, as far as lines are drawn of it or rates made. */
function sample(state, costs, at) {
  const tenants = {};
  for (const [name, used] of Object.entries(costs.tenants)) {
    const promised = { ttft_kept: 0, ttft_late: 0, itl_kept: 0, itl_late: 0 };
    for (const counts of Object.values(used.promises))
      for (const key of Object.keys(promised)) promised[key] += counts[key] || 0;
    tenants[name] = {
      output: used.output_tokens, prefill: used.prefill_tokens, saved: used.saved_tokens,
      cost: used.cost_seconds, ...promised,
    };
  }
  const { used, cached, total } = state.pages;
  return { at, running: state.num_running, waiting: state.num_waiting, used, cached, total, tenants };
}

/** How much a tenant's count has grown between two looks; an engine that came anew began at 0. */
function grown(before, now, name, key) {
  const last = (now.tenants[name] || {})[key] || 0;
  const first = ((before && before.tenants[name]) || {})[key] || 0;
  return last >= first ? last - first : last;
}

function rate(before, now, key) {
  if (!before || now.at <= before.at) return 0;
  return sum(Object.keys(now.tenants).map((name) => grown(before, now, name, key))) / (now.at - before.at);
}

/** [caption, what is in the tile now, the line above it] from looks, the oldest first. */
function tiles(looks) {
  const now = looks[looks.length - 1];
  const before = looks[Math.max(0, looks.length - 1 - MINUTE)];
  const pairs = looks.slice(1).map((look, i) => [looks[i], look]);
  const whole = (key) => sum(Object.keys(now.tenants).map((name) => grown(before, now, name, key)));
  const kept = (which) => percent(whole(`${which}_kept`), whole(`${which}_kept`) + whole(`${which}_late`));
  const speed = pairs.map(([one, two]) => rate(one, two, "output"));
  return [
    ["output tokens/s", short(Math.round(rate(looks[Math.max(0, looks.length - 6)], now, "output"))), speed],
    ["prompt tokens/s computed", short(Math.round(rate(looks[Math.max(0, looks.length - 6)], now, "prefill"))),
      pairs.map(([one, two]) => rate(one, two, "prefill"))],
    ["running", short(now.running), looks.map((look) => look.running)],
    ["waiting", short(now.waiting), looks.map((look) => look.waiting)],
    [`KV pages in use, of ${short(now.total)}`, percent(now.used, now.total), looks.map((look) => look.used)],
    ["KV pages kept for reuse", percent(now.cached, now.total), looks.map((look) => look.cached)],
    ["prompt tokens not computed again, last minute", percent(whole("saved"), whole("saved") + whole("prefill")), []],
    ["first tokens in time, last minute", kept("ttft"), []],
    ["further tokens in time, last minute", kept("itl"), []],
  ];
}

/** Rows of the tenants' table: the last minute, and against what each may expect by its weight. */
function tenantRows(state, looks) {
  const now = looks[looks.length - 1];
  const before = looks[Math.max(0, looks.length - 1 - MINUTE)];
  const names = Object.keys(state.tenants).sort();
  const cost = Object.fromEntries(names.map((name) => [name, grown(before, now, name, "cost")]));
  const active = names.filter((name) => cost[name] > 0 || state.tenants[name].live > 0 || state.tenants[name].waiting > 0);
  const weights = sum(active.map((name) => state.tenants[name].weight));
  return names.map((name) => {
    const one = state.tenants[name];
    const get = (key) => grown(before, now, name, key);
    return [
      name, one.class, one.weight, one.live, one.waiting, Math.round(one.pages),
      short(get("output") / Math.max(1, now.at - before.at)),
      percent(cost[name], sum(Object.values(cost))),
      active.includes(name) ? percent(one.weight, weights) : "–",
      percent(get("saved"), get("saved") + get("prefill")),
      percent(get("ttft_kept"), get("ttft_kept") + get("ttft_late")),
      percent(get("itl_kept"), get("itl_kept") + get("itl_late")),
    ];
  });
}

/** "3 for pages (too few KV pages are free)", the most frequent first. */
function reasons(waiting, total) {
  const counts = {};
  for (const each of waiting) counts[each.waits_for] = (counts[each.waits_for] || 0) + 1;
  const told = Object.entries(counts)
    .sort((one, two) => two[1] - one[1])
    .map(([why, count]) => `${count} for ${why}${WHY[why] ? ` (${WHY[why]})` : ""}`);
  if (!told.length) return "Nobody waits.";
  return (total > waiting.length ? `Of the first ${waiting.length} of ${total}: ` : "") + told.join(", ") + ".";
}

/** What a decision tells beside its name, in words that are the same as in the journal. */
function details(entry) {
  const known = ["at_s", "decision", "reason", "request", "tenant"];
  return Object.entries(entry)
    .filter(([key, value]) => !known.includes(key) && value !== 0 && value !== null)
    .map(([key, value]) => (key.endsWith("_s") || key.endsWith("seconds")
      ? `${key.replace(/_s$/, "")} ${seconds(value)}` : `${key} ${typeof value === "object" ? JSON.stringify(value) : short(value)}`))
    .join(", ");
}

if (typeof module !== "undefined") module.exports = { WHY, details, grown, rate, reasons, sample, seconds, short, tenantRows, tiles };

// ── the page ─────────────────────────────────────────────────────────────────

function page() {
  const at = (id) => document.getElementById(id);
  let key = sessionStorage.getItem("key") || "";
  let looks = [], last = null, isPaused = false, isAsking = false;

  // Texts are never taken for markup: names, ids and reasons may be anybody's.
  function el(tag, text, className) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function table(id, heads, rows, numText, none) {
    const head = el("tr");
    heads.forEach((text, i) => head.append(el("th", text, i < numText ? "text" : "")));
    const lines = rows.map((row) => {
      const line = el("tr");
      row.forEach((cell, i) => {
        const isLong = typeof cell === "string" && cell.length > 60;
        const td = el("td", cell instanceof Node ? undefined : typeof cell === "number" ? short(cell) : cell,
          isLong ? "text wide" : i < numText ? "text" : "");
        if (cell instanceof Node) td.append(cell);
        line.append(td);
      });
      return line;
    });
    if (!lines.length) lines.push(el("tr")), lines[0].append(el("td", none, "text faint"));
    at(id).replaceChildren(...(rows.length ? [head] : []), ...lines);
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

  async function ask(path, options = {}) {
    const answer = await fetch(path, { ...options, headers: { Authorization: `Bearer ${key}`, ...options.headers }, cache: "no-store" });
    const said = await answer.json();
    if (answer.ok) return said;
    const error = new Error(said.error ? said.error.message : `${path}: ${answer.status}`);
    error.status = answer.status;
    throw error;
  }

  function health(ready, said) {
    const why = said.reason || (said.error && said.error.message) || "";
    at("health").textContent = ready ? "● ready" : `● not ready${why ? `: ${why}` : ""}`;
    at("health").className = ready ? "good" : "bad";
  }

  function mode(rung) {
    const select = el("select");
    select.setAttribute("aria-label", `mode of ${rung.rung}`);
    for (const name of ["auto", "pin", "forbid"]) select.append(new Option(name, name));
    select.value = rung.mode;
    select.addEventListener("change", async () => {
      try {
        const body = JSON.stringify({ rung: rung.rung, mode: select.value });
        await ask("/admin/controller", { method: "POST", body, headers: { "Content-Type": "application/json" } });
      } catch (error) { fault(error.message); }
      select.blur();
    });
    return select;
  }

  function standing(rung) {
    if (!rung.is_possible) return el("span", "not possible here", "faint");
    return rung.level ? el("span", `taken, level ${rung.level} of ${rung.levels}`, "bad") : "not taken";
  }

  function show({ state, costs, controller, incidents }) {
    at("tiles").replaceChildren(...tiles(looks).map(([caption, value, values]) => {
      const tile = el("div", undefined, "tile");
      tile.append(el("span", caption), el("b", value));
      if (values.length > 1) tile.append(line(values));
      return tile;
    }));
    table("tenants", ["tenant", "class", "weight", "running", "waiting", "pages", "tokens/s", "of the device",
      "by weight", "not computed again", "first tokens in time", "further in time"], tenantRows(state, looks), 2, "Nobody has come yet.");
    at("reasons").textContent = reasons(state.waiting, state.num_waiting);
    const brief = (each, what) => [each.id, each.tenant, each.class, what, seconds(each.age_s), each.prompt_tokens, each.output_tokens, each.pages];
    const rows = [...state.running.map((each) => brief(each, each.phase)), ...state.waiting.map((each) => brief(each, `waits: ${each.waits_for}`))];
    table("requests", ["request", "tenant", "class", "phase", "age", "prompt", "output", "pages"], rows.slice(0, MOST_ROWS), 4, "There are none.");
    at("troubles").textContent = !controller.is_on ? "It is switched off (scheduler.ladder)."
      : controller.troubles.length ? `It sees: ${controller.troubles.join(", ")}.` : `It sees no trouble, for ${seconds(controller.good_for_s)}.`;
    if (!at("rungs").contains(document.activeElement)) // a list that somebody has open stays
      table("rungs", ["rung", "now", "mode", "what it does", "because of", "has helped", "taken", "undone"], controller.rungs.map((rung) =>
        [rung.rung, standing(rung), mode(rung), rung.effect, rung.trigger || "–", rung.has_helped === null ? "–" : rung.has_helped ? "yes" : "no",
          rung.num_taken, rung.num_undone]), 6, "");
    const wanted = at("filter").value.toLowerCase();
    const told = state.journal.slice().reverse().map((entry) =>
      [`${seconds(-entry.at_s)} ago`, entry.decision, entry.reason, entry.tenant, entry.request, details(entry)]);
    table("journal", ["when", "decision", "why", "tenant", "request", "numbers"],
      told.filter((row) => row.join(" ").toLowerCase().includes(wanted)).slice(0, MOST_ROWS), 6, "None.");
    table("incidents", ["when", "why", "down for", "failed"], incidents.incidents.slice().reverse().map((one) =>
      [new Date(1000 * one.at).toLocaleString(), one.reason, seconds(one.down_s), one.failed.length]), 2, "None.");
  }

  function fault(text) {
    at("fault").textContent = text;
    at("fault").hidden = !text;
  }

  function shut(text) {
    key = ""; looks = [];
    sessionStorage.removeItem("key");
    at("all").hidden = at("forget").hidden = true;
    at("door").hidden = false;
    fault(text);
  }

  async function look() {
    if (isAsking || isPaused || document.hidden || !key) return;
    isAsking = true;
    try {
      const ready = await fetch("/ready", { cache: "no-store" });
      health(ready.ok, await ready.json());
      const names = ["state", "costs", "controller", "incidents"];
      const answers = await Promise.all(names.map((name) => ask(`/admin/${name}`)));
      last = Object.fromEntries(names.map((name, i) => [name, answers[i]]));
      looks = [...looks, sample(last.state, last.costs, performance.now() / 1000)].slice(-KEPT);
      at("door").hidden = true;
      at("all").hidden = at("forget").hidden = false;
      fault("");
      show(last);
    } catch (error) {
      if (error.status === 401 || error.status === 403) shut(error.message);
      else fault(`${error.message}; asked again every second`);
    } finally { isAsking = false; }
  }

  at("door").addEventListener("submit", (event) => {
    event.preventDefault();
    key = at("key").value.trim();
    at("key").value = "";
    sessionStorage.setItem("key", key); // of this tab, until it is closed
    look();
  });
  at("forget").addEventListener("click", () => shut(""));
  at("filter").addEventListener("input", () => last && show(last));
  at("pause").addEventListener("click", () => {
    isPaused = !isPaused;
    at("pause").textContent = isPaused ? "Go on" : "Pause";
    at("pause").setAttribute("aria-pressed", String(isPaused));
    look();
  });
  at("door").hidden = Boolean(key);
  setInterval(look, EVERY_MS);
  document.addEventListener("visibilitychange", look);
  look();
}

if (typeof document !== "undefined") page();
