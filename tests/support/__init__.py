"""What tests share: a running daemon, models made for a test."""
