"""Reading checkpoints from wherever they are. One small file a kind of source."""
