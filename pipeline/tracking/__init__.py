"""Report what stages log to tensorboard, wandb and trackio.

In come figures, tables and pictures of a stage, with the step of its training. Out go each tracker's own files, in the
stage's folder. A stage that resumes goes on in its curve.
"""
