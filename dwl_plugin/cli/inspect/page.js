"use strict";
const rows = [...document.querySelectorAll("article")];
const which = document.getElementById("which");
const tip = document.getElementById("tip");
let at = null;

function show(number) {
  number = Math.min(Math.max(number, 0), rows.length - 1);
  rows.forEach((row, index) => { row.hidden = index !== number; });
  which.value = String(number);
  leave();
}

function line(list, name, value) {
  if (!value) return;
  list.append(Object.assign(document.createElement("dt"), { textContent: name }),
    Object.assign(document.createElement("dd"), { textContent: value }));
}

function point(token) {
  leave();
  at = token;
  token.classList.add("at");
  const list = document.createElement("dl");
  line(list, "token", token.dataset.id);
  line(list, "class", token.dataset.class || ("out" in token.dataset ? "taken out by the data" : "not trained on"));
  line(list, "factor", token.dataset.says && token.dataset.says + "×");
  line(list, "marks", token.dataset.marks);
  line(list, "data set", token.dataset.set);
  line(list, "weight", token.dataset.weight && token.dataset.weight + "×");
  tip.replaceChildren(Object.assign(document.createElement("b"), { textContent: JSON.stringify(token.textContent) }), list);
  tip.hidden = false;
  const box = token.getClientRects()[0] || token.getBoundingClientRect();
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.setProperty("left", Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px");
  tip.style.setProperty("top", (below ? box.bottom + 8 : box.top - tip.offsetHeight - 8) + "px");
}

function leave() {
  if (at) at.classList.remove("at");
  at = null;
  tip.hidden = true;
}

function step(text, by) {
  const tokens = [...text.querySelectorAll(".t")].filter((token) => token.getClientRects().length);
  const index = at && text.contains(at) ? tokens.indexOf(at) + by : 0;
  const token = tokens[Math.min(Math.max(index, 0), tokens.length - 1)];
  if (token) { token.scrollIntoView({ block: "nearest" }); point(token); }
}

document.addEventListener("pointerover", (event) => {
  const token = event.target.closest(".text .t");
  if (token) point(token); else leave();
});
document.addEventListener("focusin", (event) => { if (event.target.matches(".text") && event.target.matches(":focus-visible")) step(event.target, 0); });
document.addEventListener("focusout", leave);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const text = document.activeElement.closest(".text");
  const moves = { ArrowRight: 1, ArrowLeft: -1 };
  if (text && event.key in moves) { event.preventDefault(); step(text, moves[event.key]); }
  else if (event.key === "Escape") leave();
  else if (document.activeElement !== which && event.key === "n") show(Number(which.value) + 1);
  else if (document.activeElement !== which && event.key === "p") show(Number(which.value) - 1);
});
which.addEventListener("change", () => show(Number(which.value)));
document.getElementById("next").addEventListener("click", () => show(Number(which.value) + 1));
document.getElementById("previous").addEventListener("click", () => show(Number(which.value) - 1));

const asked = rows.findIndex((row) => location.hash.startsWith("#" + row.id + "sample") || location.hash === "#" + row.id);
show(asked < 0 ? 0 : asked);
