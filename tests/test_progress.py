"""The progress file of a stage, the states of a chain, and the lines that show them."""

import io
import json
import os
import re
import subprocess
import time

import pyte
import pytest
from filelock import FileLock
from rich.console import Console

from pipeline.records import states
from pipeline.records.progress import SECONDS, Entry, Progress, Reader
from pipeline.records.states import Chain
from pipeline.show import progress
from pipeline.show.progress import Place, chain_lines, figure, place_lines, plain_line
from pipeline.show.watch import Screen, can_redraw
from pipeline.system.errors import StageFailed

# The file.


@pytest.fixture
def file(tmp_path):
    return tmp_path / "progress.jsonl"


def test_what_is_written_is_read_as_it_comes(file, capsys):
    reader = Reader(file, "this")
    assert reader.read() == []
    with Progress(file, "this") as writer:
        assert [entry.phase for entry in reader.read()] == [None, "loading"]
        writer.say("sft: hello")
        writer.begin("training", 8, 2)
        writer.step(3, {"loss": 0.5, "grad_norm": float("nan"), "kl": None, "max": float("inf")})
        said, begun, logged = reader.read()
        assert (said.said, said.phase) == ("sft: hello", None)
        assert (begun.phase, begun.step, begun.of, begun.logs) == ("training", 2, 8, {})
        assert (logged.step, logged.logs) == (3, {"loss": 0.5, "grad_norm": None, "kl": None, "max": None})
        assert reader.read() == []
    reader.close()
    assert capsys.readouterr().out == "sft: hello\n"
    for line in file.read_text().splitlines():  # strict JSON, for any reader
        json.loads(line, parse_constant=pytest.fail)


