"""Hold what every training stage shares, from its context to its saved output.

In comes a StageContext: the stage's config, data, models and folder. Out goes a Result: metrics, parameter counts and
data accounts. Before that, assertions show that the right parameters trained, against the right reference.
"""
