"""`rlhf chat`: each column is the stage that it names, measured as its run measures it, and no dialogue is lost."""

import contextlib
import http.client
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import stage
from pipeline.chat import command, page, selection, weights
from pipeline.chat.session import Settings
from pipeline.config.load import load
from pipeline.models import run_models
from pipeline.models.loading import Model, is_quantised
from pipeline.records import manifest
from pipeline.show import results
from pipeline.show.screen import open_console
from pipeline.system.errors import UserError

OTHER_SHAPE = tiny.LORA | {"r": 2}
EVALUATE = {
    "type": "evaluate",
    "data": "prompts",
    "policies": ["ppo", "dpo", "whole", "reshaped"],
    "baseline": "sft",
    "max_new_tokens": 8,
    "num_prompts": 1,  # one row at a time, as in a chat: so figures are equal to the last bit
    "batch_size": 1,
}
STAGES = {
    "sft": tiny.SFT,
    "reward": tiny.REWARD | {"init": "sft"},
    "ppo": tiny.PPO | {"init": "sft", "reward": "reward"},
    "dpo": tiny.DPO | {"init": "sft"},
    "dpo.again": tiny.DPO | {"type": "dpo", "init": "sft"},  # the same weights; its name has a dot
    "whole": tiny.SFT | {"type": "sft", "init": "base", "lora": None},
    "reshaped": tiny.DPO | {"type": "dpo", "init": "sft", "lora": OTHER_SHAPE},  # on the merged weights of its parent
    "whole_reward": tiny.REWARD | {"type": "reward", "init": "whole", "lora": None},
    "on_whole_reward": tiny.REWARD | {"type": "reward", "init": "whole_reward"},  # an adapter on a reward model in full
    "by_whole_reward": EVALUATE | {"reward": "whole_reward"},
    "evaluate": EVALUATE | {"reward": "reward"},
}
DATA = {name: {"path": f"{name}.jsonl"} for name in ("comparisons", "demonstrations", "prompts")}
POLICIES = ["base", "sft", "ppo", "dpo", "whole", "reshaped"]
QUESTIONS = ["Tell me about tea.", "And about rain?"]
GREEDY = Settings(0.0, 8, 0)