def test_steps_are_written_once_a_second_and_the_last_one(file, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("pipeline.records.progress.time.time", lambda: clock[0])
    with Progress(file) as writer:
        writer.begin("training", 100)
        for number in range(1, 101):
            clock[0] += SECONDS / 4
            writer.step(number)
        steps = [entry.step for entry in Reader(file).read() if entry.phase == "training"]
        assert steps == [0, *range(4, 101, 4)]
        clock[0] += 40_000 - 25  # after eleven hours each 2000th part of the time
        writer.step(1)
        clock[0] += 19
        writer.step(2)
        clock[0] += 2
        writer.step(3)
        assert [entry.step for entry in Reader(file).read()][-2:] == [1, 3]


def test_an_attempt_takes_the_place_of_the_one_before(file):
    with Progress(file, "old") as old:
        reader = Reader(file, "new")
        assert reader.read() == []
        with Progress(file, "new") as new:
            old.note("late")
            new.note("here")
            assert [entry.said for entry in reader.read() if entry.said] == ["here"]
            assert [entry.said for entry in Reader(file).read() if entry.said] == ["here"]
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_half_lines_wait_and_broken_ones_are_passed_over(file):
    file.write_bytes(b'{"time": 1, "launch": null}\n{"time": 2, "phase": "lo')
    reader = Reader(file)
    assert len(reader.read()) == 1
    with file.open("ab") as more:
        more.write(b'ading"}\n{"time": 3, "step": {}}\n[1]\n\xff\n{"time": 4, "said": "x"}\n')
    assert [(entry.phase, entry.said) for entry in reader.read()] == [("loading", None), (None, "x")]


def test_a_full_disk_ends_the_file_and_not_the_stage(file, tmp_path, capsys):
    writer = Progress(file)
    writer._file.close()
    writer._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115, PTH123
    writer.begin("training", 8)
    writer.step(1, {"loss": 1.0})
    writer.say("it goes on")
    assert writer._file is None
    with Progress(tmp_path / "nowhere" / file.name) as other:
        other.say("so does it without a folder")
    assert capsys.readouterr().out == "it goes on\nso does it without a folder\n"


# The lines.


def entry(seconds, step, of=60, phase="training", **figures):
    return Entry(time=seconds, phase=phase, step=step, of=of, **figures)


def placed(*entries, stage_type="sft"):
    place = Place(progress.names_of(stage_type))
    for one in entries:
        place.take(one)
    return place


def test_the_time_left_is_that_of_the_steps_so_far():
    place = placed(entry(90, 0, of=None, phase="loading"), entry(100, 20), entry(120, 30))
    assert place.seconds_left(120) == 60  # 10 steps in 20 s, 30 are left; what was done before a resume does not count
    assert place.seconds_left(130) == 50
    assert place.seconds_left(500) == 0
    assert placed(entry(100, 20)).seconds_left(101) is None
    assert placed(entry(100, 20), entry(110, 60)).seconds_left(111) is None
    # An evaluation in between takes a part of the time of the training, and has its own.
    place.take(entry(120, 0, of=4, phase="held-out batches"))
    place.take(entry(128, 2, of=4, phase="held-out batches"))
    assert place.seconds_left(128) == 8
    place.take(entry(136, 30))
    assert place.seconds_left(136) == 3 * 36
    place.take(entry(140, 0, of=4, phase="held-out batches"))  # the next one begins anew
    place.take(entry(142, 1, of=4, phase="held-out batches"))
    assert place.seconds_left(142) == 6


def test_figures_are_shown_first_and_now_in_our_units():
    logs = [{"reward": -1.0, "kl": 0.01, "completions/mean_length": 20.0, "loss": 0.0, "epoch": 1.0}]
    logs.append(logs[0] | {"reward": 2.5, "kl": 0.1, "completions/mean_length": 30.0})
    place = placed(*(entry(number, number, logs=log) for number, log in enumerate(logs)), stage_type="grpo")
    assert place.first == {"reward": -1.0, "KL": pytest.approx(0.2), "length": 20.0, "loss": 0.0}
    assert place.last == {"reward": 2.5, "KL": pytest.approx(3.0), "length": 30.0, "loss": 0.0}
    _, *lines = place_lines("grpo", place, 1, 79, "utf-8")
    assert [line.plain for line in lines] == ["reward -1.00→2.50  KL 0.200→3.00  length 20.0→30.0  loss 0.00"]


def test_the_first_step_of_dpo_has_no_accuracy():
    """Policy and reference are equal there, so that every comparison is a tie, and TRL counts ties as wrong."""
    place = placed(stage_type="dpo")
    first = {"loss": 0.69, "rewards/accuracies": 0.0, "rewards/margins": 0.0}
    assert place.take(entry(1, 1, logs=first)) == {"loss": 0.69, "margin": 0.0}
    wrong = {"loss": 0.7, "rewards/accuracies": 0.0, "rewards/margins": -0.1}
    assert place.take(entry(2, 2, logs=wrong)) == {"loss": 0.7, "accuracy": 0.0, "margin": -0.1}
    assert place.first == {"loss": 0.69, "accuracy": 0.0, "margin": 0.0}
    evened = {"rewards/accuracies": 0.5, "rewards/margins": 0.0}  # by margins of both signs
    assert place.take(entry(3, 3, logs=evened)) == {"accuracy": 0.5, "margin": 0.0}
    place.take(entry(4, 4, logs=first))
    assert place.last == {"loss": 0.69, "margin": 0.0}


def test_a_resumed_training_has_the_first_figures_of_its_beginning():
    place = placed(entry(0, 20, first={"loss": 4.0, "epoch": 0.1}), entry(1, 21, logs={"loss": 2.0, "eval_loss": 3.0}))
    assert (place.first, place.last) == (
        {"loss": 4.0, "held-out loss": 3.0},
        {"loss": 2.0, "held-out loss": 3.0},
    )


def test_the_last_line_of_a_training_has_its_last_loss():
    """Trainer logs once more at the end: TRL's figures since the last log, and no loss but the mean of all."""
    place = placed(entry(1, 50, logs={"loss": 0.4, "rewards/accuracies": 0.8, "eval_loss": 0.6}), stage_type="dpo")
    end = {"train_runtime": 9.0, "train_loss": 0.55, "rewards/accuracies": 0.901, "rewards/margins": 0.621}
    figures = place.take(entry(2, 60, logs=end))
    line = plain_line("dpo", place, figures, 2)
    assert line == "dpo: step 60/60: loss 0.400, accuracy 0.901, margin 0.621"
    assert place.take(entry(2, 60, logs={"train_runtime": 9.0, "train_loss": 0.55})) == {}  # nothing new to say
    assert placed(stage_type="dpo").take(entry(2, 60, logs=end)) == {"accuracy": 0.901, "margin": 0.621}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.5, "0.500"),
        (-0.0123456, "-0.0123"),
        (27.04, "27.0"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (5.29e-7, "5e-07"),
        (0.0, "0.00"),
    ],
)
def test_three_digits(value, shown):
    assert figure(value) == shown
    assert figure(float("nan")) == "nan"


