"""Which stage to mend first, by a table of rules. The first place in the chain comes first: data, SFT, reward, RL.

What a stage learned from a bad one cannot be judged. So findings are sorted by place, not by how bad they look.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.config.type_row import Makes
from pipeline.html import aligned, learned
from pipeline.html.values import Found, Run

DATA, POLICY, REWARD, ALIGNED, EVALUATION = range(5)  # places in the chain, in the order in which they are mended
_PLACES: dict[Makes | None, int] = {
    "policy": POLICY,
    "reward model": REWARD,
    "shift report": REWARD,
    "aligned policy": ALIGNED,
    "evaluation": EVALUATION,
}


@dataclass(frozen=True)
class Rule:
    """Say what a rule is about, and find in a run the stages of which it holds; `is_data`: their data are to mend."""

    name: str
    find: Callable[[Run], Iterator[Found]]
    is_data: bool = False


@dataclass(frozen=True)
class Finding:
    """A rule that holds: its name, what to mend (a stage, or its data), and what to do in plain words."""

    rule: str
    what: str
    text: str


RULES = (
    Rule("rows left out", learned.rows_left_out, is_data=True),
    Rule("rows worth a look", learned.rows_to_look_at, is_data=True),
    Rule("failed", aligned.unfinished),
    Rule("gate", aligned.gate),
    Rule("learned nothing", learned.learned_nothing),
    Rule("empty completions", learned.empty),
    Rule("overfitted", learned.overfitted),
    Rule("chance", learned.chance),
    Rule("not measured", learned.unmeasured),
    Rule("by heart", learned.by_heart),
    Rule("shift", learned.shift),
    Rule("overrated", aligned.overrated),
    Rule("alarm", aligned.alarms),
    Rule("no better", aligned.no_better),
    Rule("unended", aligned.unended),
    Rule("far", aligned.far),
)


def findings(run: Run) -> list[Finding]:
    """Return what the RULES find in a run: the first place in the chain first, of a place the first stage."""
    order = list(run.stages)
    found: list[tuple[int, int, int, Finding]] = []
    for number, rule in enumerate(RULES):
        for stage, text in rule.find(run):
            place = DATA if rule.is_data else _PLACES.get(run.stages[stage].makes, EVALUATION)
            what = f"the data of {stage}" if rule.is_data else stage
            found.append((place, order.index(stage), number, Finding(rule.name, what, text)))
    return [finding for *_, finding in sorted(found, key=lambda one: one[:3])]
