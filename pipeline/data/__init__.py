"""Datasets: from the files people have to the token ids every stage shares.

sources (files, hub) -> shapes and messages (any format to one) -> heldout (one split per run) -> encode (token ids) ->
prepare (all of it over Arrow, cached, every row left out counted); stream does the same for text of any size.
"""
