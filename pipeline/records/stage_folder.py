"""Name the files and folders in a stage's folder that more than one room must know."""

LOCK = ".lock"  # in every stage folder that a run has made, as long as dotfiles are copied with it
LOG = "log.txt"  # the launcher's; it only ever grows
PROGRESS = "progress.jsonl"  # of the latest attempt
CHECKPOINTS = "checkpoints"
