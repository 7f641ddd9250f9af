"""Fine-tuning: the last blocks of a backbone and the head on it, from the head that was fitted."""
