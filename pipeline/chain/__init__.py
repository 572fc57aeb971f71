"""Decide which stages are finished, which must run and why, and which may not start.

In come the config, the manifest and the content of all inputs. Out go a decision for each stage with its reason, the
verdicts of the gate, and one list of everything that is wrong before anything is trained.
"""
