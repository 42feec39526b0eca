"use strict";
// What a curve is at a step: under the pointer, or by the arrow keys. Without this script the page shows all but that.
const tip = document.getElementById("tip");
let leave = () => {};

function watch(panel) {
  const { box, x, y, log, lines } = JSON.parse(panel.dataset.curves);
  const drawing = panel.querySelector("svg");
  const ordered = (some) => [...new Set(some.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const steps = ordered(lines);
  const seldom = ordered(lines.filter((line) => line.dots));
  if (!steps.length) return;
  let at = null;
  let marks = [];

  const share = (value, [from, to]) => (value - from) / (to - from);
  const across = (step) => box[0] + (box[2] - box[0]) * share(step, x);
  const down = (value) => box[3] - (box[3] - box[1]) * (log ? share(Math.log(value), y.map(Math.log)) : share(value, y));

  function put(name, left, top) {
    const mark = Object.assign(document.createElement("i"), { className: name });
    const where = drawing.getBoundingClientRect();
    const from = panel.getBoundingClientRect();
    mark.style.setProperty("left", where.left - from.left + left * where.width + "px");
    mark.style.setProperty("top", where.top - from.top + top * where.height + "px");
    panel.append(mark);
    marks.push(mark);
    return mark;
  }

  function show(step) {
    leave();
    leave = hide;
    at = step;
    put("cursor", across(step), box[1]).style.setProperty("height", (box[3] - box[1]) * drawing.getBoundingClientRect().height + "px");
    const list = document.createElement("dl");
    const add = (name, value) => list.append(Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: value }));
    add("step", step.toLocaleString("en"));
    for (const line of lines) {
      const value = line.values[line.steps.indexOf(step)] ?? null;
      if (value === null) continue;
      add(line.name, String(Number(value.toPrecision(4))));
      put("dot", across(step), down(value));
    }
    tip.replaceChildren(list);
    tip.hidden = false;
    // Above the curves or else below them, so that it hides none.
    const where = drawing.getBoundingClientRect();
    const left = where.left + across(step) * where.width - tip.offsetWidth / 2;
    const above = where.top + box[1] * where.height - tip.offsetHeight - 8;
    tip.style.setProperty("left", Math.max(4, Math.min(left, innerWidth - tip.offsetWidth - 4)) + "px");
    tip.style.setProperty("top", (above > 4 ? above : where.top + box[3] * where.height + 8) + "px");
  }

  function hide() {
    marks.forEach((mark) => mark.remove());
    marks = [];
    tip.hidden = true;
    at = null;
    leave = () => {};
  }

  function point(event) {
    const where = drawing.getBoundingClientRect();
    const far = (step) => Math.abs(where.left + across(step) * where.width - event.clientX);
    const nearest = (some) => some.reduce((best, step) => (far(step) < far(best) ? step : best), some[0]);
    const mark = nearest(seldom);  // few among many, so they catch the pointer from further away
    const step = mark !== undefined && far(mark) < 6 ? mark : nearest(steps);
    if (step !== at) show(step);
  }

  panel.tabIndex = 0;
  panel.setAttribute("role", "group");
  panel.setAttribute("aria-label", drawing.getAttribute("aria-label") + ", values by the arrow keys");
  panel.addEventListener("pointermove", point);
  panel.addEventListener("pointerdown", point);
  panel.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  panel.addEventListener("focus", () => { if (panel.matches(":focus-visible")) show(steps[steps.length - 1]); });
  panel.addEventListener("blur", hide);
  panel.addEventListener("keydown", (event) => {
    const index = steps.indexOf(at);
    const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    show(steps[Math.min(Math.max(to, 0), steps.length - 1)]);
  });
}

document.querySelectorAll("[data-curves]").forEach(watch);
document.addEventListener("scroll", () => leave(), { passive: true });
document.querySelectorAll(".hint").forEach((hint) => { hint.hidden = false; });
