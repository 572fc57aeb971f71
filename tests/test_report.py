"""The report's page: states of stages, curves, escaping, what it is made from, and when it is made."""

import base64
import hashlib
import json
import os
import re
import shlex
import shutil

import pytest
import report_runs
from filelock import FileLock
from report_runs import EARLY, LATE, record
from rich.console import Console

from pipeline.html import curves, drawing, page, reading, tables, words
from pipeline.records import last_run, manifest
from pipeline.records.last_run import Attempt

HOSTILE = '</script><script>alert(1)</script><!-- &amp; </textarea> \u2028 \u202e "\\'


def states(folder):
    return {name: stage.state for name, stage in reading.read(folder).stages.items()}


# States


def test_each_state_is_told_from_the_others(tmp_path):
    """In the first paragraph, no stage is named that merely waits or has not begun."""
    folder = report_runs.write(
        tmp_path,
        {"sft": record("sft"), "reward": record("reward"), "reward-shift": record("reward-shift", started=LATE)},
        {"ppo": Attempt(state="failed", at=LATE, message="stage 'ppo' stopped: judge gave None")},
        {"reward": "config changed: lora.r (4 -> 8)", "reward-shift": "reward runs again"},
    )
    (folder / "dpo").mkdir()
    with FileLock(folder / "dpo" / ".lock"):
        run = reading.read(folder)
    expected = ["finished", "stale", "finished", "failed", "running", "waiting"]
    assert [stage.state for stage in run.stages.values()] == expected
    said = words.summarise(run).state
    assert said.startswith(
        "2 of 6 stages are finished. reward is out of date and must run again: config changed: lora.r"
    )
    assert "ppo failed." in said and "dpo is running." in said and "evaluate" not in said
    assert run.stages["evaluate"].why == "for reward, ppo, dpo"
    assert states(folder)["dpo"] == "interrupted"  # the lock is gone, and there is no record


def test_a_first_run_that_failed_before_there_was_a_manifest(tmp_path):
    failed = Attempt(
        state="failed", at=LATE, message="stage 'sft' ended with exit code 1. The last lines of log.txt:\n x"
    )
    folder = report_runs.write(tmp_path / "tiny", {}, {"sft": failed})
    assert not (folder / manifest.FILE).exists()
    expected = {"sft": "failed"} | dict.fromkeys(["reward", "reward-shift", "ppo", "dpo", "evaluate"], "waiting")
    assert states(folder) == expected
    assert "Mend sft first." in page.render([reading.read(folder)])


def test_a_stage_that_another_command_finished_meanwhile(tmp_path):
    """It began before the last command, which was told that it is not finished, and ended after it."""
    long = record("dpo", started=EARLY, duration=90_000.0)
    records = {name: record(name) for name in report_runs.PARENTS} | {"dpo": long}
    folder = report_runs.write(tmp_path, records, reasons={"dpo": "not finished yet"})
    assert states(folder)["dpo"] == "finished"
    (folder / "dpo").mkdir()
    with FileLock(folder / "dpo" / ".lock"):
        assert states(folder)["dpo"] == "running"
        report_runs.write(tmp_path, records, {"dpo": Attempt(state="finished", at=LATE)})
        assert states(folder)["dpo"] == "finished"  # an export reads it


def test_what_was_taken_back_is_forgotten(tmp_path):
    """A changed stage was refused, and kept its record; without the change it is current."""
    failed = {"ppo": Attempt(state="refused", at=LATE, message="the gate"), "dpo": Attempt(state="finished", at=LATE)}
    folder = report_runs.write(tmp_path, attempts=failed, reasons={"ppo": "config changed: lora.r (4 -> 8)"})
    assert states(folder)["ppo"] == "failed"
    asked = last_run.read(folder)
    assert not last_run.settle(folder, asked)  # it is still to run
    stages = asked.stages | {"ppo": asked.stages["ppo"].model_copy(update={"reason": None})}
    current = asked.model_copy(update={"stages": stages})
    assert last_run.settle(folder, current) and states(folder)["ppo"] == "finished"
    assert last_run.read(folder).attempts.keys() == {"dpo"}
    assert not last_run.settle(folder, current)


