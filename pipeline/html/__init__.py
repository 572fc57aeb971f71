"""Make the report of run folders: one HTML file that opens anywhere, without network.

In come run folders: manifest, logs, completions, plots. Out goes a page that says which stage to mend first, by
written rules, and shows all that was measured. Nothing here imports torch, numpy or matplotlib: a report is made at the
end of every run, and must cost no time.
"""
