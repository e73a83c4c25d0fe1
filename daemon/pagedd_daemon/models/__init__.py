"""Model files: what their headers say and which names they go by. Parses nothing but headers."""
