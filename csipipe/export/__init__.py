"""A trained pair for deployment: encoder for the UE, tail and head for the BTS, as files."""
