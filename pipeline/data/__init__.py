"""Turn files of many formats into token ids, the same in every stage, and account for every row that is left out.

In come the sources of a dataset, the run's tokenizer, and what a stage asks for: the kind of row, the side of the
split and the greatest length. Out go a dataset of token ids and an audit: the number of rows, tokens and faults of
each kind.

places (which files) -> sources and reading (their rows) -> formats (which format) -> convert, hh, messages, tools and
media (any format to one) -> heldout (one split per run) -> rendering, joints and encode (the chat template's text,
token ids) -> rows (one class for each kind of row) -> batches (a batch of raw rows to columns) -> sieve and audit
(which rows a stage gets, the account of all others) -> prepare (all of it over Arrow, cached). stream does the same
for text of any size, and bookmark keeps the place that training has in it. fingerprints tells whether the data have
changed. faults says what can be wrong with a row, unreadable what can be wrong with a file.

run_tokenizer makes and opens the run's one tokenizer, with a template of chat_templates.

Stages are not known here: `config/requests.py` says in plain values what a stage asks of a dataset. Of the config only
the sections of datasets, model and tokenizer are.
"""
