"""What can be wrong with data, with policies that learned from rows, and with reward models."""

from collections.abc import Iterator, Sequence
from typing import cast

from pipeline.config.type_row import POLICIES, REWARD_MODELS
from pipeline.data.faults import DROPPED, NOTICED
from pipeline.html.curves import finite, logged
from pipeline.html.values import Found, Run, Stage
from pipeline.shift import advice
from pipeline.shift.estimate import Estimate, estimate
from pipeline.shift.report import Report

# Shares of a dataset's rows. Faults stop a run above a limit of `checks`; these are for what the limits let through.
MANY_LEFT_OUT = 0.05
MANY_NOTICED = 0.05
# Rows that are left out on purpose: none of them is a fault of the data.
INTENDED = ("blank", "label_false", "held_out", "same_prompt", "weight")
WORTH_A_LOOK = ("contradictory", "special_tokens", "eos", "other_tokens", "truncated")
_LOOK = "Look at them with `rlhf check-data`"
_TOO_LONG = "Raise `max_length` of the stages that learn from it (of prompts: `max_prompt_length`), or shorten them"
MOST_EMPTY = 0.5  # share of prompts whose likeliest first token is special, as the gate has it
RISE = 0.05  # of a held-out loss over its least value, as a share of it
ENOUGH_EPOCHS = 1.5  # half of the rows came again
LEARNED_BY_HEART = 0.15  # accuracy on rows that were trained on, above that on held-out ones


def rows_left_out(run: Run) -> Iterator[Found]:
    """Yield the datasets of which many rows do not fit; those that are left out on purpose do not count."""
    return _rows(run, "dropped", "read", [kind for kind in DROPPED if kind not in INTENDED], MANY_LEFT_OUT, DROPPED)


def rows_to_look_at(run: Run) -> Iterator[Found]:
    """Yield the datasets of which many rows are used and yet are not what they should be."""
    return _rows(run, "noticed", "rows", WORTH_A_LOOK, MANY_NOTICED, NOTICED)


def _rows(run: Run, key: str, of: str, kinds: Sequence[str], limit: float, words: dict[str, str]) -> Iterator[Found]:
    """Yield the datasets of which many rows have something in common, each once; a stream has no numbers of rows."""
    told: set[tuple[str, str]] = set()
    for stage in run.stages.values():
        for section in ({} if stage.record is None else stage.record.datasets).values():
            total = section.get(of) or 0
            for kind in kinds:
                count = (section.get(key) or {}).get(kind, 0)
                dataset = str(section.get("dataset"))
                if count <= limit * total or (dataset, kind) in told:
                    continue
                told.add((dataset, kind))
                what = words[kind].format(limit="the limit of tokens")
                outcome = " and are left out" if key == "dropped" else ""
                text = f"{count} of {total} rows of the dataset {dataset} {what}{outcome}."
                yield stage.name, f"{text} {_TOO_LONG if '{limit}' in words[kind] else _LOOK}."


def learned_nothing(run: Run) -> Iterator[Found]:
    """Yield the policies whose held-out loss is no lower than before their training."""
    for stage in run.finished(*POLICIES):
        before = stage.metrics.get("initial_eval_loss")
        after = stage.metrics.get("eval_loss")
        if before is None or after is None or after < before or run.fails_gate(stage.name, "held-out loss"):
            continue
        text = f"Its held-out loss is {after:.3f} after training and was {before:.3f} before."
        yield (
            stage.name,
            f"{text} It learned nothing that holds beyond its rows: look at learning rate, epochs and data.",
        )


def empty(run: Run) -> Iterator[Found]:
    """Yield the policies that would end at once."""
    for stage in run.finished(*POLICIES):
        first = stage.metrics.get("first_token")
        if first is None or first["special"] <= MOST_EMPTY:
            continue
        if not run.fails_gate(stage.name, "first token"):
            text = f"{first['special']:.0%} of its prompts have a special token as likeliest first token."
            yield stage.name, f"{text} Completions would be empty: look at the chat template and `tokenizer.eos_token`."


