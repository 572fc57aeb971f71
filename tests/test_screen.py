"""What is printed on narrow and wide screens, in any encoding, and where it cannot be printed at all."""

import contextlib
import errno
import io
import logging
import os
import re
import subprocess
import sys
import threading
import warnings

import pytest
from rich.cells import cell_len
from rich.console import Console

from pipeline import cli as commands
from pipeline.records import manifest
from pipeline.records.manifest import Manifest, Output
from pipeline.show.screen import Table, say, show
from pipeline.system import quiet, streams

BOX = "┏┳┓┃┡╇┩│└┴┘━─"
ODD = "A → \x1b[31m kättle [red]x[/red] [/] :smile: 漢字"
TABLE = Table("tiny: a plan", ("stage", "type", "starts from", "data (rows, tokens)", "will"))
TABLE.add("pretrain", "pretrain", "new weights", "corpus: 24, 408", [("run", "yellow"), (": not finished yet", "")])
TABLE.add(
    "sft", "sft", "pretrain + new adapter", "demos: 23, 483\nmore: 12, 40", [("skip", "green"), (": finished", "")]
)
TABLE.add("reward-model_2", "reward", "adapter of sft, continued", "", "run: config changed: training.learning_rate")


def printed(width, table=TABLE):
    """The lines of a table on a console of that width."""
    console = Console(file=io.StringIO(), width=width)
    show(table, console)
    return console.file.getvalue().splitlines()


def plain(cell):
    return cell if isinstance(cell, str) else "".join(text for text, _ in cell)


@pytest.mark.parametrize("width", [20, 30, 40, 60, 80, 100, 120, 160, 400])
def test_no_word_is_broken_at_any_width(width):
    lines = printed(width)
    words = " ".join(lines).translate(dict.fromkeys(map(ord, BOX), " ")).replace(":", " ").split()
    in_blocks = any(line.startswith("- ") for line in lines)  # whose heading is the first cell, without its name
    columns = TABLE.columns[1:] if in_blocks else TABLE.columns
    expected = [TABLE.title, *columns, *(plain(cell) for row in TABLE.rows for cell in row)]
    for word in " ".join(expected).replace(":", " ").split():
        assert word in words
    for line in lines:
        assert cell_len(line) <= width or len(line.split()) <= 2, "only a word that is too long may stand out"


def test_a_table_where_it_fits_and_blocks_where_it_does_not():
    assert printed(40)[1:13] == [
        "- pretrain",
        "  type: pretrain",
        "  starts from: new weights",
        "  data (rows, tokens): corpus: 24, 408",
        "  will: run: not finished yet",
        "- sft",
        "  type: sft",
        "  starts from: pretrain + new adapter",
        "  data (rows, tokens):",
        "    demos: 23, 483",
        "    more: 12, 40",
        "  will: skip: finished",
    ]
    assert printed(160)[2].startswith("┃ stage ")
    assert not any(line.startswith("- ") for line in printed(160))


def test_a_wide_screen_wraps_nothing():
    rows = [line for line in printed(160) if line.startswith("│")]
    assert len(rows) == 4  # three rows, one of them with a cell of two lines
    assert max(map(len, printed(400))) == max(map(len, printed(160)))


def test_characters_of_two_columns_are_counted_as_two():
    table = Table("t", ("a", "b"))
    table.add("漢字漢字", "x")
    assert {cell_len(line) for line in printed(40, table)[1:]} == {4 + 8 + 3 + 1}


def test_text_is_never_markup():
    table = Table("[red]t[/red]", ("[b]a[/b]", "[/]"))
    table.add("[link=x]y[/link]", [("[/]", "bold"), (":smile:", "")])
    shown = "\n".join(printed(80, table))
    for text in ("[red]t[/red]", "[b]a[/b]", "[/]", "[link=x]y[/link]", "[/]:smile:"):
        assert text in shown


@pytest.mark.parametrize("width", [20, 40])
def test_prose_is_wrapped_at_words_on_a_screen_and_not_at_all_in_a_pipe(width):
    path = "/a/path/that/is/longer/than/the/screen/is/wide"
    text = f"Plots are in {path}; `rlhf status` shows the rest of it"
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    say(console, text)
    lines = console.file.getvalue().splitlines()
    assert " ".join(lines) == text
    assert all(len(line) <= width for line in lines if path not in line)
    console = Console(file=io.StringIO(), width=width)
    say(console, text)
    assert console.file.getvalue() == f"{text}\n"


