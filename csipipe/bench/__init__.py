"""What csipipe is compared with, and how: candidates that take turns in one session."""
