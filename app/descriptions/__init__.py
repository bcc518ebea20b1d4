"""What a checkpoint says of itself: architecture, labels and preprocessing."""