def overfitted(run: Run) -> Iterator[Found]:
    """Yield the stages whose held-out loss rose again."""
    for stage in run.finished(*POLICIES, *REWARD_MODELS):
        points = logged(stage.history, "eval_loss")
        if len(points) < 3:  # before and after training only
            continue
        step, least = min(points, key=lambda point: point[1])
        _, last = points[-1]
        if last > least + RISE * abs(least):
            text = f"Its held-out loss was least at step {step:g} ({least:.3f}) and is {last:.3f} at the end."
            yield stage.name, f"{text} Train for fewer steps or at a lower learning rate, or on more rows."


def chance(run: Run) -> Iterator[Found]:
    """Yield the reward models that cannot be told from a coin."""
    for stage in run.finished(*REWARD_MODELS):
        accuracy = _accuracy(stage)
        if accuracy is None or accuracy.low is None or accuracy.low > advice.CHANCE:
            continue
        if run.fails_gate(stage.name, "held-out accuracy"):
            continue
        text = f"Its accuracy on held-out comparisons is {accuracy}, which includes chance, 0.50."
        yield (
            stage.name,
            f"{text} Collect more or cleaner comparisons, and look whether chosen and rejected are swapped.",
        )


def unmeasured(run: Run) -> Iterator[Found]:
    """Yield the reward models without held-out comparisons."""
    for stage in run.finished(*REWARD_MODELS):
        if _accuracy(stage) is None:
            yield (
                stage.name,
                "It has no held-out comparisons, so nobody knows whether it is right. Give it `eval_data`.",
            )


def by_heart(run: Run) -> Iterator[Found]:
    """Yield the reward models that are right on rows that they saw before, and much less on others."""
    for stage in run.finished(*REWARD_MODELS):
        accuracy = _accuracy(stage)
        trained = _seen_before(stage)
        if accuracy is None or trained is None or trained - accuracy.value <= LEARNED_BY_HEART:
            continue
        if accuracy.high is not None and trained > accuracy.high:
            text = f"In its last epoch it is right on {trained:.0%} of rows that it saw before, and on"
            mend = "it learned rows by heart. Train for fewer epochs or on more rows."
            yield stage.name, f"{text} {accuracy.value:.0%} of held-out ones: {mend}"


def _seen_before(stage: Stage) -> float | None:
    """Return the accuracy in training over the last epoch; None where few rows have come again."""
    points: list[tuple[float, float]] = []
    for entry in stage.history:
        epoch = finite(entry.get("epoch"))
        accuracy = finite(entry.get("accuracy"))
        if epoch is not None and accuracy is not None:
            points.append((epoch, accuracy))
    last = max((epoch for epoch, _ in points), default=0.0)
    seen = [accuracy for epoch, accuracy in points if epoch > max(last - 1, 1.0)]
    return sum(seen) / len(seen) if last >= ENOUGH_EPOCHS else None


def _accuracy(stage: Stage) -> Estimate | None:
    held_out = stage.metrics.get("held_out")
    return None if held_out is None else estimate(held_out["accuracy"])


def shift(run: Run) -> Iterator[Found]:
    """Yield the reward models of whose shift reports one of the rules holds that are more than a remark."""
    records = [stage.record for stage in run.stages.values() if stage.record is not None]
    plain = any(record.config.get("prompt_baseline") == "none" for record in records)
    serious = ["no_signal", "longer", "shorter", "overconfident", *(["large_shift"] if plain else [])]
    same = {"no_signal": "within-prompt SD", "longer": "score and length", "shorter": "score and length"}
    for stage in run.finished("shift report"):
        report = cast(Report, stage.metrics)
        reward = stage.parents.get("reward", stage.name)
        for name, text in advice.sentences(report).items():
            if name in serious and reward in run.stages and not run.fails_gate(reward, same.get(name, "")):
                yield reward, text
