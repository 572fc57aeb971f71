"""Serve every other room with what touches this machine and this process: errors, streams, signals, disk, digests.

In come the environment of the process, its file handles and its signals. Out go plain values and two kinds of error:
a mistake of the user, with the way to mend it, and a stage that failed.
"""