def silent(*_: object) -> None:
    """Take what is told, and do nothing."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tiny.write_rows(folder / "prompts.jsonl", tiny.chain_rows()["prompts"])
    config = load(tiny.make_run(folder, STAGES, data=DATA))
    for name in config.stages:
        stage.run(config, name)
    return config.run_path


@pytest.fixture
def copy(run_dir, tmp_path):
    """A copy of the run, whose base model stays where it is."""
    return shutil.copytree(run_dir, tmp_path / "run")


@pytest.fixture(scope="module")
def opened(run_dir):
    """All policies of the run in one session, loaded once; each test begins the dialogues anew."""
    run = selection.open_run(run_dir)
    return command._opened(run, POLICIES, run.reward(None), False, open_console())


@pytest.fixture
def chat(opened):
    opened.choose(POLICIES)
    opened.reset()
    return opened


def alone(run_dir: Path, name: str) -> tuple[Model, AutoTokenizer]:
    """A policy by the code that `rlhf status` prints; the base by transformers."""
    recorded = manifest.read(run_dir)
    if name == "base":
        model = AutoModelForCausalLM.from_pretrained(recorded.model["path"])
        return model.eval(), AutoTokenizer.from_pretrained(run_dir / "tokenizer")
    shown: dict = {}
    exec(results.snippet(run_dir, recorded, recorded.stages[name]), shown)
    return shown["model"].eval(), shown["tokenizer"]


def dialogue_alone(run_dir: Path, name: str) -> list[list[int]]:
    """The greedy answers of a policy to `QUESTIONS`, as token ids, each after its own earlier answers."""
    model, tokenizer = alone(run_dir, name)
    messages = []
    answers = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=GREEDY.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        messages.append({"role": "assistant", "content": tokenizer.decode(answers[-1], skip_special_tokens=True)})
    return answers


# Each column is its stage


def test_answers_are_those_of_models_loaded_alone(chat, run_dir):
    """Token for token, over two turns, with all of them in memory together."""
    turns = [chat.ask(question, GREEDY, silent) for question in QUESTIONS]
    for name in POLICIES:
        assert [turn.answers[name].ids for turn in turns] == dialogue_alone(run_dir, name), name
    different = {str(turn.answers[name].ids) for turn in turns for name in POLICIES}
    assert len(different) > len(POLICIES)  # else another column's answers would pass too


def test_log_probabilities_are_those_of_models_loaded_alone(chat, run_dir):
    """To the last bit, whatever adapter was active before, and different for each policy."""
    ids = chat.tokenizer("<user>Tell me about tea.<assistant>I like tea", return_tensors="pt")["input_ids"]
    found = {}
    with torch.no_grad():
        for name in [*POLICIES, *reversed(POLICIES)]:
            logits = chat.models.policy(name)(input_ids=ids).logits
            assert name not in found or torch.equal(found[name], logits)
            found[name] = logits
        for name in POLICIES:
            assert torch.equal(found[name], alone(run_dir, name)[0](input_ids=ids).logits), name
    for i, name in enumerate(POLICIES):
        assert not any(torch.equal(found[name], found[other]) for other in POLICIES[:i])


def sampled(run_dir: Path, evaluation: str) -> tuple[str, Settings, dict]:
    """The question of an evaluation, its settings, and its entries by policy."""
    record = manifest.read(run_dir).stages[evaluation]
    (line,) = (run_dir / record.output.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    (message,) = row.pop("prompt")
    return message["content"], Settings(1.0, 8, record.seed), row


def test_figures_are_the_evaluations(chat, run_dir):
    """The same completions, scores and KLs as its samples, at its temperature and seed."""
    question, settings, entries = sampled(run_dir, "evaluate")
    answers = chat.ask(question, settings, silent).answers
    assert answers.keys() == entries.keys()
    for name, entry in entries.items():
        answer = answers[name]
        found = (answer.text, len(answer.ids), answer.ended, answer.score, answer.kl)
        assert found == (entry["completion"], entry["length"], entry["ended"], entry["score"], entry["kl"]), name
    assert answers["sft"].kl == 0
    assert "score" in answers["dpo"].figures and "KL" in answers["dpo"].figures


def test_a_reward_model_in_full_scores_as_in_its_evaluation(run_dir):
    question, settings, entries = sampled(run_dir, "by_whole_reward")
    talk = command._opened(selection.open_run(run_dir), ["whole", "dpo"], "whole_reward", False, open_console())
    answers = talk.ask(question, settings, silent).answers
    assert {name: answer.score for name, answer in answers.items()} == {
        name: entries[name]["score"] for name in ("whole", "dpo")
    }


def test_an_adapter_on_a_reward_model_in_full_scores_as_alone(run_dir):
    """Its full weights have no vocabulary head, since the model's embeddings are untied: no policy can share them."""
    run = selection.open_run(run_dir)
    assert "lm_head.weight" not in load_file(run_dir / "whole_reward" / "output" / "model.safetensors")
    talk = command._opened(run, ["sft"], "on_whole_reward", False, open_console())
    prompt = talk._prompt("sft", QUESTIONS[0])
    answer = talk.ask(QUESTIONS[0], GREEDY, silent).answers["sft"]
    model, _ = alone(run_dir, "on_whole_reward")
    with torch.no_grad():
        assert answer.score == model(input_ids=torch.tensor([prompt + answer.ids])).logits.item()


def test_stages_of_another_run_answer_as_there(chat, run_dir, tmp_path):
    """An adapter that brings the full weights below it, and a reward model on the base."""
    taken = {"run": str(run_dir)}
    stages = {"policy": taken | {"stage": "reshaped"}, "reward": taken}
    config = load(tiny.make_run(tmp_path, stages, model={"path": chat.run.recorded.model["path"]}))
    for name in config.stages:
        stage.run(config, name)
    talk = command._opened(selection.open_run(config.run_path), ["policy"], "reward", False, open_console())
    chat.choose(["reshaped"])
    for question in QUESTIONS:
        here = talk.ask(question, GREEDY, silent).answers["policy"]
        there = chat.ask(question, GREEDY, silent).answers["reshaped"]
        assert (here.text, here.ids, here.score) == (there.text, there.ids, there.score)


# One base in memory


