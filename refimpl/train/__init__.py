"""Training: what stands above the model and its gradients, from a batch to a run."""
