"""Models: which there are and what their files say, checked; and those that torch computes."""
