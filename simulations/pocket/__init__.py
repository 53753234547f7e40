"""Trains the embedded base `pocket` from generated text alone."""
