"""Let a person, or a function, compare completions of a run's policies.

In come a finished run folder and prompts. Out goes a folder with comparisons that `data:` takes, and where they are
from.
"""
