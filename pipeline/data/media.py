"""Refuse rows with images, audio or video: nothing here reads them, and half a row would be worse than none."""

from collections.abc import Mapping

from pipeline.data.faults import Row, RowFault, shown

# The names people give to columns, and to keys of messages, that hold media.
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_WORDS = ("image", "audio", "video")
_EXPECTED = "expected text alone: images, audio and video are not read"


def refuse_columns(row: Row) -> None:
    """Raise a RowFault where a row, or a message, has media beside its text."""
    for name in MEDIA:
        value = row.get(name)
        if not _is_empty(value):
            mend = f"to read the text without it, rename the column: `columns: {{{name}: unused}}`"
            raise RowFault("malformed", name, f"{_EXPECTED}, got {shown(value)}; {mend}")


def refuse_keys(message: Mapping[str, object], field: str) -> None:
    """Raise a RowFault where a message has media beside its content."""
    if any(not _is_empty(message.get(name)) for name in MEDIA):
        raise RowFault("malformed", field, f"{_EXPECTED}, got {shown(message)}")


def refuse_part(part: object, field: str) -> None:
    """Raise a RowFault at a part of a message's content that is not text."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and any(word in kind for word in _WORDS):
        raise RowFault("malformed", field, f"{_EXPECTED}, got {shown(part)}")
    if isinstance(kind, str):
        raise RowFault("malformed", field, f"expected parts of type 'text', got {shown(part)}")


def _is_empty(value: object) -> bool:
    """Tell whether a value holds nothing, at any depth: tables have every key in every row."""
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_empty, value))
    return not value