def test_a_line_for_a_pipe():
    place = placed(entry(100, 0), entry(110, 20, logs={"loss": 0.5123, "eval_loss": 0.61}))
    assert plain_line("sft", place, place.last, 110) == "sft: step 20/60, 20s left: loss 0.512, held-out loss 0.610"
    assert plain_line("sft", place, {}, 110) == "sft: step 20/60, 20s left"
    place.take(entry(130, 2, of=3, phase="sampling from sft"))
    assert plain_line("evaluate", place, {}, 130) == "evaluate: sampling from sft 2/3"
    place.take(Entry(time=130, phase="finishing"))
    assert plain_line("sft", place, {}, 133) == "sft: finishing for 3s"
    assert plain_line("sft", place, {"held-out loss": 0.61}, 133) == "sft: finishing: held-out loss 0.610"
    assert plain_line("sft", Place(), {}, 133) == "sft: loading"


CHAIN = {"pretrain": "finished", "sft": "stopped", "reward": "failed", "ppo": "at work", "a-long-name": "waiting"}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("width", [19, 25, 39, 59, 79])
def test_no_line_is_too_long(width, encoding):
    logs = {"objective/raw_scores": -1.25, "objective/kl": 0.5, "value/explained_variance": 0.1}
    place = placed(entry(0, 0, logs=logs), entry(9, 3, logs=dict.fromkeys(logs, 9)), stage_type="ppo")
    lines = chain_lines(CHAIN, width, encoding) + place_lines("a-name-that-is-long", place, 9, width, encoding)
    lines += place_lines("evaluate", placed(entry(0, 1, phase="sampling from a-long-name")), 9, width, encoding)
    for line in lines:
        assert line.cell_len <= width
        line.plain.encode(encoding)
    text = "\n".join(line.plain for line in lines)
    assert all(name in text for name in CHAIN)
    assert len({line.split()[0] for line in re.split(r"\n|  ", text)[:5]}) == 5  # a sign for each state


def test_a_bar_is_as_long_as_what_is_done():
    for step, full in ((0, 0), (15, 10), (30, 20), (60, 40)):
        line, *_ = place_lines("sft", placed(entry(0, step)), 0, 79, "utf-8")
        assert (line.plain.count("━"), line.plain.count("─")) == (full, 40 - full)


def test_of_a_long_chain_what_is_finished_is_counted():
    chain = {f"stage-{number}": "finished" for number in range(30)} | {"ppo": "at work", "dpo": "waiting"}
    assert [line.plain for line in chain_lines(chain, 79, "utf-8")] == ["✓ 30 finished  ● ppo  · 1 waiting"]


# The states.


def chain_of(**found):
    types = dict.fromkeys(found, "sft")
    return Chain(name="tiny", types=types, states=found, launcher=states.this_process())


def test_the_states_that_a_killed_launcher_has_left(tmp_path):
    chain = chain_of(a="finished", b="at work", c="at work", d="failed", e="waiting", f="finished", g="waiting")
    finished = dict.fromkeys(("a", "c", "g"), "2026-01-01T00:00:00+00:00")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").touch()
    alive = {"b": "at work", "c": "at work", "d": "failed", "e": "waiting", "f": "waiting", "g": "waiting"}
    assert states.now(chain, tmp_path, finished) == {"a": "finished"} | alive
    dead = {"b": "stopped", "c": "finished", "d": "failed", "e": "waiting", "f": "waiting", "g": "finished"}
    with subprocess.Popen(["true"]) as process:
        process.wait()
        chain.launcher.pid = process.pid
    assert states.now(chain, tmp_path, finished) == {"a": "finished"} | dead
    with FileLock(tmp_path / "b" / ".lock"):  # somebody runs it by hand
        assert states.now(chain, tmp_path, finished)["b"] == "at work"
    with FileLock(tmp_path / "a" / ".lock"):  # an export reads it
        assert states.now(chain, tmp_path, finished)["a"] == "finished"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", ".lock", "a", "b"]


