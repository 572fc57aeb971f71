"""Turn the YAML file into a checked, complete and frozen RunConfig.

In come the file, the overrides of the command line, and the option names and types of TRL, PEFT and transformers. Out
go the RunConfig with every reference filled in, the graph of its stages and datasets, and all problems of the file at
once.
"""
