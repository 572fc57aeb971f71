"""Load models, put adapters on them, sample from them and score with them.

In come places of weights (a base, full weights, an adapter), token ids and seeds. Out go modules that TRL's trainers
take, completions as token ids, and scores as floats.
"""