def storages(*models: torch.nn.Module) -> int:
    """Bytes of the different storages of all parameters and buffers."""
    tensors = [tensor for model in models for tensor in [*model.parameters(), *model.buffers()]]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_adapters_share_one_base(run_dir):
    """In bytes: the base once, and what is in the adapters' files."""
    run = selection.open_run(run_dir)
    said = []
    models = weights.Models(run, run_models.tokenizer(run_dir, run.recorded), said.append)
    names = ["base", "sft", "ppo", "dpo", "dpo.again"]
    models.load(names)
    scorer = models.reward("reward")
    base = AutoModelForCausalLM.from_pretrained(run.recorded.model["path"])
    files = [load_file(run_dir / name / "output" / "adapter_model.safetensors") for name in [*names[1:], "reward"]]
    adapters = sum(tensor.nbytes for file in files for tensor in file.values())
    shared = {id(models.policy(name).shared): models.policy(name).shared.model for name in names}
    assert storages(*shared.values(), scorer) == storages(base) + adapters
    models.load(["reshaped", "whole"])
    (loaded, *others) = [line for line in said if line.startswith("loading ")]
    assert loaded == f"loading {run.recorded.model['path']}"
    assert others == [f"loading {run_dir}/reshaped/merged", f"loading {run_dir}/whole/output"]
    assert f"{run.recorded.model['path']} is in memory once: base, sft, ppo, dpo, dpo.again, reward use it" in (
        models.accounts()
    )


def test_equal_weights_are_told(chat):
    chat.choose(["dpo", "sft", "dpo.again"])
    assert "dpo and dpo.again have the same weights, by their checksums" in chat.notes()
    chat.choose(["dpo", "sft"])
    assert not any("same weights" in note for note in chat.notes())


def test_a_quantised_base_loads_as_the_run_does(tmp_path):
    """In 4 bits, once, with the answers of policies that are loaded alone."""
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    stages = {"sft": tiny.SFT, "dpo": tiny.DPO | {"init": "sft"}}
    config = load(tiny.make_run(tmp_path, stages, quantization=quantization))
    for name in config.stages:
        stage.run(config, name)
    run = selection.open_run(config.run_path)
    talk = command._opened(run, ["sft", "dpo"], None, False, open_console())
    turns = [talk.ask(question, GREEDY, silent) for question in QUESTIONS]
    for name in ("sft", "dpo"):
        assert [turn.answers[name].ids for turn in turns] == dialogue_alone(config.run_path, name), name
    assert talk.models.policy("sft").shared is talk.models.policy("dpo").shared
    assert is_quantised(talk.models.policy("dpo").shared.model)


# What is refused


def test_a_damaged_adapter_is_refused(copy, cli):
    file = copy / "dpo" / "output" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    exit_code, shown, message = cli("chat", copy, "dpo")
    assert exit_code == 2 and "adapter_model.safetensors has changed since the stage finished" in message
    assert "Traceback" not in message + shown


def test_one_stages_adapter_in_anothers_place_is_refused(copy, cli):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(copy / "ppo" / "output" / name, copy / "sft" / "output" / name)
    exit_code, _, message = cli("chat", copy, "sft", "ppo")
    assert exit_code == 2 and "sft/output/adapter_" in message and "its checksum differs" in message


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["dqo"], "there is no finished policy 'dqo'; did you mean 'dpo'?"),
        (["reward"], "stage 'reward' makes no answers (it makes: reward model); a reward model scores the answers"),
        (["evaluate"], "stage 'evaluate' makes no answers (it makes: evaluation); its policies are base, sft"),
        (["--reward", "sft"], "--reward: there is no finished reward stage 'sft'"),
        (["--port", "0"], "--port is the page's; say --web too"),
        (["--temperature", "inf"], "--temperature: expected a finite number"),
    ],
)
def test_what_cannot_be_talked_to_is_one_message(run_dir, cli, args, expected):
    exit_code, shown, message = cli("chat", run_dir, *args)
    assert (exit_code, shown) == (2, "")
    assert message.startswith("error: ") and expected in message and message.count("\n") == 1


def test_a_run_without_policies_is_one_message(tmp_path, cli, make_record):
    assert "no manifest.json here" in cli("chat", tmp_path)[2]
    manifest.write(tmp_path, manifest.Manifest(name="tiny", model={"path": "some/base", "dtype": "float32"}))
    assert "no policy is finished here yet" in cli("chat", tmp_path)[2]
    manifest.write(tmp_path, manifest.Manifest(name="tiny", model={}, stages={"sft": make_record()}))
    assert "was made from scratch and has no base model; its policies are sft" in cli("chat", tmp_path, "base")[2]


