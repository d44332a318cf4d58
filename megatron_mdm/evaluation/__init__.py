"""How good a model is: validation loss, and scored answers."""
