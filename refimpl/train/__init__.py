"""Training: what a stage of the recipe is made of, and the stages."""