@pytest.fixture
def on_terminal(cli, tmp_path, monkeypatch):
    """`on_terminal(columns, stream, *args)`: what the command prints on a stream that is a terminal of that width."""

    def call(columns, stream, *args):
        reader, writer = os.openpty()
        with monkeypatch.context() as patch, open(writer, "w", encoding="utf-8") as terminal:  # noqa: PTH123
            patch.chdir(tmp_path)
            patch.setenv("COLUMNS", str(columns))
            patch.setenv("TERM", "xterm")
            patch.setattr(sys, stream, terminal)
            patch.setattr(sys, "argv", ["rlhf", *map(str, args)])
            with contextlib.suppress(SystemExit):
                commands.main()
        shown = b""
        with contextlib.suppress(OSError):  # at its end
            while chunk := os.read(reader, 65536):
                shown += chunk
        os.close(reader)
        return re.sub(r"\x1b\[[\d;]*m", "", shown.decode()).replace("\r\n", "\n")

    return call


def test_errors_are_wrapped_on_a_terminal_alone(cli, on_terminal, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("name: tiny\nstages: {}\nlora: {alpha: 3}\nseeds: 5\n")
    monkeypatch.setenv("COLUMNS", "40")
    exit_code, _, whole = cli("plan", "config.yaml")
    assert exit_code == 2
    narrow = on_terminal(40, "stderr", "plan", "config.yaml")
    assert narrow.split() == whole.split()
    assert len(narrow.splitlines()) > len(whole.splitlines())
    assert all(len(line) <= 40 for line in narrow.splitlines())


def test_status_on_a_narrow_terminal_and_in_a_pipe(cli, on_terminal, run_dir, monkeypatch):
    narrow = on_terminal(40, "stdout", "status", "run")
    assert "\n\ntiny: run\n- sft\n  type: sft\n  from: -\n  took: 1s\n  metrics: loss 1.000\n" in narrow
    wide = on_terminal(100, "stdout", "status", "run")
    assert "\n\ntiny: run\n┏━" in wide
    monkeypatch.setenv("COLUMNS", "40")  # as readline exports it
    exit_code, piped, _ = cli("status", "run")
    assert (exit_code, piped) == (0, wide)


# Encodings.


@pytest.fixture
def encoded(cli, tmp_path, monkeypatch):
    """`encoded(encoding, *args)`: the command with a stdout of that encoding; returns what it printed."""

    def call(encoding, *args):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "argv", ["rlhf", *map(str, args)])
            commands.main()
            stream.flush()
        return stream.buffer.getvalue().decode(encoding)

    return call


ESCAPED = {
    "utf-8": "A → \\x1b[31m kättle [red]x[/red] [/] :smile: 漢字",
    "latin-1": "A \\u2192 \\x1b[31m kättle [red]x[/red] [/] :smile: \\u6f22\\u5b57",
    "ascii": "A \\u2192 \\x1b[31m k\\xe4ttle [red]x[/red] [/] :smile: \\u6f22\\u5b57",
}


@pytest.mark.parametrize("encoding", ESCAPED)
def test_rows_are_shown_in_any_encoding(encoded, write_config, write_rows, tmp_path, encoding):
    config = write_config(tmp_path)
    rows = [{"prompt": f"Question {i}?", "completion": ODD} for i in range(30)]
    write_rows(tmp_path / "demos.jsonl", rows)
    shown = encoded(encoding, "check-data", config, "--stage", "sft", "--sample", "1")
    opening, closing = ("⟦", "⟧") if encoding == "utf-8" else ("[[", "]]")
    assert f"{opening}{ESCAPED[encoding]}" in shown
    assert closing in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("encoding", ESCAPED)
def test_status_is_shown_in_any_encoding(encoded, make_record, tmp_path, encoding):
    run_dir = tmp_path / "a [red]x[/red] [/] 漢"
    full = Output(kind="full", path="sft/output", files={})
    manifest.write(run_dir, Manifest(name="tiny", stages={"sft": make_record(output=full)}))
    shown = encoded(encoding, "status", run_dir)
    name = "a [red]x[/red] [/] " + ("漢" if encoding == "utf-8" else "\\u6f22")
    assert f"\n\ntiny: {tmp_path / name}\n" in shown
    assert ("┃" in shown) == (encoding == "utf-8")
    assert ("| stage |" in shown) == (encoding != "utf-8")


