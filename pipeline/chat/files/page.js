"use strict";
// Texts of people and of models are put in by textContent alone, so that nothing in them is ever read as HTML.
const find = (id) => document.getElementById(id);
const [form, question, turns, status, fault] = ["form", "question", "turns", "status", "fault"].map(find);
let state = null;
let answering = null; // stops the request that is under way

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function post(call, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return fetch(call, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function call(name, body) {
  const answer = await (await post(name, body)).json();
  if (answer.error) throw new Error(answer.error);
  return answer;
}

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
  if (rest) yield JSON.parse(rest); // an error that comes before any answer is one object
}

function turnNode(text, stages) {
  const node = element("article", "turn");
  const grid = element("div", "answers");
  grid.style.setProperty("--columns", stages.length);
  const heading = element("h3", "question text", text);
  heading.dir = "auto";
  node.append(heading, grid);
  const answers = {};
  for (const stage of stages) {
    const card = element("section", "answer card");
    const body = element("div", "text");
    body.dir = "auto";
    const figures = element("p", "figures soft", "waits");
    card.setAttribute("aria-label", stage);
    card.append(element("h4", "", stage), body, figures);
    grid.append(card);
    answers[stage] = { body, figures };
  }
  return { node, answers };
}

function fill(answer, event) {
  answer.body.textContent = event.text;
  answer.figures.textContent = event.figures === undefined ? "…" : event.figures;
}

function fillAll(nodes, answers) {
  for (const [stage, answer] of Object.entries(answers)) fill(nodes[stage], answer);
}

function isAtEnd() {
  return window.innerHeight + window.scrollY >= document.documentElement.scrollHeight - 80;
}

function toEnd() {
  window.scrollTo(0, document.documentElement.scrollHeight);
}

function showStages() {
  const one = state.stages.length === 1;
  find("stages").replaceChildren(...state.stages.map((stage) => {
    const item = element("li", "", stage);
    const button = element("button", "", "×");
    button.type = "button";
    button.disabled = one || answering !== null;
    button.setAttribute("aria-label", `Remove ${stage}`);
    button.addEventListener("click", () => choose(state.stages.filter((other) => other !== stage)));
    item.append(button);
    return item;
  }));
  const others = state.policies.filter((policy) => !state.stages.includes(policy));
  find("more").replaceChildren(...others.map((policy) => element("option", "", policy)));
  for (const id of ["more", "add"]) find(id).disabled = others.length === 0 || answering !== null;
  find("notes").replaceChildren(...state.notes.map((note) => element("li", "", note)));
}

function showTurns() {
  turns.replaceChildren(...state.turns.map((turn) => {
    const { node, answers } = turnNode(turn.question, Object.keys(turn.answers));
    fillAll(answers, turn.answers);
    return node;
  }));
}

// `own`: by how many versions this window itself has moved on. Another window may have changed the dialogue too.
function show(next, own) {
  const isShown = next.version === state.version + own;
  state = next;
  showStages();
  if (!isShown) showTurns();
}

async function attempt(work) {
  fault.textContent = "";
  try {
    await work();
  } catch (error) {
    const isLost = error instanceof TypeError; // what `fetch` throws
    fault.textContent = isLost ? "rlhf chat does not answer; look at its terminal." : error.message;
  }
}

// Changes the dialogue that is shown. If another window was first, its changes are shown.
async function change(name, body) {
  try {
    return await call(name, { version: state.version, ...body });
  } catch (error) {
    show(await call("state", {}), 0);
    throw error;
  }
}

function choose(stages) {
  return attempt(async () => {
    status.textContent = "Loading…";
    try {
      show(await change("choose", { stages }), 1);
    } finally {
      status.textContent = "";
    }
    status.textContent = `Answering: ${state.stages.join(", ")}`;
  });
}

function setAnswering(controller) {
  answering = controller;
  find("send").disabled = find("reset").disabled = controller !== null;
  find("stop").disabled = controller === null;
  showStages();
}

async function follow(response, answers) {
  for await (const event of lines(response)) {
    if (event.error) throw new Error(event.error);
    const follows = isAtEnd();
    fill(answers[event.stage], event);
    status.textContent = event.figures === undefined ? `${event.stage} answers…` : `${event.stage} has answered`;
    if (follows) toEnd();
  }
}

async function ask(text) {
  const id = crypto.randomUUID();
  const body = { question: text, id, version: state.version };
  for (const name of ["temperature", "max_new_tokens", "seed"]) body[name] = find(name).valueAsNumber;
  const { node, answers } = turnNode(text, state.stages);
  const controller = new AbortController();
  setAnswering(controller);
  question.value = "";
  status.textContent = "Asked"; // what it said of the last question is over
  turns.append(node);
  toEnd();
  let lost = null;
  let outcome = null;
  try {
    await follow(await post("ask", body, controller.signal), answers);
  } catch (error) {
    lost = error;
  }
  const wasStopped = controller.signal.aborted;
  if (wasStopped) status.textContent = "Stopping…";
  try {
    outcome = await call("outcome", { id }); // it may have been stopped too late; if not, it is never answered
  } catch (error) {
    lost ??= error;
  }
  setAnswering(null);
  status.textContent = "";
  const isAnswered = outcome !== null && outcome.answered;
  if (outcome !== null) show(outcome, isAnswered ? 1 : 0);
  if (isAnswered) {
    if (node.isConnected) fillAll(answers, state.turns.at(-1).answers);
    status.textContent = "All have answered";
    return;
  }
  takeBack(node, text, wasStopped);
  if (!wasStopped) throw lost ?? new Error("The question was not answered; ask again.");
}

function takeBack(node, text, wasStopped) {
  if (wasStopped) turns.append(node);
  else node.remove();
  node.classList.add("taken-back");
  for (const figures of node.querySelectorAll(".figures")) figures.textContent = "not part of the dialogue";
  if (!question.value) question.value = text;
  if (wasStopped) status.textContent = "Stopped: the question is taken back, and the dialogue is as it was before";
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (answering !== null || !text) return;
  attempt(async () => {
    await ask(text);
    question.focus();
  });
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
find("stop").addEventListener("click", () => answering?.abort());
find("reset").addEventListener("click", () => attempt(async () => {
  show(await change("reset", {}), 0);
  status.textContent = "All dialogues begin anew";
  question.focus();
}));
find("add").addEventListener("click", () => choose([...state.stages, find("more").value]));

attempt(async () => {
  state = await call("state", {});
  find("run").textContent = state.run;
  document.title = `rlhf chat: ${state.run}`;
  for (const [name, value] of Object.entries(state.settings)) find(name).value = value;
  showStages();
  showTurns();
  toEnd();
  question.focus();
});
