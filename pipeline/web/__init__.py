"""Serve a page to the browser of this machine's user, and to nobody else.

In come the files of a page and the functions that it may call. Out goes a server on 127.0.0.1, whose address has a
secret part.
"""
