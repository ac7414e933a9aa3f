"""ATLAS: train a sweep of multilingual models, fit the scaling law and the transfer matrix, decide what to train
next."""
