"""Start the process of a stage and carry its output and its error back.

In come a command, an accelerate config and the user's terminal. Out go the stage's log, its exit code and, if the
stage failed, one message that says why.
"""
