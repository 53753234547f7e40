"""Importers: each reads one format of other people's records into history items, and refuses what is malformed."""
