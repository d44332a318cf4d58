"""What a run keeps on disk so that it can resume, and Hugging Face checkpoints in and out."""
