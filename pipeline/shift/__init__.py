"""Measure what comparisons left open in a reward model: statistics of its scores, advice and plots.

In come scores of several completions for each prompt, and margins of held-out comparisons. Out go figures with
intervals, advice by written rules, and three plots. Nothing else of this package is imported.
"""