def test_a_stage_that_failed_and_was_finished_by_hand_is_finished(tmp_path):
    chain = chain_of(sft="failed", dpo="failed")
    chain.launcher.created -= 1  # it has ended
    chain.write(tmp_path)
    os.utime(tmp_path / states.FILE, (1_767_225_600, 1_767_225_600))  # 2026-01-01T00:00:00
    recorded = {"sft": "2026-01-01T00:01:00+00:00", "dpo": "2025-12-31T23:59:00+00:00"}
    assert states.now(chain, tmp_path, recorded) == {"sft": "finished", "dpo": "failed"}


def test_a_launcher_is_known_by_more_than_its_number(tmp_path):
    chain = chain_of(sft="at work")
    assert states.now(chain, tmp_path, {})["sft"] == "at work"
    chain.launcher.created -= 1  # the number was given to another process
    assert states.now(chain, tmp_path, {})["sft"] == "stopped"


def test_states_that_cannot_be_read_are_none(tmp_path):
    assert states.read(tmp_path) is None
    chain_of(sft="waiting").write(tmp_path)
    assert states.read(tmp_path).states == {"sft": "waiting"}
    text = (tmp_path / states.FILE).read_text()
    for broken in ("{", text.replace("waiting", "asleep"), text.replace('"sft": "sft"', '"ppo": "ppo"')):
        (tmp_path / states.FILE).write_text(broken)
        assert states.read(tmp_path) is None
    chain_of(sft="waiting").write(tmp_path / "sft" / "no" / "folder")
    (tmp_path / "file").touch()
    chain_of(sft="waiting").write(tmp_path / "file" / "below")  # the disk refuses it


def test_status_shows_what_is_at_work_with_its_alarms(tmp_path):
    chain_of(sft="finished", ppo="at work", dpo="waiting").write(tmp_path)
    (tmp_path / "ppo").mkdir()
    with Progress(tmp_path / "ppo" / "progress.jsonl") as writer:
        writer.note("ppo: four views of one backbone")
        writer.note("ppo: watchdog: kl is high\n  causes: many")
        writer.begin("training", 8, 2)
        writer.step(3, {"loss": 0.5})
    alarm = ["", "ppo: watchdog: kl is high", "  causes: many"]
    importing = Console(file=io.StringIO(), width=160)
    assert progress.show_unfinished(
        tmp_path, {"sft": "2026-01-01T00:00:00+00:00"}, importing
    )  # what is there is of an earlier attempt
    assert "kl is high" not in importing.file.getvalue() and "step" not in importing.file.getvalue()
    pipe = Console(file=io.StringIO(), width=160)
    terminal = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    with FileLock(tmp_path / "ppo" / ".lock"):
        assert progress.show_unfinished(tmp_path, {"sft": "2026-01-01T00:00:00+00:00"}, pipe)
        assert progress.show_unfinished(tmp_path, {"sft": "2026-01-01T00:00:00+00:00"}, terminal)
    *first, states_line, place_line = pipe.file.getvalue().splitlines()
    assert (first, states_line) == (alarm, "finished: sft; at work: ppo; waiting: dpo")
    assert re.fullmatch(r"ppo: step 3/8, \ds left: loss 0\.500", place_line)
    *first, states_line, place_line, figures = terminal.file.getvalue().splitlines()
    assert (first, states_line, figures) == (alarm, "✓ sft  ● ppo  · dpo", "loss 0.500")
    assert re.fullmatch(r"ppo ━{15}─{25} step 3/8, \ds left", place_line)
    chain_of(sft="finished").write(tmp_path)
    assert not progress.show_unfinished(tmp_path, {"sft": "2026-01-01T00:00:00+00:00"}, pipe)


# A terminal.


