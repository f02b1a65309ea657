"""The record of a run: its round lines, its summary, its page, and what watches it live.

Nothing here decides anything: a run gives the same model with any of it or none.
"""
