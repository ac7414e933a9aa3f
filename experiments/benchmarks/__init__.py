"""Suites of `experiments.benchmark`, one module each."""
