"""What csipipe is measured against, and how: candidates that take turns in one session."""
