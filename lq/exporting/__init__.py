"""What leaves training: codes and scales."""

from lq.exporting.codes import save_codes

__all__ = ["save_codes"]
