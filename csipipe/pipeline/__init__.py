"""The BTS's decoder tail on a DeepSpeed pipeline: the only place that imports DeepSpeed."""
