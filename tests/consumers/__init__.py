"""Programs of others that read converted folders, each run as its own process by tests/test_consumers.py."""
