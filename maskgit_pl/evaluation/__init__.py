"""How good a trained model is: reconstruction, class agreement, diversity and speed."""
