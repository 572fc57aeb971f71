"""Keep what a run has finished, in one file, `manifest.json`.

In come the record of a stage that has just finished and the metrics it measured. Out goes the manifest. It is read
strictly, so that every other room can trust its values.
"""