def test_notes_stand_below_the_results(tmp_path):
    folder = report_runs.write(tmp_path)
    assert "4 prompts are few" in page.render([reading.read(folder)])


def test_a_stage_that_may_start_has_not_begun(tmp_path):
    folder = report_runs.write(tmp_path, {"sft": record("sft")})
    assert states(folder)["reward"] == states(folder)["dpo"] == "not begun"
    assert words.summarise(reading.read(folder)).state == "1 of 6 stages are finished."


@pytest.mark.parametrize(("ended", "state"), [("started", "interrupted"), ("stopped", "interrupted")])
def test_a_stage_that_was_killed(tmp_path, ended, state):
    """With its launcher, or by Ctrl-C."""
    folder = report_runs.write(tmp_path, {"sft": record("sft")}, {"dpo": Attempt(state=ended, at=LATE)})
    (folder / "dpo").mkdir()
    (folder / "dpo" / "log.txt").write_text("training\n")
    assert states(folder)["dpo"] == state
    assert "dpo was interrupted; the same command goes on" in words.summarise(reading.read(folder)).state


def test_what_was_tried_with_other_parents_does_not_count(tmp_path):
    """The gate held ppo; since then the reward model was made again."""
    held = {"ppo": Attempt(state="refused", at="2026-01-02T12:00:00+00:00", message="ppo does not start")}
    folder = report_runs.write(tmp_path, {name: record(name) for name in ("sft", "reward", "reward-shift")}, held)
    (folder / "ppo").mkdir()
    (folder / "ppo" / "log.txt").write_text("$ python\n")
    (folder / "ppo" / "gate.json").write_text(json.dumps({"stops": True, "verdicts": []}))
    assert states(folder)["ppo"] == "held"
    crashed = {"ppo": Attempt(state="failed", at="2026-01-02T12:00:00+00:00", message="it crashed")}
    report_runs.write(tmp_path, {name: record(name) for name in ("sft", "reward", "reward-shift")}, crashed)
    assert states(folder)["ppo"] == "failed"  # the verdicts are those of an earlier start
    report_runs.write(tmp_path, {name: record(name, started=LATE) for name in ("sft", "reward", "reward-shift")}, held)
    assert states(folder)["ppo"] == "not begun"


def test_a_crashed_stage_shows_the_last_lines_of_its_log(tmp_path):
    failed = Attempt(state="failed", at=LATE, message="stage 'reward' ended with exit code 1. The last lines of x:")
    folder = report_runs.write(tmp_path, {"sft": record("sft")}, {"reward": failed})
    (folder / "reward").mkdir()
    lines = [f"line {number}" for number in range(5000)] + ["<b>CUDA</b> out of memory"]
    (folder / "reward" / "log.txt").write_text("\n".join(lines))
    stage = reading.read(folder).stages["reward"]
    assert stage.log == lines[-20:]
    assert (stage.why, stage.error) == ("stage 'reward' ended with exit code 1", "")
    html = page.render([reading.read(folder)])
    assert "&lt;b&gt;CUDA&lt;/b&gt; out of memory" in html and "line 4979" not in html and "line 4982" in html


# Reading


