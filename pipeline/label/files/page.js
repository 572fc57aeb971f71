"use strict";
const KEYS = { ArrowLeft: "left", ArrowRight: "right", t: "tie", s: "skip" };
const SPEAKERS = { user: "User", assistant: "Assistant", system: "System" };
const REST = 250; // milliseconds in which a second press of a key does not answer what nobody can have read yet
const find = (selector) => document.querySelector(selector);
let state = null;
let busy = false;
let shownAt = 0;
let seen = 0; // milliseconds for which the question was on the screen before it was hidden last
let since = null; // when it came to the screen last

function clock() {
  return seen + (since === null ? 0 : performance.now() - since);
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    seen = clock();
    since = null;
  } else if (since === null) {
    since = performance.now();
  }
});

async function call(name, body) {
  busy = true;
  document.body.dataset.ready = "no";
  try {
    const response = await fetch(name, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    show(answer);
    find("#fault").textContent = "";
  } catch (error) {
    const ended = error instanceof TypeError || error instanceof SyntaxError;
    find("#fault").textContent = ended
      ? "The command in the terminal has ended, or does not answer. No answer is lost: give the same command again, and open the address that it shows."
      : error.message;
  }
  busy = false;
}

function show(answer) {
  const before = state && state.question ? state.question.number : null;
  state = answer;
  const number = Math.min(state.answered + 1, state.total);
  find("progress").max = state.total;
  find("progress").value = state.answered;
  find("#count").textContent = state.question ? `Question ${number} of ${state.total}` : `${state.total} of ${state.total} answered`;
  find("#question").hidden = !state.question;
  find("#end").hidden = Boolean(state.question);
  for (const node of document.querySelectorAll("[data-answer], .gap")) node.hidden = !state.question;
  find("[data-undo]").disabled = state.answered === 0;
  if (state.question && state.question.number !== before) ask(state.question);
  if (!state.question) end(state.result);
  document.body.dataset.number = state.question ? state.question.number : "end";
  document.body.dataset.answered = state.answered;
  setTimeout(() => { if (!busy) document.body.dataset.ready = "yes"; }, REST);
}

function ask(question) {
  const turns = question.prompt.map((message) => {
    const turn = document.createElement("div");
    turn.className = "turn card";
    const who = document.createElement("p");
    who.className = "who";
    who.textContent = SPEAKERS[message.role] || message.role;
    const text = document.createElement("p");
    text.className = "text";
    text.textContent = message.content;
    turn.append(who, text);
    return turn;
  });
  find("#prompt").replaceChildren(...turns);
  find("#left").textContent = question.left;
  find("#right").textContent = question.right;
  find("#left-cut").hidden = !question.left_cut_off;
  find("#right-cut").hidden = !question.right_cut_off;
  window.scrollTo(0, 0);
  shownAt = performance.now();
  seen = 0;
  since = document.hidden ? null : shownAt;
}

function end(rows) {
  find("#end tbody").replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((text, place) => {
      const cell = document.createElement(place ? "td" : "th");
      if (!place) cell.scope = "row";
      cell.textContent = text;
      return cell;
    }));
    return row;
  }));
}

function answer(name) {
  if (busy || !state || !state.question || performance.now() - shownAt < REST) return;
  call("answer", { question: state.question.number, answer: name, seconds: clock() / 1000 });
}

function undo() {
  if (!busy && state && state.answered > 0) call("undo", { answered: state.answered });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "u") undo();
  else if (KEYS[key]) answer(KEYS[key]);
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-answer]")) {
  button.addEventListener("click", () => answer(button.dataset.answer));
}
find("[data-undo]").addEventListener("click", undo);
call("state", {});
