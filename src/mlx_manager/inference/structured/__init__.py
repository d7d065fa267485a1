"""Replies that have to have a form: what a client asks → grammar → which tokens may come next."""
