"""Offer the commands of `rlhf` for a finished run: its report, its policies, and what is handed on of it.

They stand apart from `cli.py`, which adds them to the command. Heavy imports happen inside the commands.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from pipeline.system.errors import UserError
from pipeline.system.signals import stopping

if TYPE_CHECKING:
    from rich.console import Console


def console() -> "Console":
    """Return a console for the terminal; importing what makes it takes time that `--help` does without."""
    from pipeline.show.screen import open_console

    return open_console()


@click.command(short_help="Make one HTML page of a run.")
@click.argument("run_dirs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_DIR...")
@click.option("--to", metavar="FILE", type=click.Path(path_type=Path), help="Write the page there.")
def report(run_dirs: tuple[Path, ...], to: Path | None) -> None:
    """Make one HTML page of a run: which stage to mend first, curves, results, all completions side by side.

    It is written to RUN_DIR/report.html, which `rlhf run` does at its end too. Several run folders are compared, in
    report.html of the working directory.
    """
    from pipeline.html import page

    page.make(run_dirs, to, console())


@click.command(short_help="Talk to policies of a run, side by side.")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("stages", nargs=-1, metavar="[STAGE]...")
@click.option("--web", is_flag=True, help="Talk on a page for this machine's browser, not in the terminal.")
@click.option("--port", metavar="N", type=click.IntRange(0, 65535), help="Port of the page. By default a free one.")
@click.option("--reward", metavar="STAGE", help="The reward model that scores. By default the evaluation's.")
@click.option(
    "--temperature",
    metavar="X",
    type=click.FloatRange(min=0),
    default=0,
    help="0, the default, takes the likeliest token: then answers differ by their policies, not by chance. "
    "1 samples as evaluations do.",
)
@click.option(
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    help="The longest answer, in tokens. By default the evaluation's.",
)
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, help="Draws other answers. By default 0.")
def chat(
    run_dir: Path,
    stages: tuple[str, ...],
    web: bool,
    port: int | None,
    reward: str | None,
    temperature: float,
    max_new_tokens: int | None,
    seed: int,
) -> None:
    """Talk to finished policies of a run. Every STAGE answers, with its reward model's score and its KL to SFT.

    STAGE is a policy, or `base`; by default those that the run's evaluation compares. From a pipe, each line is a
    question, and answers are plain text: echo "Why is the sea salty?" | rlhf chat RUN_DIR sft
    """
    from pipeline.chat import command

    if port is not None and not web:
        raise UserError("--port is the page's; say --web too")
    page = (port or 0) if web else None
    with stopping():
        command.chat(run_dir, stages, reward, temperature, max_new_tokens, seed, page, console())


@click.command(short_help="Compare answers of a run's policies, by a person or a judge.")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--policy", "policies", metavar="STAGE", multiple=True, help="Complete with this stage; give one or two.")
@click.option("--prompts", metavar="DATASET", help="A dataset of the run's config, or a file of prompts.")
@click.option("--to", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the labels.")
@click.option("--pairs", metavar="N", type=click.IntRange(1), help="Compare N pairs. By default 100.")
@click.option("--by", metavar="NAME", help="Who answers. By default the name of this machine's user.")
@click.option("--order", type=click.Choice(["unsure", "random"]), help="Which pairs come first.")
@click.option("--twice", metavar="SHARE", type=click.FloatRange(0, 1), help="Ask this share twice. By default 0.1.")
@click.option("--temperature", type=click.FloatRange(0), help="By default as the run's evaluation samples.")
@click.option("--max-new-tokens", metavar="N", type=click.IntRange(1), help="The same.")
@click.option("--seed", metavar="N", type=click.IntRange(0), help="By default the run's.")
@click.option("--judge", metavar="MODULE:FUNCTION", help="Let this function answer, for every pair in both orders.")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The run's config, if it has moved.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port of the page. By default a free one.")
def label(
    run_dir: Path,
    policies: tuple[str, ...],
    prompts: str | None,
    to: Path | None,
    pairs: int | None,
    by: str | None,
    order: Literal["unsure", "random"] | None,
    twice: float | None,
    temperature: float | None,
    max_new_tokens: int | None,
    seed: int | None,
    judge: str | None,
    config_file: Path | None,
    port: int,
) -> None:
    """Let a person compare answers of a run's policies on a page, and make comparisons for step 2 of it.

    Each pair has two completions of one policy, or one of each of two. By default they are of the last policy, for
    prompts that it was trained on. Prompts that the run is evaluated on are left out. The pairs on which the reward
    model is least sure come first (`--order unsure`), where there is one. The same command goes on where it was.

    The labels are written to labels/RUN/NAME, or to the folder of `--to`: comparisons.jsonl for `data:` of a config,
    and label.json, which says where they are from.
    """
    from pipeline.label import command
    from pipeline.label.asked import Asked

    asked = Asked(
        run_dir=run_dir,
        policies=policies,
        prompts=prompts,
        to=to,
        pairs=pairs,
        by=by,
        order=order,
        twice=twice,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        judge=judge,
        config_file=config_file,
    )
    with stopping():
        command.label(asked, port, console())


@click.command(short_help="Write a stage's model to a folder that loads anywhere.")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("stage")
@click.option("--to", "target", metavar="DIR", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--as",
    "form",
    type=click.Choice(["adapter", "merged", "gguf"]),
    help="What to write. By default the adapter, where the stage has one, else whole weights.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of merged weights. By default the run's.",
)
@click.option("--force", is_flag=True, help="Replace an export that is there already.")
def export(
    run_dir: Path,
    stage: str,
    target: Path,
    form: Literal["adapter", "merged", "gguf"] | None,
    dtype: str | None,
    force: bool,
) -> None:
    """Write the model of a finished STAGE to a folder that loads without this package, with a model card.

    Adapters are merged in float32. What was written is read back in a new process and compared with the stage, on
    held-out rows of the run. An export that is not the stage's model is deleted.
    """
    from pipeline.export import command

    with stopping():
        command.export(run_dir, stage, target, form, dtype, force, console())


@click.command(short_help="Upload an export to the Hugging Face hub.")
@click.argument("export_dir", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--public", is_flag=True, help="Let everybody read it. By default the repository is private.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def push(export_dir: Path, repo: str, public: bool, yes: bool) -> None:
    """Upload an export to the repository REPO (`user/name`) of the Hugging Face hub.

    It shows what goes there, and asks first. Nothing else uploads anything.
    """
    from pipeline.export import push

    def confirm(question: str) -> bool:
        if yes:
            return True
        try:
            return click.confirm(question)
        except click.Abort:
            return False

    with stopping():
        push.push(export_dir, repo, public, confirm, console())


COMMANDS = (report, chat, label, export, push)
