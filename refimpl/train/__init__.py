"""The R1 recipe: pre-training, context extension, fine-tuning, reinforcement, distillation, a stage
a page, on the hand-derived gradients of `refimpl.model`. Nothing below imports this package."""
