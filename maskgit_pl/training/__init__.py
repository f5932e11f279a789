"""Parts of training that both stages share: checkpoints, strategies, optimizer, weight averages, callbacks."""
