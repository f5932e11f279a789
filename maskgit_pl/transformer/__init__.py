"""Stage 2: token models, their losses and distillation."""
