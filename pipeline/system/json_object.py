"""Name the type of an object in a JSON file."""

from typing import Any

JsonObject = dict[str, Any]  # values are what JSON knows: who writes a file and who reads it agree on them
