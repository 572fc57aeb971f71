"""What tests share: a quiet offline environment, a finished tiny run, and two ways to call `rlhf`.

`tiny` is imported by the fixtures and not here: it imports what reads the environment.
"""
# ruff: noqa: E402

import os
import tempfile

# Hugging Face's libraries and torch read these once, when they are imported; subprocesses inherit them.
_CACHE = tempfile.TemporaryDirectory(prefix="rlhf-tests-")
os.environ |= {
    "HF_HOME": _CACHE.name,
    "HF_DATASETS_CACHE": f"{_CACHE.name}/datasets",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import functools
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def write_config():
    """`write_config(folder, **changes)`: a tiny run's config with its data files; returns the config's path.

    Changes are dotted: `**{"stages.sft.lora": None}`; the value `tiny.REMOVED` drops the key.
    """
    import tiny

    return tiny.write_config


@pytest.fixture(scope="session")
def write_rows():
    """`write_rows(path, rows)`: a JSONL file."""
    import tiny

    return tiny.write_rows


@pytest.fixture
def killed_at(monkeypatch):
    """`killed_at(step)`: the next stage dies by `tiny.Killed` after the checkpoint of this step; None: it lives."""
    import tiny

    from pipeline.training import checkpoints

    mark = checkpoints.MarkComplete.on_save

    def arrange(step: int | None) -> None:
        def mark_then_die(self, args, state, control, **kwargs):
            mark(self, args, state, control, **kwargs)
            if state.global_step == step:
                raise tiny.Killed

        monkeypatch.setattr(checkpoints.MarkComplete, "on_save", mark_then_die)

    return arrange


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _imported():
    # Before any test captures stderr: transformers' log handler keeps the stream it finds when it is imported.
    import pipeline.chain.preflight  # noqa: F401


@pytest.fixture(autouse=True)
def _forgotten_functions(tmp_path_factory):
    """Forget the functions of users that a test imported, as the end of a process does."""
    yield
    folder = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(folder):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if not path.startswith(folder)]


@pytest.fixture
def rlhf(tmp_path):
    """`rlhf(*args)`: the command in a fork of a process that has the package imported, in `tmp_path`."""
    import warm

    return functools.partial(warm.rlhf, folder=tmp_path)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys, _imported):
    """`cli(*args)`: the command in this process, in `tmp_path`; returns (exit code, stdout, stderr)."""
    from pipeline.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # functions named in a config extend it

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["rlhf", *map(str, args)])
        capsys.readouterr()
        exit_code = 0
        try:
            main()
        except SystemExit as error:
            exit_code = error.code or 0
        return exit_code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, write_config):
    """A folder with config.yaml, its data, and runs/tiny with pretrain, sft and reward finished; copy it."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder)
    import warm

    done = warm.rlhf("run", config.name, "--until", "reward", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def finished(finished_run, tmp_path):
    """A copy of the finished run in `tmp_path`: its config file and its run folder."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    return SimpleNamespace(config=tmp_path / "config.yaml", run_dir=tmp_path / "runs" / "tiny")


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, its window 1280 pixels wide; it logs requests and errors. Without it the test is skipped."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromium-driver (Debian)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="session")
def make_record():
    """`make_record(**changes)`: a manifest record of a stage, as if it were finished."""
    import tiny

    return tiny.make_record


@pytest.fixture(scope="session")
def repo():
    """The repository's root."""
    return REPO
