"""Hand a stage's model on: as files that load without this package, and to the hub.

In comes a run folder with a finished stage. Out goes a folder with its adapter, its merged weights or a GGUF file,
compared with the stage after it was read back, and a model card. Only `push` sends anything anywhere.
"""
