"""Training runs: data, optimisers, processes, logs and state."""
