"""What to train: mixtures, next runs, allocation, expansion, crossover, and the practice of estimation."""