# Which stages answer


def test_by_default_those_that_the_evaluation_compares(run_dir):
    run = selection.open_run(run_dir)
    assert run.compared() == ["sft", "ppo", "dpo", "whole", "reshaped"]
    assert (run.baseline, run.reward(None), run.max_new_tokens) == ("sft", "reward", 8)
    without = selection.Run(run_dir, run.recorded.without(["evaluate", "by_whole_reward"]))
    assert without.compared() == ["sft", "ppo", "dpo", "dpo.again", "reshaped"]
    assert (without.baseline, without.max_new_tokens) == ("sft", 128)
    only = selection.Run(run_dir, run.recorded.without([name for name in STAGES if name != "whole"]))
    assert (only.compared(), only.reward(None)) == (["whole"], None)


# Dialogues


def test_a_stopped_answer_is_taken_back(chat):
    first, second = (chat.ask(question, GREEDY, silent) for question in QUESTIONS)

    def stop(name, answer, is_complete):
        if name == "ppo" and len(answer.ids) == 3:
            raise KeyboardInterrupt

    chat.reset()
    assert chat.ask(QUESTIONS[0], GREEDY, silent) == first
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Tell me about wool.", GREEDY, stop)
    assert chat.ask(QUESTIONS[1], GREEDY, silent) == second
    assert len(chat.turns) == 2


def test_a_page_that_is_left_takes_the_question_back(chat):
    events = page._events(chat, QUESTIONS[0], GREEDY)
    assert next(events)["stage"] == "base"
    events.close()
    assert chat.turns == [] and chat._prompt("base", QUESTIONS[0]) == chat._prompt("sft", QUESTIONS[0])
    assert list(page._events(chat, QUESTIONS[0], GREEDY))[-1]["stage"] == POLICIES[-1]
    assert len(chat.turns) == 1


def asked(chat, name: str) -> dict:
    """What a window posts that shows the dialogue as it is, with an id for its question."""
    numbers = {"temperature": 0, "max_new_tokens": 8, "seed": 0}
    return {"question": QUESTIONS[0], "id": name, "version": chat.version} | numbers


def test_a_window_that_shows_another_dialogue_changes_nothing(chat):
    """Another window has asked, has changed the stages, or has taken one out and in again, which begins anew."""
    chat.choose(["sft"])
    calls = page.site_of(chat, GREEDY).calls
    before = asked(chat, "late")
    for change in (
        lambda: list(calls["ask"](asked(chat, "first"))),
        lambda: [chat.choose(names) for names in (["sft", "dpo"], ["sft"])],
        chat.reset,
    ):
        change()
        version, turns = chat.version, list(chat.turns)
        for name, body in (("ask", before), ("choose", before | {"stages": ["dpo"]}), ("reset", before)):
            with pytest.raises(UserError, match="has changed in another window"):
                list(calls[name](body))
        assert (chat.version, chat.turns, chat.names) == (version, turns, ["sft"])
    assert list(calls["ask"](before | {"version": chat.version}))[-1]["stage"] == "sft"


def test_a_question_whose_window_has_stopped_it_is_never_answered(chat):
    """Whether it was stopped before its turn, in the middle, or too late, its window hears what came of it."""
    chat.choose(["sft"])
    calls = page.site_of(chat, GREEDY).calls
    waiting = calls["ask"](asked(chat, "waiting"))
    assert calls["outcome"]({"id": "waiting"})["answered"] is False
    with pytest.raises(UserError, match="was stopped"):
        next(waiting)
    begun = calls["ask"](asked(chat, "begun"))
    next(begun)
    begun.close()
    assert calls["outcome"]({"id": "begun"})["answered"] is False and chat.turns == []
    late = calls["ask"](asked(chat, "late"))
    while "figures" not in next(late):
        pass
    late.close()
    state = calls["outcome"]({"id": "late"})
    assert state["answered"] is True and len(state["turns"]) == len(chat.turns) == 1


def test_a_question_that_is_too_long_loses_nothing(chat):
    first, second = (chat.ask(question, GREEDY, silent) for question in QUESTIONS)
    chat.reset()
    assert chat.ask(QUESTIONS[0], GREEDY, silent) == first
    with pytest.raises(UserError, match="tokens, and its model has 128 positions"):
        chat.ask("a b " * 200, GREEDY, silent)
    with pytest.raises(UserError, match="there is no question"):
        chat.ask(" \n", GREEDY, silent)
    assert chat.ask(QUESTIONS[1], GREEDY, silent) == second


