"""What surrounds a training run: checkpoints, strategies, optimisers, averages of weights, pictures."""
