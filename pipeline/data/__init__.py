"""Datasets: from the files people have to the token ids every stage shares.

places, reading and sources (files, hub) -> shapes (which format) -> convert, messages, tools and media (any format to
one) -> heldout (one split per run) -> rendering and encode (the chat template's text, token ids) -> prepare (all of it
over Arrow, cached, every row left out counted); stream does the same for text of any size. faults says what can be
wrong with a row.
"""
