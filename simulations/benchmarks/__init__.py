"""Measured comparisons with other programs, each a command that writes one JSON file.

A benchmark runs both sides in one process, by turns, and counts CPU seconds, so that a busy machine
disturbs both alike.
"""
