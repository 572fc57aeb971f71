"""Hold one file for each type of stage. Each reads straight down: data, models, trainer, fit.

In comes a StageContext. Out goes a Result. The process of the stage then writes the record.
"""
