"""Offer the `rlhf` command. Heavy imports happen inside the commands: `--help` and `status` answer at once."""

import contextlib
import sys
from pathlib import Path

import click

from pipeline import __version__
from pipeline.cli_results import COMMANDS, console
from pipeline.system import quiet, streams
from pipeline.system.errors import StageFailed, UserError
from pipeline.system.signals import Stopped, stopping


class _InOrder(click.Group):
    """List the commands in the order in which people need them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["plan", "check-data", "run", "status", "report", "chat", "shift", "label", "export", "push"]


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rlhf")
def cli() -> None:
    """From a pretrained language model to an aligned one: pretraining, SFT, a reward model, alignment, evaluation."""


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

    terminal = console()
    with stopping(), StageServer(environment()) as server:
        if recall(config, overrides) is None:
            if terminal.is_terminal:  # it takes seconds
                terminal.print("Checking the config and its data", style="dim")
            if accelerate_config is None:
                server.warm_up()  # meanwhile this process checks the config
        loaded = load(config, overrides)
        with disk.reported(loaded.run_path):
            if smoke:
                launcher.smoke_run(loaded, terminal, overrides, until, accelerate_config, server)
                return
            launcher.run(loaded, terminal, overrides, until, only, redo, accelerate_config, server)


@cli.command(short_help="Show what a run would do, and what is wrong with it.")
@click.argument("config", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--accelerate-config", metavar="FILE", help="Check for a run with the same option.")
@click.option(
    "--minutes",
    metavar="N",
    type=click.FloatRange(min=0, min_open=True, max=525_600),
    help="Print the command of a run of about N minutes, by the times of its smoke run.",
)
def plan(config: str, overrides: tuple[str, ...], accelerate_config: str | None, minutes: float | None) -> None:
    """Check CONFIG and its data and show what `rlhf run` would do, without training or writing anything."""
    from pipeline import planner
    from pipeline.config.load import load
    from pipeline.system import disk

    if minutes != minutes:
        raise click.UsageError("--minutes: expected a number, got nan")
    loaded = load(config, overrides)
    with disk.reported(loaded.run_path):
        if minutes is not None:
            planner.show_values(loaded, console(), minutes, overrides, accelerate_config)
            return
        planner.show_plan(loaded, console(), accelerate_config)


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
        check_data.run(loaded, list(stages), sample, console())


@cli.command(short_help="Show the chain, also at work, and how to load outputs.")
@click.argument("run_dir", type=click.Path(path_type=Path))
def status(run_dir: Path) -> None:
    """Show the chain of a run folder, also while it runs, and how to load its outputs."""
    from pipeline.show import results

    results.status(run_dir, console())


@cli.command(short_help="Show what the reward models leave open.")
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("stage", required=False)
def shift(run_dir: Path, stage: str | None) -> None:
    """Show what the reward models of a run folder leave open: prompt shift, signal, calibration, length.

    STAGE is a reward stage, or the stage of type shift that measured it; by default all.
    """
    from pipeline.show import shift

    shift.reports(run_dir, stage, console())


for of_results in COMMANDS:
    cli.add_command(of_results)


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
