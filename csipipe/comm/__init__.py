"""Everything that crosses between ranks: roles, channels, ledger, checks, and blame for waits."""