def test_what_no_stream_can_print_is_escaped():
    assert streams.printable("a\ud800b\udce4c\x9bd\u202ee\tf\n", "utf-8") == "a\\ud800b\\xe4c\\x9bd\\u202ee\tf\n"


@pytest.mark.slow
def test_a_run_in_ascii_without_a_home_in_a_folder_with_spaces(write_config, tmp_path):
    """The stage's own process prints its folder too, after its record is written."""
    folder = tmp_path / "a folder ü 漢"
    config = write_config(folder)
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "HF_HOME")}
    environment["PYTHONIOENCODING"] = "ascii"
    command = [sys.executable, "-m", "pipeline", "run", str(config), "--until", "pretrain"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.isascii()
    output = folder / "runs" / "tiny" / "pretrain" / "output"
    assert f"output in {str(output).encode('ascii', 'backslashreplace').decode()}\n" in done.stdout
    assert (output / "model.safetensors").is_file()
    assert f"output in {output}\n" in (output.parent / "log.txt").read_text(encoding="utf-8")


# A stdout that is full, closed, or read by nobody.


@pytest.fixture
def run_dir(tmp_path, make_record):
    manifest.write(tmp_path / "run", Manifest(name="tiny", stages={"sft": make_record()}))
    return tmp_path / "run"


def shell(line, folder):
    """A line of shell in which `$rlhf` is the command; (exit code, stdout, stderr)."""
    environment = os.environ | {"rlhf": f"{sys.executable} -m pipeline"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=folder, env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


FULL = f"error: cannot write to standard output: {os.strerror(errno.ENOSPC)}\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")  # noqa: PTH110
@pytest.mark.parametrize("command", ["status run", "--help"])
def test_a_full_device(run_dir, command):
    assert shell(f"$rlhf {command} >/dev/full", run_dir.parent) == (1, "", FULL)
    assert shell("$rlhf status nothing 2>/dev/full", run_dir.parent) == (2, "", "")


def test_a_reader_that_has_gone(run_dir):
    exit_code, stdout, stderr = shell("$rlhf status run | true", run_dir.parent)
    assert (exit_code, stdout, stderr) == (1, "", "")


def test_closed_streams(run_dir):
    assert shell("$rlhf status run >&-", run_dir.parent) == (0, "", "")
    assert shell("$rlhf status run <&- >&- 2>&-", run_dir.parent) == (0, "", "")
    assert shell("$rlhf status nothing 2>&-", run_dir.parent) == (2, "", "")


def test_an_error_of_something_else_keeps_its_traceback(cli, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.ENOSPC, "no room", "some/file")

    monkeypatch.setattr("pipeline.show.results.status", broken)
    with pytest.raises(OSError, match="some/file"):
        cli("status", tmp_path)


# Libraries.


def test_libraries_are_silent_within_a_command_and_not_after_it():
    logger = logging.getLogger("datasets.packaged_modules.json")
    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            with pytest.raises(RuntimeError), quiet.libraries():
                logger.error("within")
                warnings.warn("within", UserWarning, stacklevel=1)
                raise RuntimeError
            assert (seen, warned) == ([], [])
            logger.error("after")
            assert [record.getMessage() for record in seen] == ["after"]
    finally:
        logger.removeHandler(handler)


def test_a_bad_file_is_one_message_and_no_more(rlhf, write_config, tmp_path):
    config = write_config(tmp_path, **{"data.prompts": {"path": "prompts.parquet"}})
    (tmp_path / "prompts.parquet").write_bytes(b"no parquet" * 20)
    (tmp_path / "comparisons.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    done = rlhf("plan", config)
    assert done.returncode == 2
    heading, *lines = done.stderr.splitlines()
    assert heading.startswith(f"error: {config}: ") and heading.endswith("stages cannot run")
    assert len(lines) == 5  # all but the one that reads neither
    assert all(line.startswith("  stages.") for line in lines)


def test_status_while_another_process_writes(cli, run_dir, make_record):
    done = threading.Event()

    def write():
        for number in range(60):
            manifest.commit(run_dir, f"stage{number % 7}", make_record(seed=number))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        looks = 0
        while not done.is_set():
            exit_code, stdout, stderr = cli("status", run_dir)
            assert (exit_code, stderr) == (0, "")
            assert f"tiny: {run_dir}\n" in stdout
            looks += 1
    finally:
        writer.join()
    assert looks > 1
