"""`rlhf label`: begin labels or go on with them, let somebody answer, and show what the answers say."""

import dataclasses
from pathlib import Path

from rich.console import Console

from pipeline.label import folder, page, result, run
from pipeline.label.asked import Asked
from pipeline.label.labels import Labels
from pipeline.records.manifest import Manifest
from pipeline.show.results import recorded_in
from pipeline.show.screen import say
from pipeline.system import disk
from pipeline.web.server import serve


def label(asked: Asked, port: int, console: Console) -> None:
    """Ask a person on a page, or a judge, which completions of a run's policies are better.

    Labels that were begun go on where they were. The run folder is only read.

    Raises:
        UserError: if the run, an option or the folder of the labels cannot be used.
    """
    asked = dataclasses.replace(asked, run_dir=asked.run_dir.expanduser().resolve())
    recorded = recorded_in(asked.run_dir)
    by = asked.name()
    place = (asked.to or Path("labels") / recorded.name / by).expanduser().resolve()
    with disk.reported(place, "--to"):
        folder.check(place)
        with folder.held(place):
            labels = _opened(asked, by, place, recorded, console)
            try:
                _answered(labels, asked, recorded, port, console)
            finally:
                labels.write()
    result.terminal(labels, console)


def _opened(asked: Asked, by: str, place: Path, recorded: Manifest, console: Console) -> Labels:
    """Return labels that were begun, or begin them."""
    about = folder.read(place)
    if about is None:
        from pipeline.label.begin import begin  # imports torch, which an answer does not need

        config = run.config_of(asked.run_dir, recorded, asked.config_file)
        if asked.judge is not None:
            from pipeline.label import judging

            judging.find(asked.judge, config.folder)  # before any work
        about = begin(asked, by, place, recorded, config, lambda text: say(console, text))
    else:
        asked.check_same(about["settings"], place)
        run.check_same(asked.run_dir, recorded, about, place)
    return Labels(place, about)


def _answered(labels: Labels, asked: Asked, recorded: Manifest, port: int, console: Console) -> None:
    """Let somebody answer until nothing is left, or until Ctrl-C."""
    labels.write()
    if labels.next is None:
        return
    if asked.judge is not None:
        from pipeline.label import judging

        config = run.config_of(asked.run_dir, recorded, asked.config_file)
        judging.check_same(asked.judge, config.folder, labels.about["judge"]["files"], labels.place)
        say(console, f"asking {asked.judge} for {len(labels.pairs)} pairs, each in both orders")
        judging.answer_all(labels, judging.find(asked.judge, config.folder), lambda text: say(console, text))
        return
    twice = len(labels.questions) - len(labels.pairs)
    answered = len(labels.answers.standing)
    before = f"; {answered} are answered" if answered else ""
    say(console, f"{len(labels.questions)} questions: {len(labels.pairs)} pairs, {twice} of them twice{before}.")

    def finished() -> None:
        say(console, "All questions are answered. The page can still take back the last answer; Ctrl-C ends.")

    def ready(address: str) -> None:
        say(console, "Open this page in a browser on this machine:")
        say(console, address)
        say(console, "Every answer is kept at once. Ctrl-C pauses; the same command goes on.")

    serve(page.site(labels, finished), port, ready)
    say(console, "")
