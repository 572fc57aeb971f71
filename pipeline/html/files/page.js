"use strict";
// Shows completions side by side. Texts are put in by textContent alone, so that nothing in them is ever read as HTML.
const PAGE = 20;
const [TEXT, SCORE, JUDGE, KL, LENGTH, ENDED] = [0, 1, 2, 3, 4, 5];

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function difference(ours, theirs) {
  return ours === null || theirs === null ? null : ours - theirs;
}

function prose(text) {
  const node = element("div", "text", text);
  node.dir = "auto";
  if (text.length > 600) node.tabIndex = 0; // it scrolls, and the keyboard must reach it
  return node;
}

function figure(list, name, value, digits) {
  if (value === null || value === undefined) return;
  const pair = element("div");
  pair.append(element("dt", "", name), element("dd", "", typeof value === "number" ? value.toFixed(digits) : value));
  list.append(pair);
}

function answer(level, policy, ours, theirs, isBaseline) {
  const node = element("div", "answer");
  node.append(element(`h${level}`, "policy", policy), prose(ours[TEXT]));
  const list = element("dl", "figures");
  figure(list, "score", ours[SCORE], 2);
  if (!isBaseline) figure(list, "margin", difference(ours[SCORE], theirs[SCORE]), 2);
  figure(list, "judge", ours[JUDGE], 2);
  figure(list, "KL", ours[KL], 2);
  figure(list, "length", ours[LENGTH], 0);
  if (ours[ENDED] === false) figure(list, "ended", "no");
  node.append(list);
  return node;
}

function rowNode(data, number, level) {
  const [messages, answers] = data.rows[number];
  const node = element("li");
  const heading = element(`h${level}`, "prompt", `Prompt ${number + 1}`);
  heading.tabIndex = -1;
  node.append(heading);
  for (const [role, text] of messages) {
    if (messages.length > 1 || role !== "user") node.append(element("div", "role", role));
    node.append(prose(text));
  }
  const grid = element("div", "answers");
  const baseline = data.policies.indexOf(data.baseline);
  data.policies.forEach((policy, i) => {
    grid.append(answer(level + 1, policy, answers[i], answers[baseline], i === baseline));
  });
  node.append(grid);
  return node;
}

const KEYS = {
  order: () => 0,
  score: (ours) => ours[SCORE],
  margin: (ours, theirs) => difference(ours[SCORE], theirs[SCORE]),
  judge: (ours) => ours[JUDGE],
  gain: (ours, theirs) => difference(ours[JUDGE], theirs[JUDGE]),
  kl: (ours) => ours[KL],
  length: (ours) => ours[LENGTH],
};

const FILTERS = {
  all: () => true,
  disagree: (ours, theirs) => KEYS.margin(ours, theirs) * KEYS.gain(ours, theirs) < 0,
  worse: (ours, theirs) => KEYS.gain(ours, theirs) < 0,
  lower: (ours, theirs) => KEYS.margin(ours, theirs) < 0,
  cut: (ours) => ours[ENDED] === false,
};

function select(data, texts, chosen) {
  const policy = data.policies.indexOf(chosen.policy);
  const baseline = data.policies.indexOf(data.baseline);
  const words = chosen.search.toLowerCase().split(/\s+/).filter(Boolean);
  const sign = chosen.direction === "up" ? 1 : -1;
  const numbers = data.rows.map((_, number) => number).filter((number) => {
    const answers = data.rows[number][1];
    return words.every((word) => texts[number].includes(word)) && FILTERS[chosen.filter](answers[policy], answers[baseline]);
  });
  if (chosen.key === "order") return numbers;
  const values = new Map(numbers.map((number) => {
    const answers = data.rows[number][1];
    return [number, KEYS[chosen.key](answers[policy], answers[baseline])];
  }));
  const last = sign * Infinity; // what was not measured comes at the end
  return numbers.sort((a, b) => sign * ((values.get(a) ?? last) - (values.get(b) ?? last)) || a - b);
}

function start(root) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const texts = data.rows.map(([messages, answers]) =>
    [...messages.map((message) => message[1]), ...answers.map((one) => one[TEXT])].join("\n").toLowerCase());
  const [form, status, list, more] = ["form", ".status", ".rows", ".more"].map((name) => root.querySelector(name));
  const level = Number(root.dataset.level); // of the headings of prompts
  let numbers = [];
  let before = "";
  const show = (count) => {
    const first = list.childElementCount;
    list.append(...numbers.slice(first, first + count).map((number) => rowNode(data, number, level)));
    const left = numbers.length - list.childElementCount;
    more.hidden = left === 0;
    more.textContent = `Show ${Math.min(left, PAGE)} more`;
    status.textContent = `${numbers.length} of ${data.rows.length} prompts, ${list.childElementCount} shown`;
    return list.children[first];
  };
  const update = () => {
    const chosen = Object.fromEntries(new FormData(form));
    if (JSON.stringify(chosen) === before) return; // two events tell of one choice; what is shown stays
    before = JSON.stringify(chosen);
    numbers = select(data, texts, chosen);
    list.replaceChildren();
    show(PAGE);
  };
  form.addEventListener("input", update);
  form.addEventListener("change", update); // not all that sets a choice for a user sends both
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => show(PAGE)?.querySelector(".prompt").focus());
  update();
}

document.querySelectorAll(".completions").forEach(start);
