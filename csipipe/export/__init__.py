"""A trained pair for products: encoder for the UE, tail and head for the BTS, as files."""
