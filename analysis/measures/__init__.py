"""What is computed from features, labels and the head: entropies, MIR, HDR, collapse, their errors and gradients."""
