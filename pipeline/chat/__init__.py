"""Talk to the policies of a run, side by side, in the terminal or on a page of this machine.

In comes a run folder with finished policies. Out go their answers, each with the reward model's score and the KL to
SFT. Nothing is written.
"""
