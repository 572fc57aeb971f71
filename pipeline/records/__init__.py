"""Keep what a run has finished, in one file, `manifest.json`, and how far its stages are.

In come the record of a stage that has just finished and the metrics it measured. Out goes the manifest. It is read
strictly, so that every other room can trust its values. How far a stage is, and in which state, is only for people to
look at: a file that cannot be read or written counts as none, and stops nothing.
"""
