"""What runs a training step: DeepSpeed behind one small interface."""
