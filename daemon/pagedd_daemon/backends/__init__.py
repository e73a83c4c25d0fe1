"""Model runners behind one protocol: see `pagedd_daemon.backends.base`."""
