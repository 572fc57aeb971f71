"""Try the functions of a stage before anything is trained."""

from pipeline.config import functions
from pipeline.config.graph import functions_of
from pipeline.config.schema import RunConfig


def try_functions(config: RunConfig, name: str, prompt: str) -> None:
    """Import each function of a stage, and ask it for the score of an answer to `prompt`.

    Raises:
        UserError: if there is no such function, or it gives no number.
    """
    for field, reference in functions_of(config.stages[name]):
        functions.check(reference, config.folder, f"stages.{name}.{field}", prompt)
