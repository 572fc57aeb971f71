"""Show people a plan, data, results and reports in the terminal.

In come decisions, audits and the manifest. Out go tables and lines that fit the terminal. Nothing here trains. Only
the screen of a run writes to its folder, the states of its stages.
"""
