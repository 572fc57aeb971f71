"""Read chat templates, built-in ones and files of the user's own, and try one before any row is read."""

import contextlib
import re
import signal
import threading
import traceback
from collections.abc import Container, Iterator
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from pipeline.system.errors import UserError, reason_of

TEMPLATES = Path(__file__).parent / "templates"
# What the code of a template can raise beside jinja's own errors.
CODE_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
FALLBACK = "plain"  # of a model that has no template
SECONDS = 5.0  # for two short dialogues, which take a millisecond
LONGEST = 1_000_000  # characters of a short dialogue
_SPECIAL = re.compile(r"<\|?\w+\|?>")  # a token such as <|im_end|> or <eos>
_QUESTION = {"role": "user", "content": "What is salt?"}
_ANSWER = {"role": "assistant", "content": "A mineral."}
_MEND = "mend it, or set tokenizer.chat_template to another one, such as `chatml`"
# The names that jinja gives to the code of a template that has no file.
_JINJA_FILES = ("<template>", "<unknown>")


class _TooSlow(BaseException):
    """Report that the time of a template's first try is over. No template can catch this class."""


def read(name: str, folder: Path) -> str:
    """Return the text of a built-in template by name, or of a Jinja file beside the config.

    Raises:
        UserError: if there is no such template, or its file is not UTF-8.
    """
    path = TEMPLATES / f"{name}.jinja" if is_built_in(name) else folder / name
    if not path.is_file():
        known = ", ".join(built_in_names())
        fault = f"{name!r} is neither a built-in template ({known}) nor a file beside the config"
        raise UserError(f"tokenizer.chat_template: {fault}")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fault = f"expected UTF-8, got the byte 0x{content[error.start]:02x}"
        raise UserError(f"tokenizer.chat_template: {path}, line {line}: {fault}; save the file as UTF-8") from None
    return text.replace("\r\n", "\n").rstrip("\n")


def is_built_in(name: str) -> bool:
    return name in built_in_names()


def built_in_names() -> list[str]:
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def fitting(vocabulary: Container[str]) -> dict[str, list[str]]:
    """Return the built-in templates that write special tokens of their own, all of them in a vocabulary."""
    fits: dict[str, list[str]] = {}
    for name in built_in_names():
        tokens = sorted(set(_SPECIAL.findall(read(name, TEMPLATES))))
        if tokens and all(token in vocabulary for token in tokens):
            fits[name] = tokens
    return fits


def described(template: object) -> str:
    """Return a template's name for messages: `the chat template 'chatml'`, or `the chat template` if not built in."""
    for name in built_in_names():
        if isinstance(template, str) and template.endswith(read(name, TEMPLATES)):
            return f"the chat template {name!r}"
    return "the chat template"


def code_error(error: Exception) -> str:
    """Put an error into words that is not one of jinja's own."""
    if "no loader for this environment" in str(error):
        return "it imports or includes another file; write all of it in one file"
    reason = reason_of(error)
    name = type(error).__name__
    if reason == name:
        return name
    return f"{name}: {reason}"


def line_of(error: BaseException) -> str:
    """Return `, line 3` if jinja knows the line of a template that an error comes from, else an empty text."""
    if isinstance(error, TemplateSyntaxError):
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename in _JINJA_FILES]
    return f", line {lines[-1]}" if lines else ""


def try_out(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Render two short dialogues, so that a broken template is refused before any row is read.

    `where` names the template in messages. A template may refuse these dialogues (`raise_exception`) and yet take
    those of the rows, so that is no error here.

    Raises:
        UserError: if the template has an error, takes longer than SECONDS, writes more than LONGEST characters, or
            leaves out a message.
    """
    try:
        with _limited(SECONDS):
            texts = [
                str(tokenizer.apply_chat_template([_QUESTION], tokenize=False, add_generation_prompt=True)),
                str(tokenizer.apply_chat_template([_QUESTION, _ANSWER], tokenize=False)),
            ]
    except TemplateSyntaxError as error:
        raise UserError(
            f"{where}{line_of(error)}: syntax error in the chat template: {error.message}; {_MEND}"
        ) from None
    except (UndefinedError, SecurityError) as error:
        raise UserError(f"{where}{line_of(error)}: the chat template fails: {reason_of(error)}; {_MEND}") from None
    except TemplateError:
        return
    except _TooSlow:
        fault = f"the chat template takes more than {SECONDS:g} s for a dialogue of two short messages"
        raise UserError(f"{where}: {fault}; look for a long loop in it, and {_MEND}") from None
    except CODE_ERRORS as error:
        raise UserError(f"{where}{line_of(error)}: the chat template fails: {code_error(error)}; {_MEND}") from None
    longest = max(map(len, texts))
    if longest > LONGEST:
        fault = f"the chat template writes {longest:,} characters for a dialogue of two short messages"
        raise UserError(f"{where}: {fault}; expected at most {LONGEST:,}")
    _check_nothing_lost(texts, where)


def _check_nothing_lost(texts: list[str], where: str) -> None:
    """Refuse a template that leaves out a message; `texts` are the question, and the question with its answer."""
    for text, messages in zip(texts, ([_QUESTION], [_QUESTION, _ANSWER]), strict=True):
        for message in messages:
            if message["content"] not in text:
                fault = f"the chat template leaves out the message of the {message['role']}: {messages} give {text!r}"
                raise UserError(f"{where}: {fault}; {_MEND}")


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _TooSlow in the block after some seconds of the processor's time; a process that waits uses none.

    Only the main thread of a Unix process can be stopped in this way.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TooSlow

    handler = signal.signal(signal.SIGVTALRM, stop)
    timer_before, _ = signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, timer_before)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if handler is None else handler)
