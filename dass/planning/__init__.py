"""What pruning a model would take, computed from its config alone."""