class Terminal(io.StringIO):
    """A terminal of that size, as pyte sees it."""

    def __init__(self, columns, lines=24):
        super().__init__()
        self.screen = pyte.Screen(columns, lines)
        self.screen.set_mode(pyte.modes.LNM)
        self.stream = pyte.Stream(self.screen)

    def isatty(self):
        return True

    def write(self, text):
        self.stream.feed(text)
        return len(text)

    @property
    def shown(self):
        return [line.rstrip() for line in self.screen.display if line.strip()]


def console_on(file, width, **environment):
    return Console(file=file, width=width, force_terminal=True, _environ={"TERM": "xterm"} | environment)


@pytest.fixture
def watched(tmp_path):
    """`watched(terminal, width)`: a screen whose stage is at work, and its progress file."""

    def call(terminal, width, **environment):
        console = console_on(terminal, width, **environment)
        screen = Screen(console, chain_of(pretrain="finished", sft="waiting", dpo="waiting"), tmp_path, ["sft", "dpo"])
        (tmp_path / "sft").mkdir(exist_ok=True)
        return console, screen, tmp_path / "sft" / "progress.jsonl"

    return call


def test_lines_are_drawn_anew_below_the_messages(watched, tmp_path):
    terminal = Terminal(80)
    _, screen, file = watched(terminal, 80)
    with screen:
        with screen.at_work("sft") as watch:
            look = watch(file, "token")
            with Progress(file, "token") as writer:
                look()
                assert terminal.shown == ["● sft  · dpo", "sft: loading for 0s"]
                writer.begin("training", 4)
                writer.step(1, {"loss": 4.0})
                writer.note("sft: a message")
                look()
                assert terminal.shown[0] == "sft: a message"
                assert terminal.shown[1] == "● sft  · dpo"
                assert re.fullmatch("sft ━{10}─{30} step 1/4, 0s left", terminal.shown[2])
                assert terminal.shown[3:] == ["loss 4.00"]
                writer.step(2, {"loss": 3.0})
                writer.note("sft: watchdog: kl is high\n  causes: many")
                look()
                assert terminal.shown[:3] == ["sft: a message", "sft: watchdog: kl is high", "  causes: many"]
                assert terminal.shown[5:] == ["loss 4.00→3.00"]
                assert terminal.screen.buffer[1][0].bold and not terminal.screen.buffer[0][0].bold
        assert states.read(tmp_path).states == {"pretrain": "finished", "sft": "finished", "dpo": "waiting"}
    assert terminal.shown == ["sft: a message", "sft: watchdog: kl is high", "  causes: many"]
    assert not terminal.screen.cursor.hidden


def test_two_launchers_in_one_run_folder(watched, tmp_path):
    chain_of(pretrain="finished", sft="failed", dpo="failed").write(tmp_path)  # of an earlier run
    _, first, _ = watched(Terminal(80), 80)
    _, second, _ = watched(Terminal(80), 80)
    with first.at_work("sft"):
        assert states.read(tmp_path).states == {"pretrain": "finished", "sft": "at work", "dpo": "waiting"}
        with second.at_work("dpo"):
            pass
        assert states.read(tmp_path).states["dpo"] == "finished"
    assert states.read(tmp_path).states == dict.fromkeys(("pretrain", "sft", "dpo"), "finished")


@pytest.mark.parametrize(
    ("error", "state", "left"),
    [(StageFailed("x", 1), "failed", ["✗ sft  · dpo"]), (KeyboardInterrupt(), "stopped", [])],
)
def test_what_is_left_of_a_stage_that_fails_or_is_stopped(watched, tmp_path, error, state, left):
    terminal = Terminal(80)
    _, screen, file = watched(terminal, 80)
    with pytest.raises(type(error)), screen, screen.at_work("sft") as watch:
        watch(file, "token")()
        raise error
    assert terminal.shown == left
    assert states.read(tmp_path).states["sft"] == state
    assert not terminal.screen.cursor.hidden


