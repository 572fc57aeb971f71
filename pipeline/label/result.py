"""What answers show, for the terminal and for the page."""

import json

from rich.console import Console

from pipeline.label import folder
from pipeline.label.figures import Figures, Share
from pipeline.label.labels import Labels
from pipeline.shift.estimate import estimate
from pipeline.show.screen import Table, say, show
from pipeline.show.tables import number

# Of each share: its name, and what it is of.
_SHARES = (
    ("same_answer", "the same answer when asked again", "pairs asked twice"),
    ("left", "left side chosen", "answers for a side"),
    ("longer", "longer answer chosen", "pairs of unequal length"),
    ("as_reward_model", "as the reward model", "pairs that it tells apart"),
)


def lines(figures: Figures) -> list[list[str]]:
    """Return the figures as rows: name, value with its interval, and of how many. No policy is named."""
    found = [[label, *_cells(figures[key], what)] for key, label, what in _SHARES]
    seconds = figures["seconds"]
    time = "-" if seconds is None else f"{number(seconds, 1 if seconds >= 1 else 3)} s"
    found.append(["median time", time, f"{figures['answered']} answers"])
    return found


def _cells(share: Share, what: str) -> list[str]:
    shown = estimate(share["value"])
    return ["-" if shown is None else str(shown), f"{share['of']} {what}"]


def terminal(labels: Labels, console: Console) -> None:
    """Show the figures, and how the comparisons are used."""
    figures = labels.figures()
    table = Table("Answers, with 95 % intervals", ("figure", "value", "of"))
    for cells in lines(figures):
        table.add(*cells)
    first = figures["first_policy"]
    if first is not None:
        policy = labels.pairs[0].completions[0].policy
        table.add(f"{policy} chosen", *_cells(first, "answers for a side"))
    show(table, console)
    counts = f"{figures['answered']} of {figures['questions']} questions are answered"
    say(console, f"{counts} (ties: {figures['ties']}, skips: {figures['skips']}).")
    if figures["disagreeing"]:
        say(console, f"Left out, since two answers to them differ: {figures['disagreeing']} pairs.")
    path = labels.place / folder.COMPARISONS
    if figures["comparisons"]:
        say(console, f"{figures['comparisons']} comparisons are in {path}. For a config:")
        say(console, f"data:\n  comparisons: {{path: {json.dumps(str(path), ensure_ascii=False)}}}")
    else:
        say(console, f"There is no comparison yet; they will be in {path}.")
