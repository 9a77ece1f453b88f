"""Stands in for TensorNVMe, whose release on PyPI has no ``async_file_io``."""
