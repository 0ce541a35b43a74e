"""All that crosses between ranks: who is who, channels, ledger, checks, and who is to blame."""