def test_an_answer_has_the_positions_that_are_left(chat):
    """The model has 128; an answer that fills them is cut off."""
    chat.choose(["base"])
    question = "Tell me about tea. " * 6
    prompt = chat._prompt("base", question)
    answer = chat.ask(question, Settings(0.0, 500, 0), silent).answers["base"]
    assert 0 < len(prompt) < 128 == len(prompt) + len(answer.ids)
    assert not answer.ended and "cut off" in answer.figures


def test_text_comes_as_it_is_sampled(chat):
    chat.choose(["dpo"])
    told = []
    turn = chat.ask(QUESTIONS[0], GREEDY, lambda name, answer, is_complete: told.append((answer, is_complete)))
    answer = turn.answers["dpo"]
    assert [len(one.ids) for one, _ in told] == [*range(1, len(answer.ids) + 1), len(answer.ids)]
    assert [is_complete for _, is_complete in told] == [False] * len(answer.ids) + [True]
    assert all(answer.text.startswith(one.text) for one, _ in told) and told[-1][0] == answer


def test_columns_come_and_go(chat):
    """One that comes begins its dialogue there; the others go on with their own."""
    first, second = (chat.ask(question, GREEDY, silent) for question in QUESTIONS)
    chat.reset()
    chat.choose(["sft"])
    assert chat.ask(QUESTIONS[0], GREEDY, silent).answers == {"sft": first.answers["sft"]}
    chat.choose(["dpo", "sft"])
    with pytest.raises(UserError, match="no finished policy"):
        chat.choose(["dqo"])
    answers = chat.ask(QUESTIONS[1], GREEDY, silent).answers
    assert list(answers) == ["dpo", "sft"] and answers["sft"] == second.answers["sft"]
    fresh = chat._prompt("reshaped", QUESTIONS[1])
    chat.choose(["sft"])
    chat.choose(["sft", "dpo"])
    assert chat._prompt("dpo", QUESTIONS[1]) == fresh


def test_temperature_and_seed_draw_other_answers(chat):
    chat.choose(["sft"])
    texts = []
    for temperature, seed in [(1.0, 0), (1.0, 0), (1.0, 1), (0.0, 0), (0.0, 1)]:
        chat.reset()
        texts.append(chat.ask(QUESTIONS[0], Settings(temperature, 8, seed), silent).answers["sft"].ids)
    assert texts[0] == texts[1] != texts[2] and texts[3] == texts[4] != texts[0]


# The command itself


def test_a_pipe_gets_plain_text(run_dir, chat, tmp_path):
    """Each line is a turn of one dialogue; stdout has the answers alone."""
    chat.choose(["sft", "dpo"])
    turns = [chat.ask(question, GREEDY, silent) for question in QUESTIONS]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "chat", run_dir, "sft", "dpo"],
        cwd=tmp_path,
        input="\n".join([QUESTIONS[0], "", QUESTIONS[1]]),
        capture_output=True,
        encoding="utf-8",
    )
    expected = []
    for turn in turns:
        for name, answer in turn.answers.items():
            expected += [f"{name} ({answer.figures})", *answer.text.split("\n"), ""]
    assert done.stdout.split("\n")[:-1] == expected
    assert "tiny: on the CPU (`use_cpu: true` in the run), weights in float32" in done.stderr
    assert done.returncode == 0 and "is in memory once: sft, dpo, reward use it" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def read_until(descriptor: int, *texts: str, seconds: float = 120) -> str:
    """What a terminal shows until these texts are there, one after the other."""
    shown = ""
    end = time.monotonic() + seconds
    while re.search(".*".join(map(re.escape, texts)), shown, re.DOTALL) is None:
        assert time.monotonic() < end, shown
        ready, _, _ = select.select([descriptor], [], [], 1)
        if ready:
            try:
                shown += os.read(descriptor, 65536).decode("utf-8", "replace")
            except OSError as error:  # the other end is closed
                raise AssertionError(shown) from error
    return shown


