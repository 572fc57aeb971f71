"""Name the files and folders in a stage's folder that more than one room must know."""

from pipeline.config.schema import LOCK as LOCK

LOG = "log.txt"  # the launcher's; it only ever grows
PROGRESS = "progress.jsonl"  # of the latest attempt
CHECKPOINTS = "checkpoints"
COMPLETIONS = "completions"  # what a trainer has kept of them, in the checkpoints while it trains
TRACKING = "tracking.json"
GATE = "gate.json"  # the verdicts on what the stage builds on
HISTORY = "log_history.json"  # all that the trainer has logged, of a finished stage
