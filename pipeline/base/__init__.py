"""Look at the files of the run's base model before it is loaded.

In come the config's `model` section and the folder or hub id that it names. Out go a digest of the files, the commit
that the run uses, the architecture, and what is wrong with the weights.
"""
