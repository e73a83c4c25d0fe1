"""``make bench-desktop``: five apps of a desktop on one machine, and the rows beside them."""
