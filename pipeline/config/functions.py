"""Find, import and try the functions of a prompt and a completion that the config names."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import SupportsFloat, cast

from pipeline.system.errors import UserError, nearest

Judge = Callable[[str, str], float]
Comparing = Callable[[str, str, str], float]
PACKAGE = Path(__file__).resolve().parents[1]
FORM = "def {name}(prompt: str, completion: str) -> float"
TRIED = ("Yes.", "")  # completions of the first prompt that a function is tried on; a policy may say nothing at all


def _split(reference: str, folder: Path, key: str) -> tuple[str, str]:
    module, colon, function = reference.partition(":")
    if not colon or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        wanted = f"expected `module:function`, two names of Python, got {reference!r}"
        raise UserError(f"{key}: {wanted}; for a file judge.py beside the config write `judge:score`")
    for path in (str(Path.cwd()), str(folder)):  # the config's folder comes first, in every process alike
        sys.path[:] = [path, *(other for other in sys.path if other != path)]
    return module, function


def source_of(reference: str, folder: Path, key: str) -> Path | None:
    """Find the file of a `module:function`, looked up beside the config, in the working directory and among packages.

    Raises:
        UserError: if there is no such module.
    """
    module, _ = _split(reference, folder, key)
    spec = None
    with _named(f"{key}: cannot import {reference!r}"), contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(module)  # imports the packages it is in
    if spec is None:
        places = "beside the config, in the working directory or installed"
        raise UserError(f"{key}: there is no module {module!r} {places}")
    return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None


def sources_of(reference: str, folder: Path, key: str) -> list[Path]:
    """Find the file of a `module:function`, and those that it imports from beside the config or the working directory.

    Only `import` statements are followed. Of an installed package it is the one file.

    Raises:
        UserError: if there is no such module.
    """
    first = source_of(reference, folder, key)
    if first is None:
        return []
    roots = [folder.resolve(), Path.cwd().resolve()]
    module = reference.partition(":")[0]
    if not any(first.resolve() in _files_of(module, root) for root in roots):
        return [first]
    sources: list[Path] = []
    waiting = [module]
    visited: set[str] = set()
    while waiting:
        name = waiting.pop()
        files = next(filter(None, (_files_of(name, root) for root in roots)), [])
        if name in visited or not files:
            continue
        visited.add(name)
        sources += [file for file in files if file not in sources]
        waiting += _imports(files[-1], name)
    return sources


def _files_of(module: str, root: Path) -> list[Path]:
    """List the files below `root` that importing a module runs: first those of its packages, then its own."""
    files = []
    place = root
    for part in module.split("."):
        place = place / part
        if (place / "__init__.py").is_file():
            files.append(place / "__init__.py")
    own = place.with_suffix(".py")
    if own.is_file() and place / "__init__.py" not in files:
        files.append(own)
    return files if files and files[-1] in (own, place / "__init__.py") else []


def _imports(file: Path, module: str) -> list[str]:
    """List the modules that a file names in its import statements; what is imported from a package may be one too."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return []  # importing it says what is wrong
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join(filter(None, [*above, node.module]))
            names += [name, *(f"{name}.{alias.name}" for alias in node.names)]
    return names


def function(reference: str, folder: Path, key: str) -> Judge:
    """Import a `module:function` of the form (prompt, completion) -> float.

    Raises:
        UserError: if it cannot be imported, whatever its module does instead, or cannot be called with two texts.
    """
    judge, name = _imported(reference, folder, key)
    form = f"expected `{FORM.format(name=name)}`"
    if not callable(judge):
        raise UserError(f"{key}: {reference!r} is {judge!r}; {form}")
    if fault := _fault_of_call(judge, "prompt", "completion"):
        raise UserError(f"{key}: {reference!r} cannot be called with a prompt and a completion ({fault}); {form}")
    return cast(Judge, judge)


def comparison(reference: str, folder: Path, key: str) -> Comparing | None:
    """Import a `module:function` of the form (prompt, left, right) -> float, where above 0 says that left is better.

    None: it does not take three texts.

    Raises:
        UserError: if it cannot be imported, whatever its module does instead.
    """
    judge, _ = _imported(reference, folder, key)
    if not callable(judge) or _fault_of_call(judge, "prompt", "completion") is None:
        return None
    return None if _fault_of_call(judge, "prompt", "left", "right") else cast(Comparing, judge)


