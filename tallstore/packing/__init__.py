"""The stream from checkpoints to chunks."""
