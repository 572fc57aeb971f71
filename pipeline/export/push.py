"""Upload an export to the hub: by this command alone, after showing what goes where, private unless told otherwise."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # its library's: httpx, from version 2 on httpx2
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from rich.console import Console

from pipeline.export import folder
from pipeline.show.screen import Table, say, show
from pipeline.system.errors import UserError, reason_of
from pipeline.system.json_object import JsonObject

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def push(export: Path, repo: str, public: bool, confirm: Callable[[str], bool], console: Console) -> None:
    """Show what would be uploaded, ask, and upload it.

    Raises:
        UserError: if the folder is no export, has changed, cannot be used by others, or the hub refuses it.
    """
    export = export.expanduser().absolute()
    about = folder.read(export)
    _check_base(about)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository: {reason_of(error)}") from None
    try:
        _push(export, repo, about, public, confirm, console)
    except UserError:
        raise
    except OfflineModeIsEnabled:
        raise UserError("the hub is switched off by HF_HUB_OFFLINE; unset it and give the same command again") from None
    except LocalTokenNotFoundError:
        raise UserError(f"the hub does not know who you are: {_LOGIN}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        mend = f"; {_LOGIN}" if status in (401, 403) else ""
        raise UserError(f"the hub refuses {repo!r}: {_reason(error)}{mend}") from None
    except HTTPError as error:
        raise UserError(f"the hub cannot be reached: {reason_of(error)}") from None
    except (RuntimeError, ValueError) as error:  # of a file that did not arrive, and of answers that make no sense
        raise UserError(f"the upload to {repo!r} failed: {_reason(error)}. Give the same command again") from None


def _check_base(about: JsonObject) -> None:
    """Refuse an adapter on a folder of this machine.

    Raises:
        UserError: since nobody else could load it, and its path would be published.
    """
    base = about.get("base")
    if base and Path(base).is_absolute():
        raise UserError(f"the adapter's base is {base}, which nobody else has; export it with `--as merged`")


def _push(
    export: Path, repo: str, about: JsonObject, public: bool, confirm: Callable[[str], bool], console: Console
) -> None:
    api = HfApi()
    exists = api.repo_exists(repo)
    is_private = not public
    if exists:
        is_private = bool(api.model_info(repo).private)
        if not is_private and not public:
            raise UserError(f"{repo!r} is public already; say `--public`, or give another name")
    names = [*about["files"], folder.FILE]
    sizes = {name: (export / name).stat().st_size for name in sorted(names)}
    table = Table(f"{export} -> {api.endpoint}/{repo}", ("file", "size"), right=True)
    for name, size in sizes.items():
        table.add(name, _size(size))
    show(table, console)
    place = "a repository that is there already, where files of these names are replaced" if exists else "new"
    who = "private" if is_private else "PUBLIC: everybody can read it"
    say(console, f"{len(names)} files, {_size(sum(sizes.values()))}, to {repo} ({place}), {who}")
    if not confirm("Upload them?"):
        raise UserError("nothing was uploaded")
    if not console.is_terminal:
        disable_progress_bars()
    if not exists:
        api.create_repo(repo, private=not public)
    commit = api.upload_folder(
        folder_path=export,
        repo_id=repo,
        allow_patterns=names,
        commit_message=f"{about['run']}: {about['stage']} ({about['as']})",
    )
    say(console, f"Uploaded: {commit.commit_url}")


def _reason(error: Exception) -> str:
    """Return the first line of a library's error, to stand within a sentence."""
    return reason_of(error).rstrip(".")


def _size(num_bytes: int) -> str:
    """Show a number of bytes in three digits."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"
