"""Training: the data, the step, and every stage of the R1 recipe at small size."""
