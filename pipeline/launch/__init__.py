"""Start the process of a stage, log its output and carry its error back.

In come a command, an accelerate config and who watches. Out go the stage's log, its exit code and, if the
stage failed, one message that says why.
"""
