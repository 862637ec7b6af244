"""Training heads: answers of the target, hidden states, losses, the trainer, offline evaluation."""
