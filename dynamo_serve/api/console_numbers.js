// What the scheduler does and why, from what /admin tells an operator. No library, nothing from elsewhere.
"use strict";

const KEPT = 120; // seconds that a line shows
const MINUTE = 60; // seconds of promises and shares
const MOMENT = 5; // seconds of a rate
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
  token_cap: "max_prefill_tokens or max_mixed_tokens",
  step_time: "max_step_ms",
  itl_target: "somebody's further tokens would be late",
  over_share: "it made room for a tenant further below its share",
  guarantee: "it made room for guaranteed pages",
  out_of_pages: "it made room for one that had to grow",
  not_restored: "a page that it waited for did not come back",
  shrink_chunks: "a rung of the ladder",
  widen_window: "a rung of the ladder",
  cap_batch: "a rung of the ladder",
  spill: "a rung of the ladder",
};
// What becomes of promised tokens: in time, and not.
const KINDS = { ttft: ["late", "refused", "never"], itl: ["late", "paused"] };

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
    const promised = {};
    for (const [kind, others] of Object.entries(KINDS))
      for (const how of ["kept", ...others])
        promised[`${kind}_${how}`] = sum(Object.values(used.promises).map((counts) => counts[`${kind}_${how}`] || 0));
    tenants[name] = {
      output: used.output_tokens, prefill: used.prefill_tokens, saved: used.saved_tokens,
      cost: used.cost_seconds, ...promised,
    };
  }
  const { used, cached, total } = state.pages;
  return { at, running: state.num_running, waiting: state.num_waiting, used, cached, total, tenants };
}

/** The looks to draw, with another one: none is older than a line is long, nor of an engine before this one,
 * whose counts began at 0. */
function remembered(looks, look) {
  const last = looks[looks.length - 1];
  const isNew = last && Object.entries(last.tenants).some(([name, counts]) =>
    Object.entries(counts).some(([key, count]) => count > ((look.tenants[name] || {})[key] || 0)));
  return [...(isNew ? [] : looks), look].filter((each) => each.at >= look.at - KEPT);
}

/** The first look of the last so many seconds. */
const since = (looks, span) => looks.find((look) => look.at >= looks[looks.length - 1].at - span);

/** How much a tenant's count has grown between two looks. */
const grown = (before, now, name, key) => now.tenants[name] ? now.tenants[name][key] - ((before.tenants[name] || {})[key] || 0) : 0;

function rate(before, now, key) {
  if (now.at <= before.at) return 0;
  return sum(Object.keys(now.tenants).map((name) => grown(before, now, name, key))) / (now.at - before.at);
}

/** The part of what was promised that came in time; `get` tells how often each thing happened. */
const kept = (get, kind) => percent(get(`${kind}_kept`), sum(["kept", ...KINDS[kind]].map((how) => get(`${kind}_${how}`))));

/** [caption, what is in the tile now, the line above it] from looks, the oldest first. */
function tiles(looks) {
  const now = looks[looks.length - 1], before = since(looks, MINUTE);
  const pairs = looks.slice(1).map((look, i) => [looks[i], look]);
  const whole = (key) => sum(Object.keys(now.tenants).map((name) => grown(before, now, name, key)));
  const speed = pairs.map(([one, two]) => rate(one, two, "output"));
  return [
    ["output tokens/s", short(Math.round(rate(since(looks, MOMENT), now, "output"))), speed],
    ["prompt tokens/s computed", short(Math.round(rate(since(looks, MOMENT), now, "prefill"))),
      pairs.map(([one, two]) => rate(one, two, "prefill"))],
    ["running", short(now.running), looks.map((look) => look.running)],
    ["waiting", short(now.waiting), looks.map((look) => look.waiting)],
    [`KV pages in use, of ${short(now.total)}`, percent(now.used, now.total), looks.map((look) => look.used)],
    ["KV pages kept for reuse", percent(now.cached, now.total), looks.map((look) => look.cached)],
    ["prompt tokens not computed again, last minute", percent(whole("saved"), whole("saved") + whole("prefill")), []],
    ["first tokens in time, last minute", kept(whole, "ttft"), []],
    ["further tokens in time, last minute", kept(whole, "itl"), []],
  ];
}

/** Rows of the tenants' table: the last minute, and against what each may expect by its weight. */
function tenantRows(state, looks) {
  const now = looks[looks.length - 1], before = since(looks, MINUTE);
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
      kept(get, "ttft"), kept(get, "itl"),
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
    .filter(([key, value]) => !known.includes(key) && value !== null)
    .map(([key, value]) => (key.endsWith("_s") || key.endsWith("seconds")
      ? `${key.replace(/_s$/, "")} ${seconds(value)}` : `${key} ${typeof value === "object" ? JSON.stringify(value) : short(value)}`))
    .join(", ");
}

if (typeof module !== "undefined") module.exports = { WHY, details, grown, rate, reasons, remembered, sample, seconds, short, tenantRows, tiles };
