"""The prompt shift: how much of a reward model's score comparisons never constrained, and what is left to learn."""
