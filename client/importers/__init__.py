"""Importers: each reads one format into history items, and refuses what is malformed."""
