"""Open a run for talking: choose its stages, load them, and hand them to the terminal or to the page."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.system.quiet import quieten_transformers  # isort: skip

from rich.console import Console

from pipeline.chat import page, terminal, weights
from pipeline.chat.selection import Run, open_run
from pipeline.chat.session import Session, Settings
from pipeline.models import run_models
from pipeline.show.screen import say
from pipeline.system.errors import UserError
from pipeline.system.streams import printable


def chat(
    run_dir: Path,
    stages: Sequence[str],
    reward: str | None,
    temperature: float,
    max_new_tokens: int | None,
    seed: int,
    port: int | None,
    console: Console,
) -> None:
    """Talk to stages of a run; none named: those that its evaluation compares. `port`: of a page; None: no page.

    Raises:
        UserError: if a stage cannot be talked to, or its files are not those on record.
    """
    if not math.isfinite(temperature):
        raise UserError(f"--temperature: expected a finite number, 0 or more, got {temperature}")
    run = open_run(run_dir)
    names = run.checked(stages) if stages else run.compared()
    reward = run.reward(reward)
    settings = Settings(temperature, max_new_tokens or run.max_new_tokens, seed)
    is_watched = port is not None or (sys.stdin is not None and sys.stdin.isatty() and console.is_terminal)
    session = _opened(run, names, reward, is_watched, console)
    if port is not None:
        page.show(session, settings, port, lambda text: say(console, text))
    elif is_watched:
        terminal.talk(session, settings, console)
    else:
        terminal.answer_lines(session, settings, console)


def _opened(run: Run, names: list[str], reward: str | None, is_watched: bool, console: Console) -> Session:
    """Load all that is needed. Notes go to stderr where stdout has the answers alone."""

    def tell(text: str) -> None:
        if is_watched:
            say(console, text)
        else:
            print(printable(text, sys.stderr.encoding or "utf-8"), file=sys.stderr, flush=True)

    quieten_transformers()
    tokenizer = run_models.tokenizer(run.run_dir, run.recorded)
    where = run_models.choose_device(run.recorded, [name for name in names if name in run.recorded.stages])
    tell(f"{run.recorded.name}: on the {where}, weights in {run.recorded.model.get('dtype', 'float32')}")
    models = weights.Models(run, tokenizer, tell)
    baseline = run.baseline
    models.load([*names, *([] if baseline is None else [baseline])])
    scorer = None if reward is None else models.reward(reward)
    session = Session(run, tokenizer, models, names, scorer, reward, baseline)
    for line in [*models.accounts(), *session.notes()]:
        tell(line)
    return session
