"""Merging as a stream: task vectors from checkpoints or a store, span by span, through a rule."""
