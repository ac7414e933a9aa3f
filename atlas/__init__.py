"""ATLAS: train a sweep of multilingual models, fit the scaling law and the transfer matrix, decide what to train
next."""

__version__ = "0.2.0"