def test_a_dialogue_in_a_terminal(run_dir, chat, tmp_path):
    """Questions, commands, a mistake, Ctrl-C in an answer, and Ctrl-C at the prompt, which leaves."""
    command_line = [sys.executable, "-m", "pipeline", "chat", run_dir, "sft", "dpo", "--max-new-tokens", "100"]
    ours, theirs = pty.openpty()
    variables = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        command_line, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=variables, start_new_session=True
    )
    os.close(theirs)
    try:
        assert "dpo, reward use it" in read_until(ours, "> ").replace("\r\n", " ")
        os.write(ours, b"Tell me about tea.\n")
        shown = read_until(ours, "\n> ")
        assert "sft" in shown and "dpo" in shown and "score" in shown
        os.write(ours, b"/stages base sft ppo dpo whole reshaped\n")  # so many take a while, for Ctrl-C
        assert "Answering: base, sft, ppo, dpo, whole, reshaped." in read_until(ours, "\n> ")
        os.write(ours, b"/temperature hot\n")
        assert "expected one number" in read_until(ours, "\n> ")
        os.write(ours, b"/nothing\n")
        assert "there is no command '/nothing'" in read_until(ours, "\n> ")
        os.write(ours, b"/reset\n")
        assert "begin anew" in read_until(ours, "\n> ")
        os.write(ours, b"Tell me about rain.\n")
        read_until(ours, "...")
        process.send_signal(signal.SIGINT)
        read_until(ours, "Stopped: the question is taken back", "> ")  # one read may bring both
        for _ in range(10):  # readline may show its prompt a moment before it listens to signals
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(6)
                break
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.fixture(scope="module")
def served(run_dir):
    """The command with `--web`: its process, its port and its secret path."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "chat", run_dir, "sft", "dpo", "--web"],
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    for line in process.stdout:
        if "http://127.0.0.1:" in line:
            break
    port, path = line.split("http://127.0.0.1:")[1].split()[0].split("/", 1)
    yield process, int(port), f"/{path}"
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.wait()


def post(port: int, path: str, body: object, headers: dict[str, str] | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"} | (headers or {}))
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_serves_itself_alone(served):
    """Through the real command: foreign hosts, foreign pages and other paths get nothing."""
    _, port, path = served
    for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{port}"}, {"Origin": "http://evil.example"}):
        status, text = post(port, f"{path}ask", {"question": "Hello?"}, headers)
        assert status == 403 and "stage" not in text
    assert post(port, "/state", {})[0] == 404
    assert post(port, f"{path}../manifest.json", {})[0] == 404
    status, text = post(port, f"{path}state", {})
    assert status == 200 and json.loads(text)["turns"] == []


def test_the_page_streams_the_sessions_answers(served, chat):
    process, port, path = served
    chat.choose(["sft", "dpo"])
    turn = chat.ask(QUESTIONS[0], GREEDY, silent)
    body = {"question": QUESTIONS[0], "id": "1", "temperature": 0, "max_new_tokens": 8, "seed": 0, "version": 0}
    events = [json.loads(line) for line in post(port, f"{path}ask", body)[1].splitlines()]
    complete = {event["stage"]: event for event in events if "figures" in event}
    assert {name: event["text"] for name, event in complete.items()} == {
        name: answer.text for name, answer in turn.answers.items()
    }
    assert complete["dpo"]["figures"] == turn.answers["dpo"].figures
    assert len(events) == sum(len(answer.ids) + 1 for answer in turn.answers.values())
    assert json.loads(post(port, f"{path}outcome", {"id": "1"})[1])["answered"] is True
    for wrong in ({"temperature": -1}, {"temperature": None}, {"max_new_tokens": 0}, {"seed": 0.5}, {"question": 1}):
        assert "error" in json.loads(post(port, f"{path}ask", body | {"id": "2", "version": 1} | wrong)[1])
    for wrong in ({"version": 0}, {"id": None}):
        assert "error" in json.loads(post(port, f"{path}ask", body | {"id": "2", "version": 1} | wrong)[1])
    assert "no finished policy" in post(port, f"{path}choose", {"version": 1, "stages": ["nowhere"]})[1]
    state = json.loads(post(port, f"{path}choose", {"version": 1, "stages": ["dpo", "base"]})[1])
    assert (state["stages"], state["version"]) == (["dpo", "base"], 2) and len(state["turns"]) == 1
    assert json.loads(post(port, f"{path}reset", {"version": 2})[1])["turns"] == []
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
