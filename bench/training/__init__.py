"""Whole training steps and whole runs."""