def test_a_terminal_that_becomes_narrow_shows_nothing_twice(watched):
    """It breaks what was there into more lines, as one that is narrow from the start does."""
    terminal = Terminal(40)
    console, screen, file = watched(terminal, 80)
    with screen, screen.at_work("sft") as watch:
        look = watch(file, "token")
        with Progress(file, "token") as writer:
            writer.begin("training", 4)
            writer.step(1, {"loss": 4.0, "eval_loss": 5.0})
            look()
            assert len(terminal.shown) == 4  # the line with the bar takes two
            console.width = 40
            look()
            first, second, third = terminal.shown
            assert (first, third) == ("● sft  · dpo", "loss 4.00  held-out loss 5.00")
            assert re.fullmatch("sft ━+─+ step 1/4, 0s left", second) and len(second) < 40
            console.width = 80
            terminal.screen.resize(columns=80)
            look()
            assert len(terminal.shown) == 3


def test_a_terminal_of_three_lines(watched):
    terminal = Terminal(80, 3)
    console, screen, file = watched(terminal, 80)
    console.height = 3
    with screen, screen.at_work("sft") as watch, Progress(file, "token") as writer:
        writer.begin("training", 4)
        for number in range(1, 5):
            writer.step(number, {"loss": 4.0})
            watch(file, "token")()
    assert terminal.shown == []


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
def test_where_nothing_can_be_redrawn_lines_follow_each_other(watched, environment):
    terminal = Terminal(80)
    _, screen, file = watched(terminal, 80, **environment)
    with screen, screen.at_work("sft") as watch, Progress(file, "token") as writer:
        look = watch(file, "token")
        writer.begin("training", 4)
        for number in range(1, 5):
            writer.step(number, {"loss": 4.0, "lr": 1.0})
        writer.step(4, {"train_runtime": 1.0})
        look()
    assert [re.sub(", .* left", "", line) for line in terminal.shown] == [
        f"sft: step {number}/4: loss 4.00" for number in range(1, 5)
    ]


def test_what_is_no_news_after_another_stage_has_said_it_is_printed_once(watched):
    terminal = Terminal(80)
    _, screen, file = watched(terminal, 80, TERM="dumb")
    with screen:
        for name in ("sft", "dpo"):
            with screen.at_work(name) as watch, Progress(file, "token") as writer:
                look = watch(file, "token")
                writer.note(f"{name}: on the CPU", once=True)
                writer.note(f"{name}: watchdog: kl is high")
                writer.note(f"{name}: output in run/{name}", once=True)
                writer.note(f"{name}: output in run/{name}", once=True)
                look()
    assert terminal.shown == [
        "sft: on the CPU",
        "sft: watchdog: kl is high",
        "sft: output in run/sft",
        "sft: output in run/sft",
        "dpo: watchdog: kl is high",
        "dpo: output in run/dpo",
        "dpo: output in run/dpo",
    ]


def test_a_pipe_is_no_terminal_whatever_the_environment_says():
    assert can_redraw(console_on(Terminal(80), 80))
    assert not can_redraw(Console(file=io.StringIO(), _environ={"TERM": "xterm", "FORCE_COLOR": "1"}))
    assert not can_redraw(Console(file=Terminal(80), _environ={"TERM": "dumb"}))


def test_no_color(watched):
    for variable, expected in (("NO_COLOR", {"default"}), ("ANY", {"default", "green", "cyan"})):
        terminal = Terminal(80)
        console, screen, file = watched(terminal, 80, **{variable: "1"})
        screen._shown = ["pretrain", "sft"]
        assert console.no_color == (variable == "NO_COLOR")
        with screen, screen.at_work("sft") as watch:
            watch(file, "token")()
            assert {cell.fg for row in terminal.screen.buffer.values() for cell in row.values()} == expected


def test_a_stage_that_logs_nothing_says_once_a_minute_how_far_it_is(watched, monkeypatch):
    console = Console(file=io.StringIO(), width=160)
    _, screen, file = watched(Terminal(80), 80, TERM="dumb")
    screen._console = console
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    with screen, screen.at_work("sft") as watch, Progress(file, "token") as writer:
        look = watch(file, "token")
        writer.begin("training", 1000)
        for number in range(1, 181):
            clock[0] += 1
            writer.step(number)
            look()
    lines = console.file.getvalue().splitlines()
    assert lines == [
        f"sft: step {60 * n}/1000, {text} left" for n, text in ((1, "15m 40s"), (2, "14m 40s"), (3, "13m 40s"))
    ]
