"""Training runs as their folders tell them: settings, log lines and results."""
