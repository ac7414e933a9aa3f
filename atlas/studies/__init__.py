"""What composes the rooms: the scaling study (the loop itself), the attention comparison, and models that write."""
