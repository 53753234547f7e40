"""The seven LaMP tasks as data: what a record holds, which label set there is, and how a text becomes a prompt.

A prompt is in our own words. The input strings of LaMP's files are parsed exactly, and an input that does not match
fails with the task and what was expected (LaMP, Salemi et al. 2024, https://arxiv.org/abs/2304.11406).
"""
