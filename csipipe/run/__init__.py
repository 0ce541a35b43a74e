"""One run's life: start, training, saving, resuming, stopping; its directory and its weights."""
