"""Offer the `rlhf` command. Heavy imports happen inside the commands: `--help` and `status` answer at once."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pipeline import __version__
from pipeline.system import quiet, streams
from pipeline.system.errors import StageFailed, UserError
from pipeline.system.signals import Stopped, stopping

if TYPE_CHECKING:
    from rich.console import Console


class _InOrder(click.Group):
    """List the commands in the order in which people need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["plan", "check-data", "run", "status", "report", "chat", "shift", "label", "export", "push"]


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rlhf")
def cli() -> None:
    """From a pretrained language model to an aligned one: pretraining, SFT, a reward model, alignment, evaluation."""


def _console() -> "Console":
    from pipeline.show.screen import open_console

    return open_console()


@cli.command(short_help="Run what is not finished, and show the result.")
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--until", metavar="STAGE", help="Run this stage and those it needs.")
@click.option("--only", metavar="STAGE", help="Run this stage alone; those it needs must be finished.")
@click.option("--redo", metavar="STAGE", multiple=True, help="Run this stage again, and all that depends on it.")
@click.option("--accelerate-config", metavar="FILE", help="Run stages under `accelerate launch --config_file FILE`.")
@click.option("--smoke", is_flag=True, help="Take every stage through a few steps, and say what the run will take.")
def run(
    config: str,
    overrides: tuple[str, ...],
    until: str | None,
    only: str | None,
    redo: tuple[str, ...],
    accelerate_config: str | None,
    smoke: bool,
) -> None:
    """Run what is not finished yet of the run that CONFIG describes, and show the result.

    Overrides are dotted and checked like the file: stages.sft.training.learning_rate=1e-4

    With --smoke every stage runs on a few rows and for a few steps, in a run folder of its own, which begins anew each
    time. It shows within minutes whether model, data, memory and all stages work, and how long the run will take.
    """
    if smoke and (only or redo):
        raise click.UsageError("--smoke begins anew with all stages; leave out --only and --redo (--until is allowed)")
    from pipeline import launcher
    from pipeline.config.load import load, recall
    from pipeline.launch.process import environment
    from pipeline.launch.stage_server import StageServer
    from pipeline.system import disk

    console = _console()
    with stopping(), StageServer(environment()) as server:
        if recall(config, overrides) is None and accelerate_config is None:
            server.warm_up()  # meanwhile this process checks the config
        loaded = load(config, overrides)
        with disk.reported(loaded.run_path):
            if smoke:
                launcher.smoke_run(loaded, console, overrides, until, accelerate_config, server)
                return
            launcher.run(loaded, console, overrides, until, only, redo, accelerate_config, server)


@cli.command(short_help="Show what a run would do, and what is wrong with it.")
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--accelerate-config", metavar="FILE", help="Check for a run with the same option.")
def plan(config: str, overrides: tuple[str, ...], accelerate_config: str | None) -> None:
    """Check CONFIG and its data and show what `rlhf run` would do, without training or writing anything."""
    from pipeline import launcher
    from pipeline.config.load import load
    from pipeline.system import disk

    loaded = load(config, overrides)
    with disk.reported(loaded.run_path):
        launcher.show_plan(loaded, _console(), accelerate_config)


@cli.command("check-data", short_help="Read all data, say what is wrong with it, show rows.")
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--stage", "stages", metavar="STAGE", multiple=True, help="Only the datasets of this stage.")
@click.option(
    "--sample", metavar="N", type=click.IntRange(min=0), default=0, help="Show N rows as the model sees them."
)
def check_data(config: str, overrides: tuple[str, ...], stages: tuple[str, ...], sample: int) -> None:
    """Read all data of CONFIG as its stages would, count what is wrong with it, and show rows.

    Rows are shown with the template's text and special tokens; what is trained on stands between ⟦ and ⟧ (between [[
    and ]] where these cannot be printed).
    """
    from pipeline.config.load import load
    from pipeline.show import check_data
    from pipeline.system import disk

    loaded = load(config, overrides)
    with disk.reported(loaded.run_path):
        check_data.run(loaded, list(stages), sample, _console())


@cli.command(short_help="Show the chain, also at work, and how to load outputs.")
@click.argument("run_dir", type=click.Path(path_type=Path))
def status(run_dir: Path) -> None:
    """Show the chain of a run folder, also while it runs, and how to load its outputs."""
    from pipeline.show import results

    results.status(run_dir, _console())


@cli.command(short_help="Show what the reward models leave open.")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("stage", required=False)
def shift(run_dir: Path, stage: str | None) -> None:
    """Show what the reward models of a run folder leave open: prompt shift, signal, calibration, length.

    STAGE is a reward stage, or the stage of type shift that measured it; by default all.
    """
    from pipeline.show import shift

    shift.reports(run_dir, stage, _console())


@cli.command(short_help="Write a stage's model to a folder that loads anywhere.")
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
        command.export(run_dir, stage, target, form, dtype, force, _console())


@cli.command(short_help="Upload an export to the Hugging Face hub.")
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
        push.push(export_dir, repo, public, confirm, _console())


@cli.command(short_help="Make one HTML page of a run.")
@click.argument("run_dirs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_DIR...")
@click.option("--to", metavar="FILE", type=click.Path(path_type=Path), help="Write the page there.")
def report(run_dirs: tuple[Path, ...], to: Path | None) -> None:
    """Make one HTML page of a run: which stage to mend first, curves, results, all completions side by side.

    It is written to RUN_DIR/report.html, which `rlhf run` does at its end too. Several run folders are compared, in
    report.html of the working directory.
    """
    from pipeline.html import page

    page.make(run_dirs, to, _console())


@cli.command(short_help="Talk to policies of a run, side by side.")
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
        command.chat(run_dir, stages, reward, temperature, max_new_tokens, seed, page, _console())


@cli.command(short_help="Compare answers of a run's policies, by a person or a judge.")
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
def label(port: int, **options: Any) -> None:
    """Let a person compare answers of a run's policies on a page, and make comparisons for step 2 of it.

    Each pair has two completions of one policy, or one of each of two. By default they are of the last policy, for
    prompts that it was trained on. Prompts that the run is evaluated on are left out. The pairs on which the reward
    model is least sure come first (`--order unsure`), where there is one. The same command goes on where it was.

    The labels are written to labels/RUN/NAME, or to the folder of `--to`: comparisons.jsonl for `data:` of a config,
    and label.json, which says where they are from.
    """
    from pipeline.label import command
    from pipeline.label.asked import Asked

    with stopping():
        command.label(Asked(**options), port, _console())


def main() -> None:
    """Run the command; a user's error is one message and exit code 2, a bug keeps its traceback."""
    streams.prepare()
    try:
        with quiet.libraries():
            cli(standalone_mode=False)
            sys.stdout.flush()
    except (UserError, StageFailed) as error:
        streams.error(str(error))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        with contextlib.suppress(OSError):  # there is nowhere left to say it
            error.show()
        sys.exit(2)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        if not streams.refuses_stdout(error):
            raise
        streams.give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # that is `| head`, which has seen enough
            streams.error(f"cannot write to standard output: {error.strerror}")
        sys.exit(1)