def test_odd_files_in_a_run_folder_are_passed_over(tmp_path):
    """A plan that is damaged, logs and samples that are no JSON, verdicts of another form."""
    folder = report_runs.write(tmp_path)
    (folder / last_run.FILE).write_text('{"started": 5}')
    for name in report_runs.PARENTS:
        (folder / name / "output").mkdir(parents=True)
        (folder / name / "log_history.json").write_text('[{"step": "x", "loss": 1}, 5, {"step": 1, "loss": null}]')
        (folder / name / "gate.json").write_text('{"stops": 1, "verdicts": [{"stage": "sft"}, 7]}')
    good = report_runs.sample("Hi", dict.fromkeys(report_runs.POLICIES, "Hello"))
    (folder / "evaluate" / "output" / "samples.jsonl").write_text("{\nnull\n[]\n" + json.dumps(good) + "\n")
    run = reading.read(folder)
    assert run.last is None and run.stages["sft"].gate == []
    assert len(run.stages["evaluate"].samples.prompts) == 1 and run.stages["evaluate"].samples.total == 4
    assert "This page holds 1 of 4 prompts" in page.render([run])


def test_commands_are_quoted_for_a_shell(tmp_path):
    odd = ("stages.sft.data=it's; rm -rf $HOME", 'name="a b"')
    run = reading.read(report_runs.write(tmp_path, overrides=odd))
    command = page._command(run, "re ward")
    assert shlex.split(command) == [
        *("cd", "/somewhere/a b", "&&"),
        *("rlhf", "run", "my config.yaml", *odd, "--redo", "re ward"),
    ]


def test_rows_are_told_as_they_are_on_record(tmp_path):
    """A stream has none to count; an evaluation may use fewer than there are."""
    plain = {"dataset": "demos", "split": "train", "read": 1200, "rows": 1100, "tokens": 9000}
    plain |= {"dropped": {"too_long": 90, "blank": 10}, "noticed": {"longer_wins": 7}}
    used = {"dataset": "prompts", "split": "held-out", "read": 50, "rows": 50, "tokens": 500, "used": 20}
    stream = {"dataset": "texts", "split": "train", "streamed": True, "read": 4000, "dropped": {}}
    records = {"sft": record("sft", datasets={"data": plain, "eval_data": used, "corpus": stream})}
    shown = tables.data(reading.read(report_runs.write(tmp_path, records)).stages["sft"])
    left_out = "90 are longer than the limit of tokens\n10 are blank texts"
    assert shown.rows == [
        ("data", "demos", "train", "1,200", "1,100", "9,000", left_out, "7 longer wins"),
        ("eval_data", "prompts", "held-out", "50", "20 of 50", "500", "none", "none"),
        ("corpus", "texts", "train", "4,000", "streamed, not counted", "-", "none", "none"),
    ]


def test_a_name_that_is_no_unicode_is_escaped(tmp_path):
    """As of a file that was named in another encoding, in a command and in a message."""
    failed = Attempt(state="failed", at=LATE, message="b\udcff.jsonl: row 3 is bad")
    run = reading.read(report_runs.write(tmp_path, {}, {"sft": failed}, overrides=("data.rows.path=\udcff",)))
    assert run.stages["sft"].why == "b\\udcff.jsonl: row 3 is bad"
    assert run.last.command[-1] == "data.rows.path=\\udcff"


# The page


def completions(count=2, text="Hello"):
    return [
        report_runs.sample(f"Prompt {number}", {policy: f"{text} {policy}" for policy in report_runs.POLICIES})
        for number in range(count)
    ]


