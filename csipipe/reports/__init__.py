"""The paper's tables and figures, each from finished runs of launch/train.py."""
