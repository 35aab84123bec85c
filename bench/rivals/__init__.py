"""Published codes for task vectors, each as a function from task vectors to approximations.

A rival is given what its paper gives it (choices by validation included) and charged what a
careful implementation of it would write: the entropy of its symbols, a float a scale, and its
share of whatever all tasks have in common. The base is charged to nobody.
"""
