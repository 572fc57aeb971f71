"""Hold what only reinforcement learning needs: baselines per prompt, the watchdog, the best policy.

In come scores of completions, held-out prompts and what a trainer logs. Out go scores less the baseline of their
prompt, alarms with the way to mend their cause, and the policy that scored best on held-out prompts.
"""