def _imported(reference: str, folder: Path, key: str) -> tuple[object, str]:
    """Import what a `module:function` names; return it with its name."""
    module, name = _split(reference, folder, key)
    with _named(f"{key}: cannot import {reference!r}"):
        imported = importlib.import_module(module)
    if not hasattr(imported, name):
        raise UserError(f"{key}: {module!r} has no function {name!r}; {nearest(name, dir(imported))}")
    return getattr(imported, name), name


def _fault_of_call(judge: Callable[..., object], *texts: str) -> str | None:
    """Say why a function cannot be called with so many texts, or return None. Some of C do not tell their arguments."""
    try:
        inspect.signature(judge).bind(*texts)
    except TypeError as error:
        return str(error)
    except ValueError:
        pass
    return None


def check(reference: str, folder: Path, key: str, prompt: str) -> None:
    """Find, import and try a function before anything is trained, in a process that ends with it.

    What a function loads, a model on the GPU for example, would stay in this process for the whole run. What it prints
    is not shown.

    Raises:
        UserError: if there is no such function, or it gives no number to an answer to `prompt`.
    """
    question = json.dumps([reference, str(folder), key, prompt])
    command = [sys.executable, "-P", "-m", "pipeline.config.functions"]
    done = subprocess.run(command, input=question, capture_output=True, encoding="utf-8", errors="replace")
    fault = json.loads(done.stdout or "null")
    if not done.stdout:
        fault = f"{key}: {reference!r} ends its process (exit code {done.returncode}) when it is tried"
    if fault is None:
        return
    printed = done.stderr.strip()
    hint = f" (it printed: {printed.splitlines()[-1][:200]})" if printed else ""
    where = "" if fault.startswith(key) else f"{key}: "
    raise UserError(f"{where}{fault}{hint}")


def _try_out() -> None:
    """Run the process of `check`: question on stdin, fault or null on stdout, what is printed on stderr."""
    reference, folder, key, prompt = json.loads(sys.stdin.buffer.read())
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        fault = None
        try:
            source_of(reference, Path(folder), key)
            judge = function(reference, Path(folder), key)
            for completion in TRIED:
                judged(judge, reference, prompt, completion, "tried before the training")
        except UserError as error:
            fault = str(error)
        sys.stdout.flush()
        json.dump(fault, answer)


def judged(judge: Judge, reference: str, prompt: str, completion: str, where: str) -> float:
    """Return what a function gives to a completion, which must be a finite number.

    Raises:
        UserError: if it is no number, or the function fails. A NaN would lose every comparison, on either side.
    """
    asked = f"the completion {completion[:200]!r} of the prompt {prompt[:200]!r} ({where})"
    return _called(lambda: judge(prompt, completion), reference, asked)


def compared(judge: Comparing, reference: str, prompt: str, left: str, right: str, where: str) -> float:
    """Return what a function gives to two completions: above 0 where the left one is better, and 0 for a tie.

    Raises:
        UserError: if it is no finite number, or the function fails.
    """
    asked = f"the completions {left[:200]!r} and {right[:200]!r} of the prompt {prompt[:200]!r} ({where})"
    return _called(lambda: judge(prompt, left, right), reference, asked)


def _called(call: Callable[[], object], reference: str, asked: str) -> float:
    with _named(f"function {reference} fails at {asked}"):
        value = call()
    number = _number(value)
    if not math.isfinite(number):
        raise UserError(f"function {reference} gives {_shown(value)} to {asked}; expected a finite number")
    return number


def _number(value: object) -> float:
    """Return a number, or what a tensor of one element holds; NaN for anything else, also for text with digits."""
    if isinstance(value, (str, bytes)) or not isinstance(value, SupportsFloat):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _shown(value: object) -> str:
    """Show a value in a message."""
    if inspect.iscoroutine(value):
        value.close()  # or Python warns that nobody awaited it
        return "a coroutine (it is an `async def`)"
    return repr(value)[:200]


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Make one message of whatever a user's code raises; `sys.exit` would end the run as if it were finished."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"{what}: {_reason(error)}. Make it work, then give the same command again") from None


def _reason(error: BaseException) -> str:
    """Name the kind and text of an exception, and the line of the user's code it comes from."""
    if isinstance(error, SystemExit):
        words = f"it ends the program with sys.exit({error.code!r})"
    else:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    if isinstance(error, SyntaxError):
        return words  # which names the file and the line
    return f"{words} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else words


def _is_users(file: str) -> bool:
    """Tell whether a file belongs neither to Python or its packages nor to this one."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    return not file.startswith(("<", *libraries)) and not Path(file).resolve().is_relative_to(PACKAGE)


if __name__ == "__main__":
    _try_out()