def test_hostile_texts_are_data(tmp_path):
    """Nothing of them can end a script, an attribute or an element; what the script reads is what the model wrote."""
    folder = report_runs.write(tmp_path)
    report_runs.write_samples(folder, completions(2, HOSTILE))
    shift = dict(report_runs.metrics_of("reward-shift"))
    shift["largest"] = [{"prompt": HOSTILE, "offset": 1.0, "within_sd": None}]
    records = {name: record(name) for name in report_runs.PARENTS}
    records["reward-shift"] = record("reward-shift", metrics=shift)
    records["sft"] = record("sft", reason=HOSTILE, config={HOSTILE: HOSTILE})
    report_runs.write(tmp_path, records, reasons={"dpo": HOSTILE})
    html = page.render([reading.read(folder)])
    assert html.count("<script") == html.count("</script>") == 2 and "<!--" not in html and "</textarea>" not in html
    (block,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert not set("<>&\u2028") & set(block)
    assert json.loads(block)["rows"][0][1][0][0] == f"{HOSTILE} base"


def test_numbers_that_are_none_do_not_break_the_script(tmp_path):
    folder = report_runs.write(tmp_path)
    odd = {"score": float("nan"), "judge": None, "kl": float("inf"), "length": "3"}
    report_runs.write_samples(
        folder, [report_runs.sample("Hi", dict.fromkeys(report_runs.POLICIES, "\ud800"), ppo=odd)]
    )
    path = folder / "report.html"
    page.make([folder], None, Console(quiet=True))
    (block,) = re.findall(r'<script type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"))
    assert json.loads(block)["rows"][0][1][2] == ["?", None, None, None, None, True]


def test_the_policy_allows_our_own_script_and_style_alone(tmp_path):
    html = page.render([reading.read(report_runs.write(tmp_path))])
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', html)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; img-src data:; ")
    for name, attributes in (("style", ""), ("script", "")):
        (text,) = re.findall(rf"<{name}{attributes}>(.*?)</{name}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert re.findall(r'\s(?:style|on\w+)="', html) == []
    addresses = re.findall(r'\b(?:src|href|action)="([^"]*)"', html)
    assert addresses and all(address.startswith(("#", "data:")) for address in addresses)
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(#" in html


def test_ids_are_unique_and_labels_point_to_them(tmp_path):
    folder = report_runs.write(tmp_path)
    report_runs.write_samples(folder, completions())
    run = reading.read(folder)
    html = page.render([run, run])
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids)) > 20
    targets = re.findall(r'(?:aria-labelledby="|href="#)([^"]*)"', html)
    assert targets and set(targets) <= set(ids)


def contrast(first, second):
    """The contrast of two colours, as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_texts_have_enough_contrast_in_light_and_dark():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    blocks = re.findall(r":root \{(.*?)\}", page._file("style.css"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        texts = set(colours) - {"back", "card", "edge"}
        assert len(texts) >= 9
        for name in texts:
            for back in ("back", "card"):
                assert contrast(colours[name], colours[back]) >= 4.5, (name, back)


def test_a_page_holds_as_many_completions_as_fit(tmp_path):
    folder = report_runs.write(tmp_path)
    report_runs.write_samples(folder, completions(300, "x" * 6000))
    html = page.render([reading.read(folder)])
    assert 1_000_000 < len(html) < 5_000_000
    shown, total = map(int, re.findall(r"This page holds (\d+) of (\d+) prompts", html)[0])
    assert total == 300 and 100 < shown < 300
    report_runs.write_samples(folder, completions(300, "x" * 400))
    html = page.render([reading.read(folder)])
    assert "This page holds" not in html and len(html) < 5_000_000


# Curves


@pytest.mark.parametrize("size", [3, 240, 241, 5000])
def test_thinned_curves_keep_ends_and_extremes(size):
    points = [(float(step), float((step * 7919) % 1000)) for step in range(size)]
    points[0] = (0.0, 500.5)
    points[-1] = (size - 1.0, 499.5)
    if size > 100:
        points[1234 % size] = (float(1234 % size), 9e9)
        points[77] = (77.0, -9e9)
    kept = curves.thin(points)
    assert len(kept) <= curves.MOST_POINTS and (size > curves.MOST_POINTS or kept == points)
    assert kept == sorted(kept) and set(kept) <= set(points)
    for whole in (points[0], points[-1], min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])):
        assert whole in kept


def test_curves_are_in_the_order_of_steps_with_the_last_value_of_each(tmp_path):
    """As after a resume, whose log repeats steps; numbers that are none leave a gap."""
    folder = report_runs.write(tmp_path)
    history = [{"step": 2, "loss": 3.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": None}]
    history += [{"step": 4, "loss": float("inf")}, {"step": 5, "loss": 1.0}, {"step": 5, "eval_loss": 1.5}]
    (folder / "sft").mkdir()
    (folder / "sft" / "log_history.json").write_text(json.dumps(history))
    stage = reading.read(folder).stages["sft"]
    (chart,) = curves.charts(stage)
    assert chart.curves[0].points == [(1.0, 4.0), (2.0, 2.0), (5.0, 1.0)]
    drawn = drawing.draw(chart, "sft")
    assert drawn.lines[0].points == "62.0,10.0 123.5,88.7 308.0,128.0"
    assert drawn.words == (
        "loss of sft by step. training: 4 at step 1, 1 at step 5; least 1 at step 5, greatest 4 at step 1."
    )


def test_rl_is_drawn_in_the_units_of_the_watchdog(tmp_path):
    """RLOO logs the KL per token; its alarms are marked."""
    folder = report_runs.write(tmp_path)
    history = [{"step": step, "kl": 0.5, "completions/mean_length": 20.0, "reward": step / 2} for step in (1, 2, 3)]
    (folder / "ppo").mkdir()
    (folder / "ppo" / "log_history.json").write_text(json.dumps(history))
    alarm = {"measure": "kl", "value": None, "low": None, "high": 50.0, "update": 2, "causes": "many"}
    records = {name: record(name) for name in report_runs.PARENTS}
    records["ppo"] = record("ppo", type="rloo", metrics={"alarms": [alarm]})
    report_runs.write(tmp_path, records)
    charts = {chart.title: chart for chart in curves.charts(reading.read(folder).stages["ppo"])}
    assert list(charts) == ["score", "KL", "length"]
    assert charts["KL"].curves[0].points == [(1.0, 10.0), (2.0, 10.0), (3.0, 10.0)] and charts["KL"].marks == [2.0]
    assert charts["KL"].unit == "nats per completion"


def test_an_alarm_behind_the_last_number_lies_within_the_picture(tmp_path):
    """A loss that became NaN has no point there."""
    points = [(float(step), 1.0) for step in range(1, 21)]
    chart = curves.Chart("loss", "nats", [curves.Curve("", points)], marks=[21.0])
    (mark,) = drawing.draw(chart, "ppo").marks
    assert drawing.LEFT < mark <= drawing.WIDTH - drawing.RIGHT


def test_an_unfinished_stage_shows_the_curves_of_its_newest_checkpoint(tmp_path):
    folder = report_runs.write(tmp_path, {"sft": record("sft")})
    for step, ending in ((1, "}"), (2, "}"), (3, "")):
        checkpoint = folder / "dpo" / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        state = checkpoint / "trainer_state.json"
        state.write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]})[:-1] + ending)
        os.utime(state, (step, step))
    assert reading.read(folder).stages["dpo"].history == [{"step": 2, "loss": 1.0}]
    shutil.rmtree(folder / "dpo" / "checkpoints")
    (folder / "dpo" / "log_history.json").write_text('[{"step": 9, "loss": 0.1}]')  # of the time before
    assert reading.read(folder).stages["dpo"].history == []


def test_the_picture_has_every_stage_and_the_arrows_of_its_lineage(tmp_path):
    run = reading.read(report_runs.write(tmp_path))
    chain = drawing.draw_chain(run)
    corners = {box.name: (box.x, box.y) for box in chain.boxes}
    assert list(corners) == list(report_runs.PARENTS) and len(set(corners.values())) == 6
    for name, parents in report_runs.PARENTS.items():
        assert all(corners[parent][0] < corners[name][0] for parent in parents.values())
    assert [arrow.is_weights for arrow in chain.arrows].count(True) == 3  # reward, ppo and dpo from sft
    assert all(0 <= box.x <= chain.width - drawing.BOX_WIDTH for box in chain.boxes)
    assert "ppo from sft, reward, reward-shift" in chain.words
